"""Adapters in parallel: every layout gives the gradients, the step and the checkpoint of a single rank."""

from functools import partial

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")

from lora_jobs import BIASED, DENSE, MOE, Case, assemble, train  # noqa: E402 - after the skips

LAYOUTS = {
    "tp2": ({"tp": 2}, 2),
    "tp2-sp": ({"tp": 2, "sequence_parallel": True}, 2),
    "dp2": ({"dp": 2}, 2),
    "ep2": ({"dp": 2, "ep": 2}, 2),
    "etp2": ({"tp": 2, "etp": 2}, 2),
    "tp2-ep2-etp1": ({"tp": 2, "ep": 2, "etp": 1}, 2),
    "tp2-sp-ep2-etp1": ({"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True}, 2),
    "tp2-dp2-ep2-etp2": ({"tp": 2, "dp": 2, "ep": 2, "etp": 2}, 4),
    "tp2-dp2-ep4-etp1": ({"tp": 2, "dp": 2, "ep": 4, "etp": 1}, 4),
}
MODELS = {
    "dense": (DENSE, {"r": 4, "lora_alpha": 8}),
    "dense-all": (
        DENSE,
        {"r": 4, "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"]},
    ),
    "dense-dora": (DENSE, {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "biased-dora": (BIASED, {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "canonical": (DENSE, {"r": 4, "variant": "canonical"}),
    "moe": (MOE, {"r": 4, "lora_alpha": 8}),
    "moe-dora": (MOE, {"r": 4, "use_dora": True}),
    "moe-canonical": (MOE, {"r": 4, "variant": "canonical"}),
    "moe-shared": (MOE, {"r": 4, "expert_adapters": "shared"}),
    "moe-outer": (MOE, {"r": 4, "expert_adapters": "shared_outer"}),
    "moe-overlap": (
        MOE | {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"},
        {"r": 4, "lora_alpha": 8},
    ),
    "sequential": (MOE | {"moe_grouped_gemm": False}, {"r": 4, "lora_alpha": 8}),
    "sequential-shared": (MOE | {"moe_grouped_gemm": False}, {"r": 4, "expert_adapters": "shared"}),
    "sequential-outer": (MOE | {"moe_grouped_gemm": False}, {"r": 4, "expert_adapters": "shared_outer"}),
}
DENSE_LAYOUTS = ("tp2", "tp2-sp", "dp2")
EXPERT_LAYOUTS = ("ep2", "etp2", "tp2-ep2-etp1", "tp2-dp2-ep2-etp2")
CASES = [(name, layout) for name in ("dense", "dense-dora", "canonical") for layout in DENSE_LAYOUTS]
CASES += [("dense-all", "tp2"), ("dense-all", "tp2-sp"), ("biased-dora", "tp2"), ("biased-dora", "tp2-sp")]
CASES += [("moe", layout) for layout in EXPERT_LAYOUTS]
CASES += [(name, layout) for name in ("moe-shared", "moe-outer", "sequential") for layout in EXPERT_LAYOUTS[1:]]
CASES += [(name, "tp2-sp-ep2-etp1") for name in ("moe", "moe-outer", "moe-overlap")] + [("moe-overlap", "tp2-ep2-etp1")]
CASES += [("moe-dora", "etp2"), ("moe-canonical", "tp2-dp2-ep2-etp2"), ("moe", "tp2-dp2-ep4-etp1")]
CASES += [("sequential-shared", "tp2-ep2-etp1"), ("sequential-outer", "tp2-dp2-ep2-etp2")]


@pytest.fixture(scope="module")
def reference(rank_pool, tmp_path_factory):
    """Per model: what one rank computes with stirred adapters, and the checkpoint that it started from."""
    made = {}

    def make(name):
        if name not in made:
            fields, lora = MODELS[name]
            folder = str(tmp_path_factory.mktemp(name))
            (result,) = rank_pool.run(train, Case(fields, lora=lora, save=folder), stirred=True, ranks=[0])
            made[name] = (result, folder)
        return made[name]

    return make


def named(kind, factor, text):
    return f"{kind} of {factor}: {text}"


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_gradients_and_a_step_are_those_of_one_rank(rank_pool, reference, name, layout):
    """Loaded from the single rank's checkpoint, so that it is a test of saving and loading at other layouts too."""
    expected, folder = reference(name)
    fields, lora = MODELS[name]
    sizes, ranks = LAYOUTS[layout]
    answers = rank_pool.run(train, Case(fields, sizes, lora=lora, load=folder), ranks=range(ranks))
    for key in ("grads", "after"):
        whole, single = (assemble([answer[key] for answer in found]) for found in (answers, [expected]))
        assert whole.keys() == single.keys()
        for factor, value in single.items():
            assert value.abs().max() > 0, factor
            torch.testing.assert_close(whole[factor], value, rtol=1e-4, atol=2e-6, msg=partial(named, key, factor))
    for answer in answers:
        assert answer["norm"] == pytest.approx(expected["norm"], rel=1e-4)
        assert answer["losses"] == pytest.approx(expected["losses"], rel=1e-5)

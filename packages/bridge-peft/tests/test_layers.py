"""Adapted models on one rank: how they start, what they compute, how they are switched, merged, saved."""

from contextlib import suppress

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")

import layer_jobs  # noqa: E402 - after the skips
from lora_jobs import BIASED, DENSE, LATENT, MOE, Case, assemble  # noqa: E402

SEQUENTIAL = MOE | {"moe_grouped_gemm": False}
MODELS = {
    "dense": Case(DENSE),
    "local": Case(DENSE, spec="local"),
    "biased": Case(BIASED),
    "latent": Case(LATENT),
    "moe": Case(MOE),
    "sequential": Case(SEQUENTIAL),
    "local-moe": Case(MOE, spec="local"),
}
VARIANTS = {
    "lora": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "use_rslora": True, "rank_pattern": {"linear_fc1": 6}, "alpha_pattern": {"linear_proj": 3}},
    "canonical": {"r": 4, "variant": "canonical"},
    "canonical-some": {
        "r": 4,
        "variant": "canonical",
        "target_modules": ["linear_k", "linear_v", "up_proj", "linear_proj"],
    },
    "dora": {"r": 4, "use_dora": True},
    "canonical-dora": {"r": 4, "use_dora": True, "variant": "canonical"},
    "shared": {"r": 4, "expert_adapters": "shared"},
    "outer": {"r": 4, "expert_adapters": "shared_outer"},
}
CASES = [(model, "lora") for model in MODELS]
CASES += [("dense", v) for v in ("rslora", "canonical", "canonical-some", "dora", "canonical-dora")]
CASES += [("moe", v) for v in ("rslora", "canonical", "dora", "canonical-dora", "shared", "outer")]
CASES += [("biased", "dora"), ("sequential", "dora"), ("sequential", "shared"), ("sequential", "outer")]


def case_of(model, variant):
    case = MODELS[model]
    return Case(case.fields, case.layout, VARIANTS[variant], case.spec)


@pytest.fixture(scope="module")
def looked_at(rank_pool):
    """What a model said when it was adapted, merged and unmerged: each once."""
    made = {}

    def look(case):
        if str(case) not in made:
            (made[str(case)],) = rank_pool.run(layer_jobs.merging, case, ranks=[0])
        return made[str(case)]

    return look


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_the_output_is_the_same_at_the_start(looked_at, model, variant):
    found = looked_at(case_of(model, variant))
    assert found["before"].std() > 0.1
    torch.testing.assert_close(found["after"], found["before"], rtol=0, atol=0)
    assert found["trained"] == sorted(found["shapes"])
    assert found["trained"], "nothing is trained"
    assert found["report"].trainable > 0
    for entry in found["report"].adapted:
        assert entry.name in found["text"]


def test_defaults_adapt_every_linear_layer_but_the_output_layer(looked_at):
    found = looked_at(Case(MOE, lora={}))
    per_layer = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.experts.linear_fc1"]
    per_layer += ["mlp.experts.linear_fc2", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    expected = {f"decoder.layers.{layer}.{name}" for layer in (0, 1) for name in per_layer}
    assert {entry.name for entry in found["report"].adapted} == expected
    assert found["report"].skipped == ("output_layer",)


@pytest.mark.parametrize(
    ("variant", "shapes"),
    [
        ("lora", ((4, 4, 64), (4, 96, 4), (4, 4, 48), (4, 64, 4))),
        ("shared", ((4, 64), (96, 4), (4, 48), (64, 4))),
        ("outer", ((4, 64), (4, 96, 4), (4, 4, 48), (64, 4))),
    ],
)
def test_shapes_of_the_factors_of_grouped_experts(looked_at, variant, shapes):
    found = looked_at(case_of("moe", variant))
    names = [
        f"decoder.layers.0.mlp.experts.{fc}.adapter.default.{f}"
        for fc in ("linear_fc1", "linear_fc2")
        for f in ("lora_A", "lora_B")
    ]
    assert tuple(found["shapes"][name] for name in names) == shapes


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_merged_weights_are_the_sum_and_unmerging_is_exact(looked_at, model, variant):
    found = looked_at(case_of(model, variant))
    assert (found["adapted"] - found["before"]).abs().max() > 1e-2
    torch.testing.assert_close(found["disabled"], found["before"], rtol=0, atol=0)
    torch.testing.assert_close(found["unmerged"], found["adapted"], rtol=0, atol=0)
    assert found["restored"]
    assert found["untouched"]
    torch.testing.assert_close(found["merged"], found["adapted"], rtol=1e-4, atol=2e-5)
    assert list(found["stream"]) == [name for name in found["weights"] if ".adapter." not in name]
    for name, value in found["stream"].items():
        torch.testing.assert_close(found["merged_weights"][name], value, rtol=0, atol=0)
        if name not in found["stream_adapted"]:
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=0)
    if variant in ("lora", "rslora"):
        check_sum(found)


def check_sum(found):
    """Every streamed weight against W + scaling * B A, from the parameters alone."""
    checked = 0
    for name in found["stream_adapted"]:
        path, _, leaf = name.rpartition(".")
        a, b = (found["weights"][f"{path}.adapter.default.{factor}"] for factor in ("lora_A", "lora_B"))
        if leaf != "weight":
            a, b = (factor[int(leaf.removeprefix("weight"))] for factor in (a, b))
        expected = found["weights"][name] + found["scaling"][path] * (b @ a)
        torch.testing.assert_close(found["stream"][name], expected, rtol=0, atol=0)
        checked += 1
    assert checked


@pytest.mark.parametrize("model", ["dense", "moe", "sequential"])
def test_named_adapters_are_switched_and_deleted(rank_pool, model):
    (found,) = rank_pool.run(layer_jobs.named, case_of(model, "lora"), ranks=[0])
    same = [("second_start", "base"), ("loaded", "first_again"), ("nothing_left", "base")]
    same += [("second_alone", "second")]
    for one, other in same:
        torch.testing.assert_close(found[one], found[other], rtol=0, atol=0)
    assert found["trained"] == ["second"]
    assert found["trained_again"] == ["first"]
    assert found["keys"]
    assert found["hooks"] == 0
    logits = [found[name] for name in ("base", "first", "second", "both", "first_again")]
    for index, one in enumerate(logits):
        for other in logits[:index]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("variant", "singleton"),
    [("dora", False), ("shared", False), ("outer", False), ("dora", True), ("outer", True)],
    ids=lambda value: {False: "stacked", True: "singleton"}.get(value, value),
)
def test_grouped_and_sequential_experts_load_each_others_checkpoints(rank_pool, tmp_path, variant, singleton):
    """And a checkpoint saved on four ranks is loaded by one, without a bit changed."""
    metadata = {"singleton_local_shards": singleton}
    lora = VARIANTS[variant]
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for folder in folders:
        (tmp_path / folder).mkdir()
    layout = {"tp": 2, "dp": 2, "ep": 2, "etp": 2}
    other = SEQUENTIAL if variant in ("lora", "dora") or not singleton else MOE
    ((first, logits),) = rank_pool.run(
        layer_jobs.checkpoint, Case(MOE, lora=lora, save=folders[0]), metadata=metadata, ranks=[0]
    )
    case = Case(other, layout, lora, load=folders[0], save=folders[1])
    middle = rank_pool.run(layer_jobs.checkpoint, case, metadata=metadata, ranks=range(4))
    ((last, last_logits),) = rank_pool.run(
        layer_jobs.checkpoint, Case(MOE, lora=lora, load=folders[1]), metadata=metadata, ranks=[0]
    )
    for _, found in middle:
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_logits, logits, rtol=0, atol=0)
    one, two = assemble([first]), assemble([last])
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dense", {"tp": 2}),
        ("moe", {"tp": 2, "ep": 2, "etp": 1}),
        ("moe", {"tp": 2}),
        ("sequential", {"ep": 2, "dp": 2}),
    ],
)
def test_initial_factors_do_not_depend_on_the_layout(rank_pool, model, layout):
    lora = {"r": 4, "seed": 7}
    case = MODELS[model]
    (single,) = rank_pool.run(layer_jobs.initial, Case(case.fields, lora=lora), ranks=[0])
    several = rank_pool.run(layer_jobs.initial, Case(case.fields, layout, lora), ranks=range(2))
    one, two = assemble([single]), assemble(several)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0)
        if "lora_A" in name:
            bound = value.shape[-1] ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound
            assert len(value.unique()) > 0.99 * value.numel()
        else:
            assert not value.any()


@pytest.mark.parametrize(
    ("lora_dtype", "base", "expected"),
    [
        ("fp32", "bfloat16", "torch.float32"),
        ("bfloat16", "float32", "torch.bfloat16"),
        (None, "bfloat16", "torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_lora_dtype_is_kept_and_none_follows_the_model(rank_pool, model, lora_dtype, base, expected):
    lora = {"r": 4, "lora_dtype": lora_dtype}
    (found,) = rank_pool.run(layer_jobs.dtypes, Case(MODELS[model].fields, lora=lora), base, ranks=[0])
    assert found["factors"] == [expected]
    assert found["bases"] == [f"torch.{base}"]
    assert found["gradients"]
    assert found["same"]


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_recomputed_layers_have_gradients(rank_pool, model):
    (found,) = rank_pool.run(layer_jobs.recomputed, case_of(model, "lora"), ranks=[0])
    assert found["missing"] == []
    assert found["size"] > 1e-3
    assert found["apart"] < 1e-6


def test_dropout_acts_while_training_only(rank_pool):
    (found,) = rank_pool.run(layer_jobs.dropped, Case(DENSE, lora={"r": 4, "lora_dropout": 0.5}), ranks=[0])
    one, two = found["training"]
    assert (one - two).abs().max() > 1e-3
    torch.testing.assert_close(*found["evaluation"], rtol=0, atol=0)


@pytest.mark.parametrize("fields", [DENSE, BIASED], ids=["plain", "biased"])
def test_dora_against_peft(rank_pool, fields):
    """Values and gradients against peft's own layer, on the same weight, factors and input."""
    peft = pytest.importorskip("peft")
    layers = rank_pool.run(
        layer_jobs.dora_layers, Case(fields, lora={"r": 4, "lora_alpha": 6, "use_dora": True}), ranks=[0]
    )[0]
    assert layers
    for found in layers:
        weight = found["weight"]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=found["bias"] is not None)
        model = torch.nn.Sequential()
        model.add_module("linear", linear)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if found["bias"] is not None:
                linear.bias.copy_(found["bias"])
        config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["linear"])
        oracle = peft.get_peft_model(model, config)
        named = {
            "lora_A": oracle.base_model.model.linear.lora_A["default"].weight,
            "lora_B": oracle.base_model.model.linear.lora_B["default"].weight,
            "lora_magnitude": oracle.base_model.model.linear.lora_magnitude_vector["default"].weight,
        }
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(found["factors"][name])
        x = found["x"].clone().requires_grad_()
        output = oracle(x)
        output.square().sum().backward()
        torch.testing.assert_close(found["output"], output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["x_grad"], x.grad, rtol=1e-4, atol=1e-4)
        for name, parameter in named.items():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-4)
        with suppress(AttributeError):
            oracle.unload()


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_methods_that_take_a_part_out_of_the_base(rank_pool, model, method):
    lora = {"r": 4, "lora_alpha": 8, "lora_init_method": method}
    (found,) = rank_pool.run(layer_jobs.decomposed, Case(MODELS[model].fields, lora=lora), ranks=[0])
    torch.testing.assert_close(found["after"], found["before"], rtol=1e-4, atol=1e-5)
    assert found["layers"]
    for weight, update, left in found["layers"].values():
        torch.testing.assert_close(left + update, weight, rtol=0, atol=1e-6)
        if method == "pissa":
            values = torch.linalg.svdvals(weight.double())
            torch.testing.assert_close(torch.linalg.svdvals(update.double())[:4], values[:4], rtol=1e-4, atol=0)
            torch.testing.assert_close(torch.linalg.svdvals(left.double())[0], values[4], rtol=1e-3, atol=0)


def test_a_pattern_may_fit_on_another_pipeline_stage_only(rank_pool):
    """Layers have their global number on every stage, virtual ones too."""
    lora = {"r": 2, "target_modules": ["layers.3.mlp.linear_fc1", "*.layers.0.*.linear_proj"]}
    case = Case(DENSE | {"num_layers": 4}, {"pp": 2, "vpp": 2}, lora)
    first, second = rank_pool.run(layer_jobs.on_a_pipeline, case, ranks=range(2))
    assert first[0] == ["decoder.layers.0.self_attention.linear_proj"]
    assert second[0] == ["decoder.layers.3.mlp.linear_fc1"]
    assert second[1] == [f"decoder.layers.0.mlp.linear_fc1.adapter.default.{f}" for f in ("lora_A", "lora_B")]


def test_what_one_stage_refuses_all_refuse(rank_pool):
    """Only the last stage has a layer with an adapter of that name."""
    first = {"target_modules": ["layers.1.mlp.linear_fc1"]}
    case = Case(DENSE, {"pp": 2}, {})
    (error, same), (other, same_there) = rank_pool.run(layer_jobs.refused, case, first=first, ranks=[0, 1])
    assert "1 failed: a layer has an adapter of this name already" in str(error)
    for each in (error, other):
        assert "decoder.layers.1.mlp.linear_fc1" in str(each)
        assert "adapter of this name already" in str(each)
    assert same
    assert same_there


REFUSED = {
    "nothing-matches": ({"target_modules": ["linear_gkv"]}, ["linear_gkv", "linear_qkv", "fits no module"]),
    "one-of-two": ({"target_modules": ["linear_qkv", "dense_h_to_4h"]}, ["dense_h_to_4h"]),
    "other-layer": ({"target_modules": ["layers.9.mlp.linear_fc1"]}, ["layers.9", "as in the whole model"]),
    "hf-name": ({"target_modules": ["q_proj"]}, ["a part of linear_qkv", 'variant="canonical"']),
    "exclude": ({"exclude_modules": ["linear_fc3"]}, ["exclude_modules", "linear_fc3"]),
    "rank-pattern": ({"rank_pattern": {"linear_q": 4}}, ["rank_pattern", "linear_q"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_patterns_that_fit_nothing_are_refused(rank_pool, name):
    lora, words = REFUSED[name]
    ((error, same),) = rank_pool.run(layer_jobs.refused, Case(DENSE, lora=lora), ranks=[0])
    for word in words:
        assert word in str(error)
    assert same


@pytest.mark.parametrize(
    ("options", "fields", "words"),
    [
        ({"wrap": True}, {}, ["before DDP", "DistributedDataParallel"]),
        ({"first": {}}, {}, ["adapter of this name already", "'default'"]),
        ({"name": "my.adapter"}, {}, ["cannot have this name", "'my.adapter'"]),
    ],
    ids=["wrapped", "twice", "name"],
)
def test_models_that_cannot_be_adapted_are_refused(rank_pool, options, fields, words):
    ((error, same),) = rank_pool.run(layer_jobs.refused, Case(DENSE | fields, lora={}), ranks=[0], **options)
    for word in words:
        assert word in str(error)
    assert same

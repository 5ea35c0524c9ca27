"""Exports of live models: PEFT on transformers computes what Megatron computed, and layouts do not differ in a bit."""

import json

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from convert_jobs import base_round_trip, export, merged, refusals  # noqa: E402 - after the skips
from hf_cases import LORA, base, peft_logits, tensors, tokens, whole  # noqa: E402

from bridge_core import AutoBridge  # noqa: E402
from bridge_core.errors import CoverageError  # noqa: E402
from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402
from bridge_peft import export_adapter_ckpt  # noqa: E402
from bridge_peft.converting.run_config import ByHand  # noqa: E402

LAYOUTS = {
    "1": ({}, 1),
    "tp2": ({"tp": 2}, 2),
    "pp2": ({"pp": 2}, 2),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, 2),
    "ep2": ({"dp": 2, "ep": 2}, 2),
    "etp2": ({"tp": 2, "etp": 2}, 2),
    "tp2-ep2": ({"tp": 2, "dp": 2, "ep": 2, "etp": 1}, 4),
    "tp2-ep2-etp2": ({"tp": 2, "dp": 2, "ep": 2, "etp": 2}, 4),
    "tp2-pp2": ({"tp": 2, "pp": 2}, 4),
}
DENSE = ("1", "tp2", "pp2", "pp2-vpp2", "tp2-pp2")
EXPERTS = ("1", "tp2", "pp2", "ep2", "etp2", "tp2-ep2", "tp2-ep2-etp2")
TARGETS = {
    "qwen3": ("peft", "vllm", "sglang"),
    "qwen3_moe": ("peft", "peft-target-parameters", "vllm", "sglang"),
}
CASES = [("qwen3", layout) for layout in DENSE] + [("qwen3_moe", layout) for layout in EXPERTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models, made when asked for."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = save_model(make_model(name), tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="module")
def exports(rank_pool, models, tmp_path_factory):
    """What ranks of a layout said, and the folders they wrote, by target."""
    made = {}

    def make(name, layout, **lora):
        key = (name, layout, json.dumps(lora, sort_keys=True))
        if key not in made:
            sizes, ranks = LAYOUTS[layout]
            out = tmp_path_factory.mktemp("exports")
            targets = ("peft",) if lora.get("use_dora") else TARGETS[name]
            outs = {target: str(out / target) for target in targets}
            answers = rank_pool.run(
                export, str(models(name)), sizes, LORA | lora, outs, tokens(), ranks=range(ranks), timeout_s=120
            )
            made[key] = answers, outs
        return made[key]

    return make


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_peft_computes_the_same_logits(exports, models, name, layout):
    answers, outs = exports(name, layout)
    ours = whole(answers)
    for target in ("peft", "peft-target-parameters") if name == "qwen3_moe" else ("peft",):
        torch.testing.assert_close(peft_logits(models(name), outs[target]), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layouts_do_not_differ_in_a_bit(exports, name, layout):
    (first, *_), reference = exports(name, "1")
    answers, outs = exports(name, layout)
    for target, folder in outs.items():
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            with open(f"{folder}/{file}", "rb") as ours, open(f"{reference[target]}/{file}", "rb") as theirs:
                assert ours.read() == theirs.read(), (target, file)
    streams = [answer["stream"] for answer in answers if answer["stream"] is not None]
    assert streams
    for stream in streams:
        assert list(stream) == list(first["stream"])
        assert all(torch.equal(value, first["stream"][key]) for key, value in stream.items())


def test_a_stream_holds_what_a_folder_holds(exports):
    (answer, *_), outs = exports("qwen3_moe", "1")
    saved = tensors(outs["peft"])
    assert saved.keys() == answer["stream"].keys()
    assert all(torch.equal(value, saved[key]) for key, value in answer["stream"].items())
    assert answer["nbytes"] == sum(value.nbytes for value in saved.values())


VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "canonical": {"variant": "canonical"},
    "q and v alone": {"variant": "canonical", "target_modules": ["linear_q", "linear_v", "linear_proj"]},
    "some layers": {"target_modules": ["linear_qkv", "linear_fc2"], "layers_to_transform": [1, 3]},
    "ranks and alphas": {
        "rank_pattern": {"linear_qkv": 3, r"layers\.2\.mlp\.linear_fc1": 6},
        "alpha_pattern": {"linear_fc2": 5, r"layers\.0\.mlp\.linear_fc1": 2.5},
    },
    "output layer": {"target_modules": ["linear_qkv", "output_layer"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_dense_model(exports, models, variant):
    answers, outs = exports("qwen3", "tp2", **VARIANTS[variant])
    torch.testing.assert_close(peft_logits(models("qwen3"), outs["peft"]), whole(answers), rtol=0, atol=1e-5)


EXPERT_VARIANTS = {
    "canonical": {"variant": "canonical", "use_rslora": True},
    "shared": {"expert_adapters": "shared"},
    "shared outer": {"expert_adapters": "shared_outer"},
    "rslora": {"use_rslora": True},
}
BY_LAYER = {
    "some layers": {"layers_to_transform": [1, 2]},
    "gate alone": {"variant": "canonical", "target_modules": ["linear_fc1_gate"]},
    "down alone": {"target_modules": ["linear_fc2"]},
    "ranks": {"rank_pattern": {"linear_fc1": 3, r"layers\.2\.mlp\.experts\.linear_fc2": 6}},
}


@pytest.mark.parametrize("variant", EXPERT_VARIANTS)
def test_variants_of_experts(exports, models, variant):
    answers, outs = exports("qwen3_moe", "tp2-ep2", **EXPERT_VARIANTS[variant])
    ours = whole(answers)
    for target in ("peft", "peft-target-parameters"):
        torch.testing.assert_close(peft_logits(models("qwen3_moe"), outs[target]), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", BY_LAYER)
def test_what_peft_can_say_by_parameter_alone(rank_pool, models, tmp_path, variant):
    lora = LORA | BY_LAYER[variant]
    sizes, ranks = LAYOUTS["ep2"]
    outs = {"peft-target-parameters": str(tmp_path / "adapter")}
    path = models("qwen3_moe")
    answers = rank_pool.run(export, str(path), sizes, lora, outs, tokens(), ranks=range(ranks))
    torch.testing.assert_close(peft_logits(path, tmp_path / "adapter"), whole(answers), rtol=0, atol=1e-5)


def test_a_configuration_targets_no_more_than_was_adapted(exports):
    _, outs = exports("qwen3", "tp2", **VARIANTS["some layers"])
    with open(f"{outs['peft']}/adapter_config.json") as file:
        config = json.load(file)
    named = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors(outs["peft"])}
    assert set(config["target_modules"]) == named
    _, outs = exports("qwen3", "1")
    with open(f"{outs['peft']}/adapter_config.json") as file:
        config = json.load(file)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == kinds


@pytest.mark.parametrize(("name", "layout"), [("qwen3", "tp2"), ("qwen3_moe", "tp2-ep2")])
def test_merged_weights_are_those_of_merge_and_unload(rank_pool, exports, models, tmp_path, name, layout):
    from peft import PeftModel

    _, outs = exports(name, layout)
    sizes, ranks = LAYOUTS[layout]
    rank_pool.run(merged, str(models(name)), sizes, LORA, str(tmp_path / "merged"), ranks=range(ranks))
    ours = base(tmp_path / "merged").state_dict()
    theirs = PeftModel.from_pretrained(base(models(name)), outs["peft"]).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)


def test_the_base_of_an_adapted_model_loads_and_saves(rank_pool, models, tmp_path):
    """bridge-core sees the base alone; a checkpoint with both is exported when told what to leave out."""
    path = models("qwen3_moe")
    sizes, ranks = LAYOUTS["tp2-ep2"]
    outs = {kind: str(tmp_path / kind) for kind in ("hf", "megatron", "everything")}
    (tmp_path / "everything").mkdir()
    for found in rank_pool.run(base_round_trip, str(path), sizes, LORA, outs, ranks=range(ranks)):
        assert found["reported"] == found["adapters"] > 0
        assert found["kept_by_hf"]
        assert found["kept_by_megatron"]
        assert found["kept_beside_others"]
        assert found["whole"]
        assert "*.adapter.*" in found["refused"]
    bridge = AutoBridge.from_hf_pretrained(path)
    bridge.export_ckpt(outs["megatron"], tmp_path / "again")
    with pytest.raises(CoverageError, match=r"(?s)holds adapters.*bridge-peft export"):
        bridge.export_ckpt(outs["everything"], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    told = bridge.export_ckpt(outs["everything"], tmp_path / "told", ignore=["*.adapter.*"])
    assert any(".adapter.default." in key and "left out" in reason for key, reason in told.ignored.items())
    for folder in ("hf", "again", "told"):
        assert (tmp_path / folder / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    export_adapter_ckpt(outs["everything"], tmp_path / "adapter", path, by_hand=ByHand(r=4, alpha=8))
    live = tensors(exported(rank_pool, path, "1", tmp_path / "live"))
    ours = tensors(tmp_path / "adapter")
    assert ours.keys() == live.keys()
    assert all(torch.equal(value, live[key]) for key, value in ours.items())


def exported(rank_pool, path, layout, out):
    """The adapter of a live model, written for PEFT."""
    sizes, ranks = LAYOUTS[layout]
    rank_pool.run(export, str(path), sizes, LORA, {"peft": str(out)}, tokens(), ranks=range(ranks))
    return out


def test_bad_input_is_told_on_every_rank(rank_pool, models, tmp_path):
    other = save_model(make_model("qwen3", hidden_size=32), tmp_path / "other")
    out = tmp_path / "out"
    both = rank_pool.run(refusals, str(models("qwen3")), str(other), {"tp": 2}, str(out), ranks=[0, 1])
    words = ["peft-target-parameters", "bf16", "adapter 'other'", "another shape", "beside those", "nowhere"]
    for found in both:
        for (text, _), word in zip(found, words, strict=True):
            assert word in text
    assert not out.exists()


def test_shapes_that_servers_expect(exports):
    _, outs = exports("qwen3_moe", "ep2", expert_adapters="shared_outer")
    experts = "base_model.model.model.layers.0.mlp.experts"
    vllm, sglang = tensors(outs["vllm"]), tensors(outs["sglang"])
    assert vllm[f"{experts}.7.gate_proj.lora_A.weight"].shape == (4, 64)
    assert vllm[f"{experts}.7.down_proj.lora_B.weight"].shape == (64, 4)
    assert sglang[f"{experts}.gate_proj.lora_A.weight"].shape == (1, 4, 64)
    assert sglang[f"{experts}.up_proj.lora_B.weight"].shape == (8, 32, 4)
    assert sglang[f"{experts}.down_proj.lora_A.weight"].shape == (8, 4, 32)
    assert sglang[f"{experts}.down_proj.lora_B.weight"].shape == (1, 64, 4)
    flat = tensors(outs["peft-target-parameters"])
    assert flat[f"{experts}.base_layer.lora_A.weight"].shape == (8 * 4, 64)
    assert flat[f"{experts}.lora_B.weight"].shape == (64, 4 * 8)
    torch.testing.assert_close(
        vllm[f"{experts}.3.up_proj.lora_B.weight"], sglang[f"{experts}.up_proj.lora_B.weight"][3]
    )

"""What published folders say of their quantisation, as it stands in their files: which layers are in which format."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from packed_folders import write_packed
from quant_models import make
from safetensors.torch import load_file, save_file

from bridge_core import AutoBridge, import_ckpt, verify
from bridge_core.errors import BridgeError
from bridge_quant_export.cli import main
from bridge_quant_export.configs.reading import completed, read_claims
from bridge_quant_export.folders.open import open_quantized
from bridge_quant_export.folders.verify import verify_quantized

PUBLISHED = {file.stem: json.loads(file.read_text()) for file in (Path(__file__).parent / "published").glob("*.json")}
MODELS = Path(__file__).parents[2] / "bridge-core" / "tests" / "published"


def said_of(name):
    """`quantization_config` as bridge-core has it for a published folder."""
    inline, beside = PUBLISHED[name]["quantization_config"], PUBLISHED[name]["hf_quant_config"]
    return inline if beside is None else completed(inline, beside, where=name)


# --- At size, from configurations alone ---------------------------------------------------------

EXPERT = r"mlp\.experts\.\d+\.(gate|up|down)_proj"
DENSE = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
CASES = [
    ("llama-3.1-8b", "llama-3.1-70b-fp8", DENSE, 32 * 7),
    ("qwen3-235b-a22b", "qwen3-235b-a22b-nvfp4", rf"(self_attn\.[qkvo]_proj|{EXPERT})", 94 * (4 + 128 * 3)),
    (
        "deepseek-v3",
        "deepseek-v3.1-nvfp4",
        rf"layers\.([0-9]|[1-5][0-9]|60)\.(self_attn\.o_proj|{EXPERT}|mlp\.(shared_experts\.)?(gate|up|down)_proj)",
        61 + 3 * 3 + 58 * (256 + 1) * 3,
    ),
]


@pytest.mark.parametrize(("model", "name", "pattern", "count"), CASES, ids=[case[1] for case in CASES])
def test_the_layers_of_a_model_that_are_quantised(model, name, pattern, count):
    config = json.loads((MODELS / f"{model}.json").read_text())
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    plan = AutoBridge.from_hf_config(config | {"quantization_config": said_of(name)}).plan()
    quantised = plan.quantised
    expected = {key for key in plan.hf_tensors if re.search(rf"{pattern}\.weight$", key)}
    assert quantised == expected
    assert len(quantised) == count


def test_mamba_layers_that_are_excluded_one_by_one():
    name = "nemotron-3-nano-30b-a3b-nvfp4"
    config = json.loads((MODELS / "nemotron-3-nano-30b-a3b.json").read_text())
    quantised = AutoBridge.from_hf_config(config | {"quantization_config": said_of(name)}).plan().quantised
    excluded = PUBLISHED[name]["hf_quant_config"]["quantization"]["exclude_modules"]
    mixers = Counter(re.sub(r"\d+", "#", key) for key in quantised)
    left = Counter(re.sub(r"\d+", "#", key) for key in excluded)
    pattern = config["hybrid_override_pattern"]
    for which in ("in_proj", "out_proj"):
        at = f"backbone.layers.#.mixer.{which}"
        assert 0 < mixers[f"{at}.weight"] == pattern.count("M") - left[at] < pattern.count("M")
    experts = pattern.count("E") * config["n_routed_experts"]
    assert mixers["backbone.layers.#.mixer.experts.#.up_proj.weight"] == experts
    assert not any("gate" in key or "embeddings" in key or "q_proj" in key for key in quantised)


LAYER = "model.language_model.layers.3"
BY_NAME = {
    "qwen3.5-122b-a10b-nvfp4": {
        f"{LAYER}.mlp.experts.17.up_proj": "nvfp4",
        f"{LAYER}.mlp.shared_expert.up_proj": None,
        f"{LAYER}.mlp.gate": None,
        f"{LAYER}.self_attn.q_proj": None,
        "model.language_model.layers.0.linear_attn.in_proj_qkv": None,
        "model.visual.blocks.3.attn.qkv": None,
        "mtp.layers.0.mlp.experts.3.up_proj": None,
        "lm_head": None,
    },
    "qwen3.6-35b-a3b-nvfp4": {
        f"{LAYER}.mlp.experts.17.up_proj": "w4a16_nvfp4",
        f"{LAYER}.mlp.experts": "w4a16_nvfp4",
        f"{LAYER}.mlp.shared_expert.up_proj": "w4a16_nvfp4",
        f"{LAYER}.mlp.gate": None,
        f"{LAYER}.self_attn.q_proj": "fp8",
        "model.language_model.layers.0.linear_attn.in_proj_qkv": "fp8",
        "model.language_model.layers.0.linear_attn.in_proj_a": None,
        "mtp.layers.0.mlp.experts.3.up_proj": None,
        "lm_head": "w4a16_nvfp4",
        "model.language_model.embed_tokens": None,
    },
    "qwen3-32b-fp8-static": {"model.layers.0.mlp.up_proj": "fp8", "lm_head": None, "model.embed_tokens": None},
    "kimi-k2.5-int4": {
        "language_model.model.layers.3.mlp.experts.17.up_proj": "int4",
        "language_model.model.layers.0.mlp.up_proj": None,
        "language_model.model.layers.3.mlp.shared_experts.up_proj": None,
        "language_model.model.layers.3.self_attn.o_proj": None,
        "lm_head": None,
    },
}


@pytest.mark.parametrize("name", BY_NAME)
def test_layers_by_name(name):
    claims = read_claims(said_of(name), weights_only=True)
    found = {module: claims.format_of(module) for module in BY_NAME[name]}
    assert {module: format and format.name for module, format in found.items()} == BY_NAME[name]
    if name == "kimi-k2.5-int4":
        assert claims.format_of("language_model.model.layers.3.mlp.experts.17.up_proj").group_size == 32


def test_kv_caches_that_are_promised():
    promised = {name: read_claims(said_of(name), weights_only=True).fp8_kv_cache for name in PUBLISHED}
    # One of the two files of Qwen3.6 is silent: what is read is config.json.
    assert promised == dict.fromkeys(PUBLISHED, True) | {"kimi-k2.5-int4": False, "qwen3.6-35b-a3b-nvfp4": False}


# --- Small folders that say what a published one says ----------------------------------------------


def as_published(folder, name):
    """Let a packed folder say of itself what a published one says."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    if PUBLISHED[name]["quantization_config"] is not None:
        config["quantization_config"] = PUBLISHED[name]["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    if PUBLISHED[name]["hf_quant_config"] is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(PUBLISHED[name]["hf_quant_config"]))
    return folder


@pytest.mark.parametrize(
    ("model", "kind", "name"),
    [
        ("qwen3", "fp8", "llama-3.1-70b-fp8"),
        ("qwen3", "fp8", "qwen3-32b-fp8-static"),
        ("qwen3_moe", "nvfp4", "qwen3-235b-a22b-nvfp4"),
    ],
)
def test_folders_are_imported_and_described(tmp_path, capsys, model, kind, name):
    plain = make(model, tmp_path / "hf", num_hidden_layers=2)
    packed, read = write_packed(plain, tmp_path, lambda module: kind, "modelopt", kv=True)
    tensors = load_file(packed / "model.safetensors")
    tensors |= {key.replace("layers.0", "layers.1"): value + 1 for key, value in tensors.items() if "k_scale" in key}
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    as_published(packed, name)
    report = import_ckpt(packed, tmp_path / "megatron")
    assert any("k_scale" in key for key in report.ignored)
    verify(tmp_path / "megatron", read).raise_if_different()
    assert AutoBridge.from_hf_pretrained(packed).plan().quantised == {
        key for key in load_file(read / "model.safetensors") if re.search(r"_proj\.weight$", key)
    }
    assert open_quantized(packed).wrong == ()
    # Every layer was packed with a range of its own here; of NVFP4 that is told.
    assert all("engines fuse" in line for line in verify_quantized(packed, plain).wrong)
    assert main(["inspect", str(packed)]) == 0
    assert main(["retag", str(packed), str(tmp_path / "other"), "--to", "compressed-tensors"]) == 0
    assert not (tmp_path / "other" / "hf_quant_config.json").exists()
    verify(tmp_path / "other", read).raise_if_different()
    assert capsys.readouterr().err == ""


CONTRADICTIONS = {
    "another algorithm": (lambda said, beside: beside["quantization"].update(quant_algo="FP8"), "different things"),
    "a layer more is excluded": (
        lambda said, beside: beside["quantization"]["exclude_modules"].append("model.layers.0.mlp*"),
        "model.layers.0.mlp*",
    ),
    "another method": (lambda said, beside: said.update(quant_method="compressed-tensors"), "different methods"),
    "no object": (lambda said, beside: beside.update(quantization="NVFP4"), "does not say how"),
    "an unknown algorithm, alone": (
        lambda said, beside: (said.clear(), beside["quantization"].update(quant_algo="NVFP4_SVD")),
        "no format here has this algorithm",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_contradict_each_other_are_refused(tmp_path, capsys, case):
    change, words = CONTRADICTIONS[case]
    plain = make("qwen3", tmp_path / "hf", num_hidden_layers=1)
    packed, _ = write_packed(plain, tmp_path, lambda module: "nvfp4", "modelopt")
    config = json.loads((packed / "config.json").read_text())
    beside = json.loads((packed / "hf_quant_config.json").read_text())
    change(config["quantization_config"], beside)
    config = {key: value for key, value in config.items() if value != {}}
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "hf_quant_config.json").write_text(json.dumps(beside))
    for read in (lambda: import_ckpt(packed, tmp_path / "megatron"), lambda: AutoBridge.from_hf_pretrained(packed)):
        with pytest.raises(BridgeError) as caught:
            read()
        assert words in str(caught.value)
    assert not (tmp_path / "megatron").exists()
    assert main(["inspect", str(packed)]) == 1
    assert words in capsys.readouterr().err


def test_a_file_that_says_that_nothing_is_quantised(tmp_path):
    plain = make("qwen3", tmp_path / "hf", num_hidden_layers=1)
    beside = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": {"quant_algo": None}}
    (plain / "hf_quant_config.json").write_text(json.dumps(beside))
    import_ckpt(plain, tmp_path / "megatron")
    verify(tmp_path / "megatron", plain).raise_if_different()

"""Plans of published models, from 0.6 B to 685 B parameters: config.json alone, against what their files hold."""

from __future__ import annotations

import dataclasses
import hashlib
from math import prod

import pytest
from inventory import PUBLISHED, SCALE, inventory, is_mtp, is_scale, main_model, settings_of

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.dtypes import dtype_of
from bridge_core.families.family import CARRIED

torch = pytest.importorskip("torch", reason="the oracle is transformers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

# Families that are not there yet; their models are planned as soon as they are.
AWAITED = {
    "DeepseekV3ForCausalLM",
    "NemotronHForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
}

# Published numbers of tensors, of elements and of bytes, where known; published/README.md says from where.
TOTALS = {
    "deepseek-v3": (91_991, 684_531_386_000, None),
    "llama-3.1-8b": (291, 8_030_261_248, None),
    "mixtral-8x7b": (995, 46_702_792_704, None),
    "moonlight-16b-a3b": (None, 15_960_111_936 - 27 * 64, None),  # less the buffers of 27 rotary embeddings
    "nemotron-3-nano-30b-a3b": (6_243, 31_577_940_288, None),
    "nemotron-3-super-120b-a12b": (None, 123_611_033_088, None),
    "qwen2.5-7b-instruct": (339, 7_615_616_512, None),
    "qwen3-0.6b": (311 - 1, 751_632_384 - 151_936 * 1024, None),  # less the copy of the tied embedding
    "qwen3-235b-a22b": (None, 235_093_634_560, None),
    "qwen3-30b-a3b": (None, 30_532_122_624, None),
    "qwen3-next-80b-a3b-instruct": (None, 81_324_862_720, None),
    "qwen3-vl-235b-a22b-instruct": (1_388, 235_670_022_896, None),
    "qwen3-vl-30b-a3b-instruct": (882, 31_070_754_032, None),
    "qwen3-vl-8b-instruct": (750, 8_767_123_696, None),
    "qwen3.5-122b-a10b": (1_949, 125_086_497_008, 250_173_007_840),
    "qwen3.5-27b": (1_184 + 15, 27_781_427_952, 55_562_872_800),
    "qwen3.5-35b-a3b": (1_811, 35_951_822_704, 71_903_655_008),
    "qwen3.5-397b-a17b": (2_924, 403_397_928_944, 806_795_875_168),
}

# SHA-256 (the first 16 hexadecimal digits) of the sorted lines "name dtype shape" of the published files' headers.
HEADERS = {
    "qwen3.5-122b-a10b": "b3606f4a0c6359c8",
    "qwen3.5-27b": "8e5bcbe635e8f8d4",
    "qwen3.5-35b-a3b": "fb3f263e6eb7e849",
    "qwen3.5-397b-a17b": "c8c1b9e1f806c758",
}

_BOTH_ENDS = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}

# Per model: tensor-parallel; with an (interleaved) pipeline; with experts, or with context, spread as well.
LAYOUTS = {
    "deepseek-v3": (
        {"tp": 8},
        {"tp": 4, "pp": 8, "num_layers_in_first_pipeline_stage": 7, "num_layers_in_last_pipeline_stage": 6},
        {"tp": 8, "pp": 4, "ep": 64, "etp": 1, "num_layers_in_last_pipeline_stage": 13},
    ),
    "llama-3.1-8b": ({"tp": 8}, {"tp": 4, "pp": 4, "vpp": 2}, {"tp": 2, "pp": 2, "cp": 2}),
    "mixtral-8x7b": ({"tp": 8}, {"tp": 4, "pp": 4, "vpp": 2}, {"tp": 2, "pp": 2, "ep": 8, "etp": 1}),
    "moonlight-16b-a3b": ({"tp": 4}, {"tp": 2, "pp": 3, "vpp": 3}, {"tp": 4, "pp": 3, "ep": 16, "etp": 1}),
    "nemotron-3-nano-30b-a3b": ({"tp": 2}, {"tp": 2, "pp": 4}, {"tp": 2, "pp": 2, "ep": 16, "etp": 1}),
    "nemotron-3-super-120b-a12b": ({"tp": 2}, {"tp": 2, "pp": 8}, {"tp": 2, "pp": 4, "ep": 64, "etp": 1}),
    "qwen2.5-7b-instruct": ({"tp": 4}, {"tp": 2, "pp": 2, "vpp": 7}, {"tp": 2, "pp": 4, "cp": 2}),
    "qwen3-0.6b": ({"tp": 8}, {"tp": 2, "pp": 2, "vpp": 2}, {"tp": 2, "pp": 4, "cp": 2}),
    "qwen3-235b-a22b": (
        {"tp": 4},
        {"tp": 4, "pp": 4, "vpp": 2, **_BOTH_ENDS},
        {"tp": 4, "pp": 4, "ep": 8, **_BOTH_ENDS},
    ),
    "qwen3-30b-a3b": ({"tp": 4}, {"tp": 2, "pp": 4, "vpp": 3}, {"tp": 2, "pp": 2, "ep": 8, "etp": 1}),
    "qwen3-next-80b-a3b-instruct": ({"tp": 2}, {"tp": 2, "pp": 4, "vpp": 3}, {"tp": 2, "pp": 2, "ep": 16, "etp": 1}),
    "qwen3-vl-235b-a22b-instruct": (
        {"tp": 4},
        {"tp": 4, "pp": 4, "vpp": 2, **_BOTH_ENDS},
        {"tp": 4, "pp": 4, "ep": 8, **_BOTH_ENDS},
    ),
    "qwen3-vl-30b-a3b-instruct": ({"tp": 4}, {"tp": 2, "pp": 4, "vpp": 3}, {"tp": 2, "pp": 2, "ep": 8, "etp": 1}),
    "qwen3-vl-8b-instruct": ({"tp": 8}, {"tp": 2, "pp": 3, "vpp": 3}, {"tp": 2, "pp": 2, "cp": 2}),
    "qwen3.5-0.8b-base": ({"tp": 2}, {"tp": 2, "pp": 2, "vpp": 3}, {"tp": 2, "pp": 3, "cp": 2}),
    "qwen3.5-122b-a10b": ({"tp": 2}, {"tp": 2, "pp": 4, "vpp": 3}, {"tp": 2, "pp": 4, "ep": 32, "etp": 1}),
    "qwen3.5-27b": ({"tp": 4}, {"tp": 4, "pp": 4, "vpp": 2}, {"tp": 2, "pp": 8, "cp": 2}),
    "qwen3.5-35b-a3b": ({"tp": 2}, {"tp": 2, "pp": 2, "vpp": 5}, {"tp": 2, "pp": 2, "ep": 16, "etp": 1}),
    "qwen3.5-397b-a17b": ({"tp": 2}, {"tp": 2, "pp": 4, "vpp": 5}, {"tp": 2, "pp": 4, "ep": 64, "etp": 1}),
}


def _unless_awaited(name):
    architecture = PUBLISHED[name]["architectures"][0]
    awaited = pytest.mark.skipif(architecture in AWAITED, reason=f"the family of {architecture} is awaited")
    return pytest.param(name, marks=awaited)


PLANNED = [_unless_awaited(name) for name in PUBLISHED]


# --- The oracle itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOTALS)
def test_the_inventory_has_the_published_totals(name):
    found = inventory(PUBLISHED[name])
    tensors, elements, size = TOTALS[name]
    assert tensors in (None, len(found))
    assert sum(prod(shape) for shape, _ in found.values()) == elements
    assert size in (None, sum(prod(shape) * dtype_of(dtype).itemsize for shape, dtype in found.values()))


@pytest.mark.parametrize("name", HEADERS)
def test_the_inventory_is_what_the_published_headers_say(name):
    lines = sorted(f"{key} {dtype} {list(shape)}" for key, (shape, dtype) in inventory(PUBLISHED[name]).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == HEADERS[name]


def test_predicates_split_an_inventory():
    config = PUBLISHED["qwen3.5-27b"]
    assert sum(not is_mtp(name, config) for name in inventory(config)) == 1184 == len(main_model(config))
    config = PUBLISHED["deepseek-v3"]
    found = inventory(config)
    quantised = [name.removesuffix(".weight") + SCALE for name, (_, dtype) in found.items() if dtype == "F8_E4M3"]
    assert sorted(quantised) == sorted(filter(is_scale, found))
    layer = "model.layers.61."
    assert found[layer + "self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (
        (5, 56),
        "F32",
    )  # 576 rows: a partial block
    assert found[layer + "eh_proj.weight"] == ((7168, 14336), "BF16")
    assert {name for name in found if is_mtp(name, config)} == {name for name in found if name.startswith(layer)}


# --- Plans ------------------------------------------------------------------------------------------


def test_awaited_families_are_not_there_yet():
    here = AWAITED & set(AutoBridge.list_supported_models())
    assert not here, f"{here}: take them from AWAITED, so that their published models are planned"


@pytest.mark.parametrize("layout", [0, 1, 2], ids=["tp", "pp", "ep-or-cp"])
@pytest.mark.parametrize("name", PLANNED)
def test_a_published_model_is_planned_tensor_by_tensor(name, layout):
    config = PUBLISHED[name]
    shapes = {key: shape for key, (shape, _) in inventory(config).items()}
    found = AutoBridge.from_hf_config(config).plan(ParallelLayout(**LAYOUTS[name][layout])).audit(shapes)
    assert found.hf_tensors == len(shapes)
    assert found.elements == sum(map(prod, shapes.values()))
    assert not found.ignored


@pytest.mark.parametrize("name", PLANNED)
def test_a_published_configuration_comes_back(name):
    config = PUBLISHED[name]
    bridge = AutoBridge.from_hf_config(config)
    rebuilt = bridge.family.to_hf(bridge.fields)
    assert rebuilt["architectures"] == config["architectures"]
    assert bridge.family.to_megatron(rebuilt) == bridge.fields
    assert _settings(rebuilt) == _settings(config)


def _settings(config):
    """What transformers makes of a configuration, but for what families carry along without translating."""
    return _declared(settings_of(config))


def _declared(settings):
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if values.get("head_dim", ...) is None:  # some configurations leave it to be derived
        values["head_dim"] = settings.hidden_size // settings.num_attention_heads
    return {
        name: _declared(value) if isinstance(value, transformers.PreTrainedConfig) else value
        for name, value in values.items()
        if name not in CARRIED
    }


def test_a_tied_model_that_was_saved_with_its_head():
    config = PUBLISHED["qwen3-0.6b"]  # as published: 311 tensors
    shapes = {key: shape for key, (shape, _) in inventory(config).items()} | {"lm_head.weight": (151_936, 1024)}
    AutoBridge.from_hf_config(config).plan(ParallelLayout(tp=2, pp=2)).audit(shapes)

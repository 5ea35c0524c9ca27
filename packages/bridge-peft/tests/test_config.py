"""Settings of an adapter: what is accepted, what is refused, and what they mean for a module."""

import subprocess
import sys

import pytest

from bridge_core.errors import ConfigError
from bridge_peft import LoraConfig
from bridge_peft.config import pattern_key
from bridge_peft.dtypes import lora_dtype_name
from bridge_peft.targets import check_used, match

NAMES = {
    f"decoder.layers.{layer}.{name}": parts
    for layer in range(12)
    for name, parts in {
        "self_attention.linear_qkv": ("q", "k", "v"),
        "self_attention.linear_proj": (),
        "mlp.linear_fc1": ("gate", "up"),
        "mlp.linear_fc2": (),
    }.items()
} | {"output_layer": ()}


def test_importing_needs_neither_torch_nor_megatron():
    heavy = ("torch", "megatron", "peft", "modelopt", "transformers")
    code = (
        "import sys, bridge_peft, bridge_peft.config, bridge_peft.placement, bridge_peft.targets\n"
        f"bridge_peft.LoraConfig()\nprint([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("bf16", "bf16"),
        ("bfloat16", "bf16"),
        ("torch.bfloat16", "bf16"),
        ("FP16", "fp16"),
        ("half", "fp16"),
        ("float16", "fp16"),
        ("fp32", "fp32"),
        ("float", "fp32"),
        ("torch.float32", "fp32"),
        (None, None),
    ],
)
def test_dtypes_are_normalised(given, name):
    assert lora_dtype_name(given) == name
    assert LoraConfig(lora_dtype=given).lora_dtype == name


def test_a_torch_dtype_is_a_dtype_too():
    torch = pytest.importorskip("torch")
    assert LoraConfig(lora_dtype=torch.bfloat16).lora_dtype == "bf16"
    with pytest.raises(ConfigError, match="bf16, bfloat16, fp16"):
        LoraConfig(lora_dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_dtype": "fp8"}, ["bf16, bfloat16, fp16, float16, half, fp32, float32, float", "'fp8'"]),
        ({"lora_dtype": 16}, ["16"]),
        ({"r": 0}, ["rank", "r", "0"]),
        ({"r": True}, ["rank", "True"]),
        ({"rank_pattern": {"linear_fc1": -1}}, ["rank_pattern['linear_fc1']", "-1"]),
        ({"rank_pattern": {"linear_(": 4}}, ["regular expression", "linear_("]),
        ({"lora_dropout": 1.0}, ["lora_dropout", "1.0"]),
        ({"lora_init_method": "gaussian"}, ["kaiming_zeros, svdquant", "'gaussian'"]),
        ({"variant": "dora"}, ["lora, canonical", "'dora'"]),
        ({"expert_adapters": "outer"}, ["each, shared, shared_outer", "'outer'"]),
        ({"bias": "all"}, ["only adapters are trained", "'all'"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "lm_head"]),
        ({"target_modules": []}, ["nothing to adapt"]),
        ({"use_dora": True, "expert_adapters": "shared"}, ["share", "use_dora"]),
        ({"lora_init_method": "svdquant", "expert_adapters": "shared_outer"}, ["share", "svdquant"]),
        ({"lora_init_method": "svdquant", "variant": "canonical"}, ["decomposition", "svdquant"]),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**options)
    for fact in ("what", "where", "expected", "got", "fix"):
        assert getattr(caught.value, fact) is not None, fact
    for word in words:
        assert word in str(caught.value)


def test_ranks_and_scalings_follow_patterns():
    config = LoraConfig(
        r=8, lora_alpha=16, rank_pattern={r"layers\.3\..*linear_fc1": 2}, alpha_pattern={"linear_fc1": 6}
    )
    assert config.rank("decoder.layers.3.mlp.linear_fc1") == 2
    assert config.scaling("decoder.layers.3.mlp.linear_fc1") == 3
    assert config.rank("decoder.layers.13.mlp.linear_fc1") == 8
    assert config.scaling("decoder.layers.13.mlp.linear_fc1") == 0.75
    assert config.scaling("decoder.layers.3.mlp.linear_fc2") == 2
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling("x") == 2


@pytest.mark.parametrize("pattern", ["linear_fc1", r"layers\.1\..*", "fc1", r".*\.1\.mlp\.linear_fc1"])
@pytest.mark.parametrize("name", ["decoder.layers.1.mlp.linear_fc1", "decoder.layers.11.mlp.linear_fc1", "linear_fc1"])
def test_patterns_fit_as_in_peft(pattern, name):
    peft = pytest.importorskip("peft.utils.other")
    found = peft.get_pattern_key([pattern], name)
    assert pattern_key({pattern: 1}, name) == (pattern if found == pattern else None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 48),
        ({"target_modules": ["linear_qkv"]}, 12),
        ({"target_modules": ["layers.1.mlp.linear_fc1"]}, 1),
        ({"target_modules": ["*.layers.1.*"]}, 4),
        ({"target_modules": ["*.layers.1?.*.linear_fc?"]}, 4),
        ({"target_modules": r"decoder\.layers\.[0-3]\.mlp\..*"}, 8),
        ({"target_modules": ["output_layer", "linear_proj"]}, 13),
        ({"exclude_modules": ["linear_fc1", "*.layers.0.*"]}, 33),
        ({"layers_to_transform": 3}, 4),
        ({"layers_to_transform": [0, 11]}, 8),
        ({"variant": "canonical", "target_modules": ["k_proj", "linear_v", "linear_fc2"]}, 24),
    ],
)
def test_targets(options, expected):
    config = LoraConfig(**options)
    found = match(config, NAMES)
    assert len(found.parts) == expected
    check_used(config, found.used, NAMES)


def test_parts_of_fused_layers():
    config = LoraConfig(variant="canonical", target_modules=["v_proj", "linear_k", "layers.0.mlp.gate_proj"])
    found = match(config, NAMES).parts
    assert found["decoder.layers.5.self_attention.linear_qkv"] == ("k", "v")
    assert found["decoder.layers.0.mlp.linear_fc1"] == ("gate",)
    assert "decoder.layers.1.mlp.linear_fc1" not in found
    assert match(LoraConfig(), NAMES).parts["decoder.layers.0.mlp.linear_fc1"] == ()

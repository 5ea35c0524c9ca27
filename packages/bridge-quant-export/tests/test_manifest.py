"""What an export will write, by arithmetic: at sizes that no machine here holds."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from bridge_core import AutoBridge, ParallelLayout
from bridge_quant_export.configs import modelopt
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.manifest import Instance, hf_instances, make_manifest, quantisable

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 8192,
    "intermediate_size": 16384,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 108,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def formats_of(plan, name):
    """Every linear layer but router and head in one format."""
    left = ("router", "output_layer")
    entries = [e for e in plan.entries if quantisable(e) and not any(word in e.name for word in left)]
    return {Instance(e.name, *where): format_of(name) for e in entries for where in e.instances()}


def dtypes_of(plan):
    return dict.fromkeys(plan.hf_tensors, "BF16")


def test_every_expert_of_a_large_model_is_there_exactly_once():
    layout = ParallelLayout(tp=1, pp=9, ep=8, dp=8)
    bridge = AutoBridge.from_hf_config(CONFIG)
    started = time.perf_counter()
    plan = bridge.plan(layout)
    formats = formats_of(plan, "nvfp4")
    found = make_manifest(plan, formats, writer="modelopt", dtypes=dtypes_of(plan))
    seconds = time.perf_counter() - started
    for layer in (0, 57, 107):
        for expert in range(512):
            for which, shape in (("gate", (2048, 8192)), ("up", (2048, 8192)), ("down", (8192, 2048))):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{which}_proj"
                assert found.shapes[f"{module}.weight"] == (shape[0], shape[1] // 2)
                assert found.shapes[f"{module}.weight_scale"] == (shape[0], shape[1] // 16)
                assert found.dtypes[f"{module}.input_scale"] == "F32"
    assert len(found.layers.quantized) == 108 * (512 * 3 + 4)
    # Ranks of one pipeline stage and replica hold different experts, all of them together.
    held = Counter(
        (shard.layer, shard.expert)
        for rank in range(8)
        for shard in plan.iter_local_shards(rank)
        if shard.entry.endswith("linear_fc1.weight{expert}")
    )
    assert held == Counter((layer, expert) for layer in range(12) for expert in range(512))
    inline, beside = modelopt.compose(found.layers, producer_version="0.47.0")
    assert inline["ignore"] == beside["quantization"]["exclude_modules"]
    assert "model.layers.107.mlp.gate" in inline["ignore"]
    assert len(inline["ignore"]) == 108 + 2
    assert seconds < 120


@pytest.mark.parametrize("writer", ["modelopt", "compressed-tensors"])
def test_the_manifest_is_that_of_every_layout(writer):
    small = CONFIG | {"num_hidden_layers": 4, "num_experts": 8}
    bridge = AutoBridge.from_hf_config(small)
    made = []
    for sizes in ({}, {"tp": 2, "pp": 2}, {"pp": 2, "ep": 4, "dp": 4}, {"tp": 4, "ep": 2, "etp": 2}):
        plan = bridge.plan(ParallelLayout(**sizes), make_vocab_size_divisible_by=128)
        found = make_manifest(plan, formats_of(plan, "fp8"), writer=writer, dtypes=dtypes_of(plan))
        made.append((list(found.shapes.items()), list(found.dtypes.items()), found.layers))
    assert all(other == made[0] for other in made)
    assert found.shapes["model.embed_tokens.weight"] == (151936, 8192)


def test_tensors_of_an_instance_are_named_once():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4}).plan()
    names = [name for _, name, _ in hf_instances(plan)]
    assert names == list(plan.hf_tensors)


def test_formats_that_nobody_reads_are_refused_before_anything_else():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4}).plan()
    with pytest.raises(FormatError, match="no reader takes INT4 in the modelopt format") as caught:
        make_manifest(plan, formats_of(plan, "int4"), writer="modelopt", dtypes=dtypes_of(plan))
    assert "compressed-tensors" in str(caught.value.fix)


def test_a_weight_that_no_block_fits_is_named():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 8200}).plan()
    with pytest.raises(FormatError, match="into blocks") as caught:
        make_manifest(plan, formats_of(plan, "nvfp4"), writer="modelopt", dtypes=dtypes_of(plan))
    assert "proj.weight" in str(caught.value.where)


def test_mixed_precision_names_each_layer():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4}).plan()
    formats = {
        instance: format_of("nvfp4" if "experts" in instance.entry else "fp8") for instance in formats_of(plan, "fp8")
    }
    found = make_manifest(plan, formats, writer="modelopt", dtypes=dtypes_of(plan))
    _, beside = modelopt.compose(found.layers, producer_version="0.47.0")
    layers = beside["quantization"]["quantized_layers"]
    assert layers["model.layers.1.mlp.experts.3.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert layers["model.layers.1.self_attn.q_proj"] == {"quant_algo": "FP8"}
    assert len(layers) == 2 * (4 + 4 * 3)

"""Qwen2 and Qwen2.5, dense: Llama with biases on q, k and v."""

from __future__ import annotations

from bridge_core.families._parts import (
    ATTENTION,
    DECODER_FIELDS,
    DENSE_MLP,
    EMBEDDING,
    QKV_BIAS,
    RMS_SWIGLU,
    ROPE_OPTIONS,
    WINDOW_OPTIONS,
    head,
    read_full_attention,
    read_rope,
    tied_head,
    write_rope,
)
from bridge_core.families.family import Family, Fields, Table


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    return {**EMBEDDING, **ATTENTION, **QKV_BIAS, **DENSE_MLP, **head(fields)}


def recognises(fields: Fields) -> bool:
    """A dense decoder with biases on q, k and v."""
    return bool(fields.get("add_qkv_bias")) and not (fields.get("num_moe_experts") or fields.get("qk_layernorm"))


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    fields=DECODER_FIELDS,
    fixed={"hidden_act": "silu"},
    megatron={**RMS_SWIGLU, "add_qkv_bias": True, "qk_layernorm": False},
    reads=(read_rope, read_full_attention),
    writes=(write_rope, lambda fields: {"use_sliding_window": False}),
    handled=ROPE_OPTIONS | WINDOW_OPTIONS,
    table=table,
    copies=tied_head,
    recognises=recognises,
)

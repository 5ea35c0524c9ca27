"""Qwen3, dense: Llama with a norm on every query and key head."""

from __future__ import annotations

from bridge_core.families._parts import (
    ATTENTION,
    DECODER_FIELDS,
    DENSE_MLP,
    EMBEDDING,
    QK_NORM,
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
    return {**EMBEDDING, **ATTENTION, **QK_NORM, **DENSE_MLP, **head(fields)}


def recognises(fields: Fields) -> bool:
    """A dense decoder with norms on q and k."""
    others = ("num_moe_experts", "add_qkv_bias", "vision_num_layers")
    return bool(fields.get("qk_layernorm")) and not any(fields.get(name) for name in others)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    fields=DECODER_FIELDS,
    fixed={"hidden_act": "silu", "attention_bias": False},
    megatron={**RMS_SWIGLU, "add_qkv_bias": False, "qk_layernorm": True},
    reads=(read_rope, read_full_attention),
    writes=(write_rope, lambda fields: {"use_sliding_window": False}),
    handled=ROPE_OPTIONS | WINDOW_OPTIONS,
    table=table,
    copies=tied_head,
    recognises=recognises,
)

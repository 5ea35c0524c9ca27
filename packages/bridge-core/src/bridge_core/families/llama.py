"""Llama 2 and 3.x: the plain decoder. Tied (3.2 1B, 3B) and untied heads, llama3 rope scaling."""

from __future__ import annotations

from bridge_core.families._parts import (
    ATTENTION,
    DECODER_FIELDS,
    DENSE_MLP,
    EMBEDDING,
    RMS_SWIGLU,
    ROPE_OPTIONS,
    head,
    read_rope,
    tied_head,
    write_rope,
)
from bridge_core.families.family import Config, Family, Fields, Table


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    return {**EMBEDDING, **ATTENTION, **DENSE_MLP, **head(fields)}


def read_old_rope(config: Config) -> Fields:
    """Llama 2's config.json predates `rope_theta`; its base is 10000 (transformers 4.31, `LlamaConfig`)."""
    return read_rope({"rope_theta": 10000.0, **config})


def recognises(fields: Fields) -> bool:
    """A dense decoder with neither q/k norms nor biases."""
    return not (fields.get("num_moe_experts") or fields.get("qk_layernorm") or fields.get("add_qkv_bias"))


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    fields=DECODER_FIELDS,
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    megatron={**RMS_SWIGLU, "add_qkv_bias": False, "qk_layernorm": False},
    reads=(read_old_rope,),
    writes=(write_rope,),
    handled=ROPE_OPTIONS,
    table=table,
    copies=tied_head,
    ignored={"model.layers.{layer}.self_attn.rotary_emb.inv_freq": "recomputed from rope_theta"},
    recognises=recognises,
)

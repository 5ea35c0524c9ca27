"""Mixtral: Llama attention, routed experts in every layer, named w1 (gate), w3 (up), w2 (down)."""

from __future__ import annotations

from bridge_core.families._parts import (
    ATTENTION,
    DECODER_FIELDS,
    EMBEDDING,
    MOE,
    RMS_SWIGLU,
    ROPE_OPTIONS,
    head,
    moe_mlp,
    read_rope,
    tied_head,
    write_rope,
)
from bridge_core.families.family import Family, Field, Fields, Table

EXPERTS = moe_mlp("block_sparse_moe", "{w1,w3}", "w2")


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    return {**EMBEDDING, **ATTENTION, **EXPERTS, **head(fields)}


def recognises(fields: Fields) -> bool:
    """Experts, without norms on q and k and without a shared expert."""
    other = fields.get("qk_layernorm") or fields.get("moe_shared_expert_intermediate_size")
    return bool(fields.get("num_moe_experts")) and not (other or fields.get("add_qkv_bias"))


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    fields=(
        *DECODER_FIELDS,
        Field("num_local_experts", "num_moe_experts", aliases=("num_experts",)),
        Field("num_experts_per_tok", "moe_router_topk"),
    ),
    fixed={"hidden_act": "silu", "sliding_window": None},
    megatron={
        **RMS_SWIGLU,
        **MOE,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "moe_layer_freq": 1,
        "moe_router_pre_softmax": False,
    },
    reads=(read_rope, lambda config: {"moe_ffn_hidden_size": config["intermediate_size"]}),
    writes=(write_rope,),
    handled=ROPE_OPTIONS,
    table=table,
    copies=tied_head,
    recognises=recognises,
)

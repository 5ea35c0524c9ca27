"""Qwen3-MoE: Qwen3 attention, routed experts in every layer (or, by option, in some)."""

from __future__ import annotations

from typing import Any

from bridge_core.families._parts import (
    ATTENTION,
    DECODER_FIELDS,
    DENSE_MLP,
    EMBEDDING,
    MOE,
    QK_NORM,
    RMS_SWIGLU,
    ROPE_OPTIONS,
    WINDOW_OPTIONS,
    head,
    moe_layers,
    moe_mlp,
    on_layers,
    read_full_attention,
    read_rope,
    tied_head,
    write_rope,
)
from bridge_core.families.family import Config, Family, Field, Fields, Table

EXPERTS = moe_mlp("mlp", "{gate,up}_proj", "down_proj")
EXPERT_FIELDS = (
    Field("num_experts", "num_moe_experts", aliases=("num_local_experts",)),
    Field("num_experts_per_tok", "moe_router_topk"),
    Field("moe_intermediate_size", "moe_ffn_hidden_size"),
)
EXPERT_OPTIONS = frozenset({"decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"})


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    sparse = [layer for layer, is_sparse in enumerate(moe_layers(fields)) if is_sparse]
    dense = [layer for layer, is_sparse in enumerate(moe_layers(fields)) if not is_sparse]
    mlp = {**on_layers(EXPERTS, sparse), **on_layers(DENSE_MLP, dense)}
    return {**EMBEDDING, **ATTENTION, **QK_NORM, **mlp, **head(fields)}


def read_moe(config: Config) -> Fields:
    """Which layers have experts, and whether the router's weights are normalised after top-k."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    sparse = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(config["num_hidden_layers"])]
    # Softmax over the chosen experts alone equals softmax over all, then dividing by the sum of the chosen.
    return {
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def write_moe(fields: Fields) -> dict[str, Any]:
    """The way back of `read_moe`."""
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_sparse in enumerate(moe_layers(fields)) if not is_sparse],
        "norm_topk_prob": not fields["moe_router_pre_softmax"],
        "use_sliding_window": False,
    }


def recognises(fields: Fields) -> bool:
    """Experts, norms on q and k, no shared expert, no vision tower."""
    shared = fields.get("moe_shared_expert_intermediate_size") or fields.get("vision_num_layers")
    return bool(fields.get("num_moe_experts") and fields.get("qk_layernorm")) and not shared


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    fields=(
        *DECODER_FIELDS,
        *EXPERT_FIELDS,
    ),
    fixed={"hidden_act": "silu", "attention_bias": False},
    megatron={**RMS_SWIGLU, **MOE, "add_qkv_bias": False, "qk_layernorm": True},
    reads=(read_rope, read_full_attention, read_moe),
    writes=(write_rope, write_moe),
    handled=ROPE_OPTIONS | WINDOW_OPTIONS | EXPERT_OPTIONS,
    table=table,
    copies=tied_head,
    recognises=recognises,
)

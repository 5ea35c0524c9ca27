"""Qwen3-Next: gated delta nets, gated attention in every fourth layer, routed experts and a shared one."""

from __future__ import annotations

from typing import Any

from bridge_core.families._gated_delta import (
    BLOCK,
    DELTA_FIELDS,
    HF_BLOCK,
    LAYER_OPTIONS,
    QKVZ_BY_HEAD,
    ROTARY_OPTIONS,
    SHARED_EXPERT,
    SPARSE_MEGATRON,
    delta_dims,
    delta_net,
    dense_mlp,
    experts,
    is_delta_net,
    language_table,
    read_layers,
    read_rotary,
    sparse_mlp,
    write_layers,
)
from bridge_core.families._parts import DECODER, DECODER_FIELDS, HF_LAYER, tied_head, write_rope
from bridge_core.families.family import Family, Fields, Table
from bridge_core.families.qwen3_moe import EXPERT_FIELDS, EXPERT_OPTIONS, read_moe, write_moe

DELTA = delta_net(QKVZ_BY_HEAD)
DENSE = dense_mlp(DECODER, HF_LAYER)
SPARSE = sparse_mlp(DECODER, HF_LAYER, *experts(HF_LAYER))
PREDICTION = sparse_mlp(BLOCK, HF_BLOCK, *experts(HF_BLOCK))


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    return language_table(fields, DELTA, dense=DENSE, sparse=SPARSE, prediction=PREDICTION)


def write_rotary(fields: Fields) -> dict[str, Any]:
    """The rotary options in the form of the published models, which transformers 4 reads too."""
    return write_rope(fields) | {"partial_rotary_factor": fields["rotary_percent"]}


def recognises(fields: Fields) -> bool:
    """Delta nets and experts, of a model that does not see."""
    sees = fields.get("mrope_section") or fields.get("vision_num_layers")
    return bool(is_delta_net(fields) and fields.get("num_moe_experts")) and not sees


FAMILY = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    model_type="qwen3_next",
    fields=(*DECODER_FIELDS, *DELTA_FIELDS, *EXPERT_FIELDS, SHARED_EXPERT),
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    megatron={**SPARSE_MEGATRON, "mtp_num_layers": 1},
    reads=(read_layers, read_rotary, read_moe),
    writes=(write_layers, write_rotary, write_moe),
    handled=LAYER_OPTIONS | ROTARY_OPTIONS | EXPERT_OPTIONS,
    table=table,
    dims=delta_dims,
    copies=tied_head,
    unsaid_mtp=True,
    recognises=recognises,
)

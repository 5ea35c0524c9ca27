"""The language model of Qwen3.5, dense: gated delta nets, and gated attention in every fourth layer."""

from __future__ import annotations

from bridge_core.families._gated_delta import (
    BLOCK,
    DELTA_FIELDS,
    HF_BLOCK,
    MEGATRON,
    QWEN3_5_DELTA,
    QWEN3_5_FIXED,
    QWEN3_5_OPTIONS,
    QWEN3_5_READS,
    QWEN3_5_WRITES,
    delta_dims,
    dense_mlp,
    is_delta_net,
    language_table,
    with_language_prefix,
)
from bridge_core.families._parts import DECODER, DECODER_FIELDS, HF_LAYER, tied_head
from bridge_core.families.family import Family, Fields, Table

DENSE = dense_mlp(DECODER, HF_LAYER)
PREDICTION = dense_mlp(BLOCK, HF_BLOCK)


def rows(fields: Fields) -> Table:
    """Mapping table of the language model below `model.`."""
    return language_table(fields, QWEN3_5_DELTA, dense=DENSE, sparse={}, prediction=PREDICTION)


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    return with_language_prefix(rows(fields))


def recognises(fields: Fields) -> bool:
    """Delta nets, no experts, no vision tower."""
    return is_delta_net(fields) and not (fields.get("num_moe_experts") or fields.get("vision_num_layers"))


FAMILY = Family(
    name="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    model_type="qwen3_5_text",
    fields=(*DECODER_FIELDS, *DELTA_FIELDS),
    fixed=QWEN3_5_FIXED,
    megatron=MEGATRON,
    reads=QWEN3_5_READS,
    writes=QWEN3_5_WRITES,
    handled=QWEN3_5_OPTIONS,
    table=table,
    dims=delta_dims,
    copies=tied_head,
    recognises=recognises,
)

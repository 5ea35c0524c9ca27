"""The language model of Qwen3.5 with experts: as the dense one, with routed experts and a shared one in every layer."""

from __future__ import annotations

from bridge_core.families._gated_delta import (
    BLOCK,
    DELTA_FIELDS,
    HF_BLOCK,
    QWEN3_5_DELTA,
    QWEN3_5_FIXED,
    QWEN3_5_OPTIONS,
    QWEN3_5_READS,
    QWEN3_5_WRITES,
    SHARED_EXPERT,
    SPARSE_MEGATRON,
    delta_dims,
    experts,
    is_delta_net,
    language_table,
    packed_experts,
    sparse_mlp,
    with_language_prefix,
)
from bridge_core.families._parts import DECODER, DECODER_FIELDS, HF_LAYER, tied_head
from bridge_core.families.family import Config, Family, Fields, Table
from bridge_core.families.qwen3_moe import EXPERT_FIELDS
from bridge_core.rules import Either

# Qwen3.5 was published with packed experts, but for those of the prediction layer; Qwen3.6 packs these too, and
# transformers writes all of them one by one.
EXPERTS = tuple(map(Either, packed_experts(HF_LAYER), experts(HF_LAYER)))
MTP_EXPERTS = tuple(map(Either, experts(HF_BLOCK), packed_experts(HF_BLOCK)))
SPARSE = sparse_mlp(DECODER, HF_LAYER, *EXPERTS)
PREDICTION = sparse_mlp(BLOCK, HF_BLOCK, *MTP_EXPERTS)


def rows(fields: Fields) -> Table:
    """Mapping table of the language model below `model.`."""
    return language_table(fields, QWEN3_5_DELTA, dense={}, sparse=SPARSE, prediction=PREDICTION)


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    return with_language_prefix(rows(fields))


def read_widths(config: Config) -> Fields:
    """megatron-core wants a width of dense layers, of which there are none; HF may say one, too."""
    return {"ffn_hidden_size": config["moe_intermediate_size"]}


def recognises(fields: Fields) -> bool:
    """Delta nets and experts, of a model that could see, without its vision tower."""
    sees = fields.get("mrope_section") and not fields.get("vision_num_layers")
    return bool(is_delta_net(fields) and fields.get("num_moe_experts") and sees)


FAMILY = Family(
    name="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    model_type="qwen3_5_moe_text",
    fields=(
        *(field for field in DECODER_FIELDS if field.hf != "intermediate_size"),
        *DELTA_FIELDS,
        *EXPERT_FIELDS,
        SHARED_EXPERT,
    ),
    fixed=QWEN3_5_FIXED,
    megatron={**SPARSE_MEGATRON, "moe_layer_freq": 1, "moe_router_pre_softmax": False},
    reads=(*QWEN3_5_READS, read_widths),
    writes=QWEN3_5_WRITES,
    handled=QWEN3_5_OPTIONS | {"intermediate_size"},
    table=table,
    dims=delta_dims,
    copies=tied_head,
    recognises=recognises,
)

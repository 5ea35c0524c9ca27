"""Qwen3.5, dense: gated delta nets, gated attention in every fourth layer, and a vision tower."""

from __future__ import annotations

from bridge_core.families import qwen3_5_text
from bridge_core.families._gated_delta import inside_of, is_delta_net
from bridge_core.families._parts import under
from bridge_core.families._vision import (
    IMAGES,
    MULTIMODAL,
    VISION,
    tied_language_head,
    vision_dims,
    vision_table,
)
from bridge_core.families.family import Family, Fields, Table

TEXT = qwen3_5_text.FAMILY


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    language = under(qwen3_5_text.rows(fields), "model.", "model.language_model.")
    return {**language, **vision_table(fields)}


def recognises(fields: Fields) -> bool:
    """Delta nets and a vision tower, no experts."""
    return bool(is_delta_net(fields) and fields.get("vision_num_layers")) and not fields.get("num_moe_experts")


FAMILY = Family(
    name="qwen3_5",
    architectures=("Qwen3_5ForConditionalGeneration",),
    model_type="qwen3_5",
    inside="text_config",
    sections={"": MULTIMODAL, "vision_config": VISION},
    fields=tuple(field for field in TEXT.fields if field.hf != "tie_word_embeddings"),
    fixed=TEXT.fixed,
    megatron={**TEXT.megatron, "position_embedding_type": "mrope"},
    reads=TEXT.reads,
    writes=(*TEXT.writes, inside_of, lambda fields: {"model_type": "qwen3_5_text"}),
    handled=TEXT.handled | {"tie_word_embeddings"},
    table=table,
    dims=lambda fields: {**TEXT.dims(fields), **vision_dims(fields)},
    copies=tied_language_head,
    towers=IMAGES,
    recognises=recognises,
)

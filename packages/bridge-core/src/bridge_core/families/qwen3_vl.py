"""Qwen3-VL: the Qwen3 decoder, dense, and a vision tower that also feeds early layers (deepstack)."""

from __future__ import annotations

from bridge_core.families._parts import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDING,
    QK_NORM,
    RMS_SWIGLU,
    ROPE_OPTIONS,
    WINDOW_OPTIONS,
    head,
    read_full_attention,
    read_mrope,
    under,
    write_mrope,
)
from bridge_core.families._vision import (
    IMAGES,
    MULTIMODAL,
    TEXT_FIELDS,
    VISION,
    tied_language_head,
    vision_dims,
    vision_table,
)
from bridge_core.families.family import Family, Fields, Table


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    language = {**EMBEDDING, **ATTENTION, **QK_NORM, **DENSE_MLP, **head(fields)}
    return {**under(language, "model.", "model.language_model."), **vision_table(fields)}


def recognises(fields: Fields) -> bool:
    """A dense decoder with norms on q and k, and a tower with deepstack."""
    return bool(fields.get("qk_layernorm") and fields.get("vision_deepstack_layers")) and not (
        fields.get("num_moe_experts")
    )


FAMILY = Family(
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    model_type="qwen3_vl",
    inside="text_config",
    sections={"": MULTIMODAL, "vision_config": VISION},
    fields=TEXT_FIELDS,
    fixed={"hidden_act": "silu", "attention_bias": False},
    megatron={**RMS_SWIGLU, "position_embedding_type": "mrope", "add_qkv_bias": False, "qk_layernorm": True},
    reads=(read_mrope, read_full_attention),
    writes=(write_mrope, lambda fields: {"model_type": "qwen3_vl_text"}),
    handled=ROPE_OPTIONS | WINDOW_OPTIONS | {"tie_word_embeddings"},
    table=table,
    dims=vision_dims,
    copies=tied_language_head,
    towers=IMAGES,
    recognises=recognises,
)

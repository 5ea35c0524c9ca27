"""Qwen3-VL-MoE: the Qwen3-MoE decoder and Qwen3-VL's vision tower; experts lie stacked and transposed on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bridge_core.families import qwen3_moe
from bridge_core.families._parts import (
    DECODER,
    HF_LAYER,
    MOE,
    RMS_SWIGLU,
    ROPE_OPTIONS,
    WINDOW_OPTIONS,
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
from bridge_core.families.family import Config, Family, Fields, Table
from bridge_core.rules import Either, Packed, Row, Transposed

GATE_UP = Packed(f"{HF_LAYER}.mlp.experts.gate_up_proj", [["moe_ffn", "moe_ffn"]], "hidden")
DOWN = Row(f"{HF_LAYER}.mlp.experts.down_proj", "hidden", "moe_ffn")
# Published [expert, in, out]; transformers 5 reads either and writes [expert, out, in].
STACKED: Table = {
    f"{DECODER}.mlp.experts.linear_fc1.weight{{expert}}": Either(Transposed(GATE_UP), GATE_UP),
    f"{DECODER}.mlp.experts.linear_fc2.weight{{expert}}": Either(Transposed(DOWN), DOWN),
}


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    language = dict(qwen3_moe.table(fields))
    for name, rule in STACKED.items():
        if name in language:
            language[name] = replace(rule, layers=language[name].layers)
    return {**under(language, "model.", "model.language_model."), **vision_table(fields)}


def read_moe(config: Config) -> Fields:
    """Which layers have experts."""
    return qwen3_moe.read_moe({**config, "norm_topk_prob": True})


def write_options(fields: Fields) -> dict[str, Any]:
    """Qwen3-MoE's options of the experts, without those of its attention."""
    written = qwen3_moe.write_moe(fields)
    del written["use_sliding_window"]
    return written | {"model_type": "qwen3_vl_moe_text"}


def recognises(fields: Fields) -> bool:
    """Experts, and a tower with deepstack."""
    return bool(fields.get("num_moe_experts") and fields.get("vision_deepstack_layers"))


FAMILY = Family(
    name="qwen3_vl_moe",
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    model_type="qwen3_vl_moe",
    inside="text_config",
    sections={"": MULTIMODAL, "vision_config": VISION},
    fields=(*TEXT_FIELDS, *qwen3_moe.EXPERT_FIELDS),
    # Its router always divides by the sum of the chosen (transformers 5.23, `Qwen3VLMoeTextTopKRouter`).
    fixed={"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": True},
    megatron={**RMS_SWIGLU, "position_embedding_type": "mrope", **MOE, "add_qkv_bias": False, "qk_layernorm": True},
    reads=(read_mrope, read_full_attention, read_moe),
    writes=(write_mrope, write_options),
    handled=ROPE_OPTIONS | WINDOW_OPTIONS | qwen3_moe.EXPERT_OPTIONS | {"tie_word_embeddings"},
    table=table,
    dims=vision_dims,
    copies=tied_language_head,
    towers=IMAGES,
    recognises=recognises,
)

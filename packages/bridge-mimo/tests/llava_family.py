"""LLaVA (a CLIP tower, a projector, a Llama) as a third party would add it: a family and the routes of its components.

The names are those that transformers 5.23 saves (models/llava/modeling_llava.py, models/clip/modeling_clip.py).
"""

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
    under,
    write_rope,
)
from bridge_core.families.family import Family, Field, Section, Tower
from bridge_core.rules import QKV, Column, Replicated, Row

TOWER, PROJECTOR = "vision_model.tower.", "vision_model.projector."
HF, HF_PROJECTOR = "vision_tower.", "multi_modal_projector."
LAYER, HF_LAYER = f"{TOWER}decoder.layers.{{layer}}.", f"{HF}encoder.layers.{{layer}}."


def _norm(megatron, hf):
    return {f"{megatron}{end}": Replicated(f"{hf}.{end}", "vision_hidden") for end in ("weight", "bias")}


def _linear(megatron, hf, rule, rows, columns):
    bias = Column if rule is Column else Replicated
    return {f"{megatron}.weight": rule(f"{hf}.weight", rows, columns), f"{megatron}.bias": bias(f"{hf}.bias", rows)}


def vision_table(fields):
    """Mapping table of the tower and the projector."""
    patch = ("vision_channels", "vision_patch", "vision_patch")
    return {
        f"{TOWER}class_token": Replicated(f"{HF}embeddings.class_embedding", "vision_hidden"),
        f"{TOWER}conv1.weight": Replicated(f"{HF}embeddings.patch_embedding.weight", "vision_hidden", *patch),
        f"{TOWER}position_embeddings.weight": Replicated(
            f"{HF}embeddings.position_embedding.weight", "vision_positions", "vision_hidden"
        ),
        **_norm(f"{TOWER}ln_pre.", f"{HF}pre_layrnorm"),
        **_norm(f"{TOWER}ln_post.", f"{HF}post_layernorm"),
        **_layers(fields["vision_num_layers"]),
        **_linear(f"{PROJECTOR}encoder.linear_fc1", f"{HF_PROJECTOR}linear_1", Column, "hidden", "vision_hidden"),
        **_linear(f"{PROJECTOR}encoder.linear_fc2", f"{HF_PROJECTOR}linear_2", Row, "hidden", "hidden"),
    }


def _layers(count):
    from bridge_core.families._parts import on_layers

    attention, mlp = f"{LAYER}self_attention.", f"{LAYER}mlp."
    qkv = f"{HF_LAYER}self_attn.{{q,k,v}}_proj."
    return on_layers(
        {
            **_norm(f"{attention}linear_qkv.layer_norm_", f"{HF_LAYER}layer_norm1"),
            f"{attention}linear_qkv.weight": QKV(f"{qkv}weight", "vision_hidden", of="vision_"),
            f"{attention}linear_qkv.bias": QKV(f"{qkv}bias", of="vision_"),
            **_linear(
                f"{attention}linear_proj", f"{HF_LAYER}self_attn.out_proj", Row, "vision_hidden", "vision_hidden"
            ),
            **_norm(f"{mlp}linear_fc1.layer_norm_", f"{HF_LAYER}layer_norm2"),
            **_linear(f"{mlp}linear_fc1", f"{HF_LAYER}mlp.fc1", Column, "vision_ffn", "vision_hidden"),
            **_linear(f"{mlp}linear_fc2", f"{HF_LAYER}mlp.fc2", Row, "vision_hidden", "vision_ffn"),
        },
        range(count),
    )


def vision_dims(fields):
    hidden, heads = fields["vision_hidden_size"], fields["vision_num_attention_heads"]
    return {
        "vision_hidden": hidden,
        "vision_heads": heads,
        "vision_groups": heads,
        "vision_head_dim": hidden // heads,
        "vision_ffn": fields["vision_ffn_hidden_size"],
        "vision_channels": fields["vision_in_channels"],
        "vision_patch": fields["vision_patch_size"],
        "vision_positions": (fields["vision_image_size"] // fields["vision_patch_size"]) ** 2 + 1,
    }


def tower_fields(fields):
    """Megatron fields of the tower's own layers."""
    heads = fields["vision_num_attention_heads"]
    return {
        "num_layers": fields["vision_num_layers"],
        "hidden_size": fields["vision_hidden_size"],
        "ffn_hidden_size": fields["vision_ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": fields["vision_hidden_size"] // heads,
    }


def table(fields):
    """Mapping table of the whole model."""
    language = under({**EMBEDDING, **ATTENTION, **DENSE_MLP}, "model.", "language_model.model.")
    return {**language, **under(head(fields), "", "language_model."), **vision_table(fields)}


VISION = Section(
    fields=(
        Field("num_hidden_layers", "vision_num_layers"),
        Field("hidden_size", "vision_hidden_size"),
        Field("num_attention_heads", "vision_num_attention_heads"),
        Field("intermediate_size", "vision_ffn_hidden_size"),
        Field("num_channels", "vision_in_channels"),
        Field("image_size", "vision_image_size"),
        Field("patch_size", "vision_patch_size"),
        Field("layer_norm_eps", "vision_layernorm_epsilon"),
        Field("hidden_act", "vision_activation"),
    ),
    handled=frozenset({"initializer_factor", "projection_dim"}),
)
TOP = Section(
    fields=(
        Field("image_token_index", "image_token_id", aliases=("image_token_id",)),
        Field("image_seq_length", "image_seq_length", 576),
        Field("vision_feature_layer", "vision_feature_layer", -2),
        Field("tie_word_embeddings", "share_embeddings_and_output_weights", False),
    ),
    fixed={
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": "default",
    },
)

FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    model_type="llava",
    inside="text_config",
    sections={"": TOP, "vision_config": VISION},
    fields=tuple(field for field in DECODER_FIELDS if field.hf != "tie_word_embeddings"),
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    megatron={**RMS_SWIGLU, "add_qkv_bias": False, "qk_layernorm": False},
    reads=(read_rope,),
    writes=(write_rope, lambda fields: {"model_type": "llama"}),
    handled=ROPE_OPTIONS | {"tie_word_embeddings"},
    table=table,
    dims=vision_dims,
    towers={
        "images": Tower(
            prefix=TOWER,
            key="clip",
            fields=tower_fields,
            # mcore's CLIP tower is one stage.
            holds=lambda name, stage, fields: stage.pre_process,
        )
    },
    recognises=lambda fields: "vision_image_size" in fields,
)


def register():
    """Make the family and the routes of its components known to this process."""
    from bridge_mimo.components import MIMOComponent, register_mimo_conversion_spec

    @register_mimo_conversion_spec(FAMILY)
    def routes(family, fields):
        return [
            MIMOComponent("language", "", "language_model"),
            MIMOComponent("images", TOWER, "modality_submodules.images.encoders.clip"),
            MIMOComponent("images", PROJECTOR, "modality_submodules.images.input_projections.0"),
        ]

    return routes


def tiny_model():
    """A real LLaVA with all weights distinct."""
    import transformers

    from bridge_core.testing.hf_models import COMMON, fill_distinct

    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=transformers.LlamaConfig(**COMMON).to_dict(),
        image_token_index=7,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    fill_distinct(model)
    return model.eval()

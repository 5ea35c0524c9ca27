"""The vision tower of Qwen3-VL and Qwen3.5: `model.visual.*` to `vision_model.*`, and `vision_config`.

A vision transformer over patches: learnt positions and a rotary embedding, layer norms and biases throughout,
one packed q/k/v, and mergers that make one language embedding of several patches. Its layers are those of
megatron-core's `TransformerBlock`; the rest has the names of its HF modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError
from bridge_core.families._parts import DECODER_FIELDS, on_layers
from bridge_core.families.family import Config, Copy, Field, Fields, Section, Table, Tower
from bridge_core.rules import Column, FusedQKV, Replicated, Row

if TYPE_CHECKING:
    from bridge_core.topology import PipelineStage

LAYER = "vision_model.decoder.layers.{layer}"
HF_BLOCK = "model.visual.blocks.{layer}"


def _biased(megatron: str, hf: str, rule: Any, rows: str, columns: str) -> Table:
    """A linear layer with its bias, which is cut as the rows are: whole where the columns are cut."""
    bias = Column if rule is Column else Replicated
    return {
        f"{megatron}.weight": rule(f"{hf}.weight", rows, columns),
        f"{megatron}.bias": bias(f"{hf}.bias", rows),
    }


def _norm(megatron: str, hf: str, size: str) -> Table:
    return {
        f"{megatron}weight": Replicated(f"{hf}.weight", size),
        f"{megatron}bias": Replicated(f"{hf}.bias", size),
    }


def _merger(megatron: str, hf: str, norm: str) -> Table:
    return {
        **_norm(f"{megatron}.norm.", f"{hf}.norm", norm),
        **_biased(f"{megatron}.linear_fc1", f"{hf}.linear_fc1", Column, "vision_merged", "vision_merged"),
        **_biased(f"{megatron}.linear_fc2", f"{hf}.linear_fc2", Row, "vision_out", "vision_merged"),
    }


BLOCK: Table = {
    **_norm(f"{LAYER}.self_attention.linear_qkv.layer_norm_", f"{HF_BLOCK}.norm1", "vision_hidden"),
    f"{LAYER}.self_attention.linear_qkv.weight": FusedQKV(f"{HF_BLOCK}.attn.qkv.weight", "vision_hidden", of="vision_"),
    f"{LAYER}.self_attention.linear_qkv.bias": FusedQKV(f"{HF_BLOCK}.attn.qkv.bias", of="vision_"),
    **_biased(f"{LAYER}.self_attention.linear_proj", f"{HF_BLOCK}.attn.proj", Row, "vision_hidden", "vision_hidden"),
    **_norm(f"{LAYER}.mlp.linear_fc1.layer_norm_", f"{HF_BLOCK}.norm2", "vision_hidden"),
    **_biased(f"{LAYER}.mlp.linear_fc1", f"{HF_BLOCK}.mlp.linear_fc1", Column, "vision_ffn", "vision_hidden"),
    **_biased(f"{LAYER}.mlp.linear_fc2", f"{HF_BLOCK}.mlp.linear_fc2", Row, "vision_hidden", "vision_ffn"),
}
ENDS: Table = {
    "vision_model.patch_embed.proj.weight": Replicated(
        "model.visual.patch_embed.proj.weight",
        *("vision_hidden", "vision_channels", "vision_frames", "vision_patch", "vision_patch"),
    ),
    "vision_model.patch_embed.proj.bias": Replicated("model.visual.patch_embed.proj.bias", "vision_hidden"),
    "vision_model.pos_embed.weight": Replicated("model.visual.pos_embed.weight", "vision_positions", "vision_hidden"),
    **_merger("vision_model.merger", "model.visual.merger", "vision_hidden"),
}


def vision_table(fields: Fields) -> Table:
    """Rows of the tower, with a merger for each of the layers that feed the language model early (deepstack)."""
    mergers: dict[str, Any] = {}
    for number in range(len(fields.get("vision_deepstack_layers") or ())):
        name = f"deepstack_merger_list.{number}"
        mergers |= _merger(f"vision_model.{name}", f"model.visual.{name}", "vision_merged")
    return {**ENDS, **on_layers(BLOCK, range(fields["vision_num_layers"])), **mergers}


def vision_dims(fields: Fields) -> Mapping[str, int]:
    """The sizes that the tower's rows name."""
    hidden, heads = fields["vision_hidden_size"], fields["vision_num_attention_heads"]
    return {
        "vision_hidden": hidden,
        "vision_heads": heads,
        "vision_groups": heads,
        "vision_head_dim": hidden // heads,
        "vision_ffn": fields["vision_ffn_hidden_size"],
        "vision_channels": fields["vision_in_channels"],
        "vision_frames": fields["vision_temporal_patch_size"],
        "vision_patch": fields["vision_patch_size"],
        "vision_positions": fields["vision_num_positions"],
        "vision_merged": hidden * fields["vision_spatial_merge_size"] ** 2,
        "vision_out": fields["vision_out_hidden_size"],
    }


def tower_fields(fields: Fields) -> Fields:
    """Megatron fields of the tower's own `TransformerBlock`."""
    heads = fields["vision_num_attention_heads"]
    return {
        "num_layers": fields["vision_num_layers"],
        "hidden_size": fields["vision_hidden_size"],
        "ffn_hidden_size": fields["vision_ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": fields["vision_hidden_size"] // heads,
    }


def tower_holds(name: str, stage: PipelineStage, fields: Fields) -> bool:
    """Patches and positions come before the first layer, the merger after the last, deepstack's mergers at theirs."""
    part, _, rest = name.partition(".")
    if part == "deepstack_merger_list":
        return fields["vision_deepstack_layers"][int(rest.partition(".")[0])] in stage.decoder_layers
    return stage.post_process if part == "merger" else stage.pre_process


IMAGES = {"images": Tower(prefix="vision_model.", key="qwen_visual", fields=tower_fields, holds=tower_holds)}

_ROPE = {"rope_theta": 10000.0, "rope_type": "axial"}


def read_axial_rope(config: Config) -> Fields:
    """The tower's rotary embedding is fixed in code; transformers 5 writes what it is."""
    if config.get("rope_parameters", _ROPE) != _ROPE:
        raise ConfigError(
            "the vision tower's rotary embedding is another one",
            where="config.json: vision_config.rope_parameters",
            expected=_ROPE,
            got=config["rope_parameters"],
            fix="teach families/_vision.py to translate it",
        )
    return {}


VISION_FIELDS = (
    Field("depth", "vision_num_layers"),
    Field("hidden_size", "vision_hidden_size"),
    Field("num_heads", "vision_num_attention_heads"),
    Field("intermediate_size", "vision_ffn_hidden_size"),
    Field("in_channels", "vision_in_channels"),
    Field("patch_size", "vision_patch_size"),
    Field("temporal_patch_size", "vision_temporal_patch_size"),
    Field("spatial_merge_size", "vision_spatial_merge_size"),
    Field("out_hidden_size", "vision_out_hidden_size"),
    Field("num_position_embeddings", "vision_num_positions"),
)
VISION = Section(
    fields=(*VISION_FIELDS, Field("deepstack_visual_indexes", "vision_deepstack_layers", lambda config: [])),
    fixed={"hidden_act": "gelu_pytorch_tanh"},
    reads=(read_axial_rope,),
    handled=frozenset({"rope_parameters"}),
)
"""`vision_config`."""

MULTIMODAL = Section(
    fields=(
        Field("image_token_id", "image_token_id"),
        Field("video_token_id", "video_token_id"),
        Field("vision_start_token_id", "vision_start_token_id"),
        Field("vision_end_token_id", "vision_end_token_id"),
        Field("tie_word_embeddings", "share_embeddings_and_output_weights", False),
    ),
)
"""The top level of config.json: where images go in a text, and what both parts share."""

TEXT_FIELDS = tuple(field for field in DECODER_FIELDS if field.hf != "tie_word_embeddings")
"""`text_config`: a decoder's options without the one that the top level decides."""


def tied_language_head(fields: Fields) -> Mapping[str, Copy]:
    """`tied_head` for a language model that is a part of another."""
    if not fields["share_embeddings_and_output_weights"]:
        return {}
    return {"lm_head.weight": Copy("model.language_model.embed_tokens.weight", written=False)}

"""What Qwen3-Next and Qwen3.5 share: gated attention in some layers, gated delta nets in the others, MTP.

All norms are stored as their distance from one, on both sides, but for the norm inside the delta net: HF stores
its weight, Megatron, which has one kind of norm in a model, its distance from one.
Sources: transformers 5.23, models/qwen3_next and models/qwen3_5; megatron-core 0.19, ssm/gated_delta_net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridge_core.errors import ConfigError
from bridge_core.families._parts import (
    DECODER,
    EMBEDDING,
    HF_LAYER,
    MOE,
    RMS_SWIGLU,
    head,
    moe_layers,
    on_layers,
    read_rope,
    under,
    write_rope,
)
from bridge_core.families.family import Config, Field, Fields, Table
from bridge_core.rules import Column, GatedQKV, GateUp, Packed, Replicated, Row, Rule

# --- Mapping tables -------------------------------------------------------------------------------

MTP = "mtp.layers.0"
BLOCK, HF_BLOCK = f"{MTP}.transformer_layer", "mtp.layers.0"


def attention(block: str, hf: str) -> Table:
    """Attention whose output is gated, with norms on q and k."""
    return {
        f"{block}.self_attention.linear_qkv.layer_norm_weight": Replicated(f"{hf}.input_layernorm.weight", "hidden"),
        f"{block}.self_attention.linear_qkv.weight": GatedQKV(f"{hf}.self_attn.{{q,k,v}}_proj.weight", "hidden"),
        f"{block}.self_attention.linear_proj.weight": Row(f"{hf}.self_attn.o_proj.weight", "hidden", "heads*head_dim"),
        f"{block}.self_attention.q_layernorm.weight": Replicated(f"{hf}.self_attn.q_norm.weight", "head_dim"),
        f"{block}.self_attention.k_layernorm.weight": Replicated(f"{hf}.self_attn.k_norm.weight", "head_dim"),
    }


SEGMENTS = ("query", "key", "value", "z", "beta", "alpha")
QKVZ_BY_HEAD = Packed(
    f"{HF_LAYER}.linear_attn.in_proj_{{qkvz,ba}}.weight",
    [["delta_keys", "delta_keys", "delta_values", "delta_values"], ["delta_heads", "delta_heads"]],
    "hidden",
    names=SEGMENTS,
    groups="delta_key_heads",
)
"""Qwen3-Next: rows of q, k, v, z, and of b, a, by key head."""
QKV_Z_B_A = Packed(
    f"{HF_LAYER}.linear_attn.in_proj_{{qkv,z,b,a}}.weight",
    [["delta_keys", "delta_keys", "delta_values"], ["delta_values"], ["delta_heads"], ["delta_heads"]],
    "hidden",
    names=SEGMENTS,
)
"""Qwen3.5: all of q, then all of k, ..."""


def delta_net(in_proj: Rule, *, dtype: str | None = None) -> Table:
    """A gated delta net; `dtype` is that of its decay and of its norm, where they have one of their own."""
    here, hf = f"{DECODER}.self_attention", f"{HF_LAYER}.linear_attn"
    norm = replace(Replicated(f"{hf}.norm.weight", "delta_value_dim"), shift=-1.0, dtype=dtype)
    return {
        f"{here}.in_proj.layer_norm_weight": Replicated(f"{HF_LAYER}.input_layernorm.weight", "hidden"),
        f"{here}.in_proj.weight": in_proj,
        f"{here}.conv1d.weight": Packed(
            f"{hf}.conv1d.weight",
            [["delta_keys", "delta_keys", "delta_values"]],
            *(1, "delta_conv"),
            names=SEGMENTS[:3],
        ),
        f"{here}.A_log": replace(Column(f"{hf}.A_log", "delta_heads"), dtype=dtype),
        f"{here}.dt_bias": Column(f"{hf}.dt_bias", "delta_heads"),
        f"{here}.out_norm.weight": norm,
        f"{here}.out_proj.weight": Row(f"{hf}.out_proj.weight", "hidden", "delta_values"),
    }


def dense_mlp(block: str, hf: str) -> Table:
    """A gated feed-forward network."""
    return {
        f"{block}.mlp.linear_fc1.layer_norm_weight": Replicated(f"{hf}.post_attention_layernorm.weight", "hidden"),
        f"{block}.mlp.linear_fc1.weight": GateUp(f"{hf}.mlp.{{gate,up}}_proj.weight", "ffn", "hidden"),
        f"{block}.mlp.linear_fc2.weight": Row(f"{hf}.mlp.down_proj.weight", "hidden", "ffn"),
    }


def experts(hf: str) -> tuple[Rule, Rule]:
    """Both projections of the experts, one tensor per expert on disk."""
    each = f"{hf}.mlp.experts.{{expert}}"
    return (
        GateUp(f"{each}.{{gate,up}}_proj.weight", "moe_ffn", "hidden"),
        Row(f"{each}.down_proj.weight", "hidden", "moe_ffn"),
    )


def packed_experts(hf: str) -> tuple[Rule, Rule]:
    """The same, with all experts in one tensor on disk."""
    return (
        Packed(f"{hf}.mlp.experts.gate_up_proj", [["moe_ffn", "moe_ffn"]], "hidden"),
        Row(f"{hf}.mlp.experts.down_proj", "hidden", "moe_ffn"),
    )


def sparse_mlp(block: str, hf: str, gate_up: Rule, down: Rule) -> Table:
    """Routed experts beside a shared one that has a gate of its own."""
    shared, hf_shared = f"{block}.mlp.shared_experts", f"{hf}.mlp.shared_expert"
    return {
        f"{block}.pre_mlp_layernorm.weight": Replicated(f"{hf}.post_attention_layernorm.weight", "hidden"),
        f"{block}.mlp.router.weight": Replicated(f"{hf}.mlp.gate.weight", "experts", "hidden"),
        f"{block}.mlp.experts.linear_fc1.weight{{expert}}": gate_up,
        f"{block}.mlp.experts.linear_fc2.weight{{expert}}": down,
        f"{shared}.linear_fc1.weight": GateUp(f"{hf_shared}.{{gate,up}}_proj.weight", "shared_ffn", "hidden"),
        f"{shared}.linear_fc2.weight": Row(f"{hf_shared}.down_proj.weight", "hidden", "shared_ffn"),
        f"{shared}.gate_weight": Replicated(f"{hf}.mlp.shared_expert_gate.weight", 1, "hidden"),
    }


PREDICTION: Table = {
    f"{MTP}.enorm.weight": Replicated("mtp.pre_fc_norm_embedding.weight", "hidden"),
    f"{MTP}.hnorm.weight": Replicated("mtp.pre_fc_norm_hidden.weight", "hidden"),
    f"{MTP}.eh_proj.weight": Column("mtp.fc.weight", "hidden", "2*hidden"),
    **attention(BLOCK, HF_BLOCK),
    f"{MTP}.final_layernorm.weight": Replicated("mtp.norm.weight", "hidden"),
}
"""The prediction layer without its feed-forward network: always gated attention."""


def language_table(fields: Fields, delta: Table, *, dense: Table, sparse: Table, prediction: Table) -> Table:
    """All rows of the language model, from those of its kinds of layers."""
    linear, moe = linear_layers(fields), moe_layers(fields) if sparse else [0] * fields["num_layers"]
    layers = {
        **on_layers(attention(DECODER, HF_LAYER), _where(linear, 0)),
        **on_layers(delta, _where(linear, 1)),
        **on_layers(dense, _where(moe, 0)),
        **on_layers(sparse, _where(moe, 1)),
    }
    return {**EMBEDDING, **layers, **head(fields), **({**PREDICTION, **prediction} if has_mtp(fields) else {})}


def with_language_prefix(table: Table) -> Table:
    """The same rows; HF names may also be those of a model that sees, whose vision tower was taken off."""
    others = under(table, "model.", "model.language_model.")
    return {name: _either(rule, others[name]) if rule.hf.startswith("model.") else rule for name, rule in table.items()}


def _either(rule: Rule, other: Rule) -> Rule:
    """The forms of `rule`, then those of `other`."""
    return replace(rule, otherwise=_either(rule.otherwise, other) if rule.otherwise else other)


def _where(kinds: list[int], wanted: int) -> list[int]:
    return [layer for layer, kind in enumerate(kinds) if kind == wanted]


def has_mtp(fields: Fields) -> bool:
    """Whether there is a prediction layer."""
    return bool(fields.get("mtp_num_layers"))


def delta_dims(fields: Fields) -> Mapping[str, int]:
    """The sizes that the rows of a gated delta net name."""
    key_heads, heads = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    return {
        "delta_key_heads": key_heads,
        "delta_heads": heads,
        "delta_keys": key_heads * fields["linear_key_head_dim"],
        "delta_values": heads * fields["linear_value_head_dim"],
        "delta_value_dim": fields["linear_value_head_dim"],
        "delta_conv": fields["linear_conv_kernel_dim"],
    }


# --- Configuration --------------------------------------------------------------------------------

DELTA_FIELDS = (
    Field("linear_conv_kernel_dim", "linear_conv_kernel_dim"),
    Field("linear_key_head_dim", "linear_key_head_dim"),
    Field("linear_value_head_dim", "linear_value_head_dim"),
    Field("linear_num_key_heads", "linear_num_key_heads"),
    Field("linear_num_value_heads", "linear_num_value_heads"),
)
SHARED_EXPERT = Field("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")

MEGATRON = {
    **{name: value for name, value in RMS_SWIGLU.items() if name != "rotary_percent"},
    "add_qkv_bias": False,
    "qk_layernorm": True,
    "layernorm_zero_centered_gamma": True,
    "attention_output_gate": True,
    "experimental_attention_variant": "gated_delta_net",
}
SPARSE_MEGATRON = {**MEGATRON, **MOE, "moe_shared_expert_gate": True}

LAYER_OPTIONS = frozenset({"layer_types", "full_attention_interval"})
ROTARY_OPTIONS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
KINDS = ("full_attention", "linear_attention")


def linear_layers(fields: Fields) -> list[int]:
    """One number per layer, 1 where it is a gated delta net.

    `linear_attention_freq` as megatron-core 0.19 reads it: models/gpt/experimental_attention_variant_module_specs.py,
    `get_linear_attention_pattern`: an int N means attention in every N-th layer, a list says it per layer.
    """
    freq = fields["linear_attention_freq"]
    return _every(freq, fields["num_layers"]) if isinstance(freq, int) else list(freq)


def _every(interval: int, layers: int) -> list[int]:
    return [int((layer + 1) % interval != 0) for layer in range(layers)]


def read_layers(config: Config) -> Fields:
    """Which layers are gated delta nets; every fourth is not where the configuration leaves it open."""
    interval, kinds = config.get("full_attention_interval"), config.get("layer_types")
    count = config["num_hidden_layers"]
    if kinds is None:
        linear = _every(interval or 4, count)
    else:
        linear = [KINDS.index(kind) if kind in KINDS else -1 for kind in kinds]
    wrong = -1 in linear or len(linear) != count or all(linear)
    if wrong or (interval and linear != _every(interval, count)):
        raise ConfigError(
            "the kinds of layers cannot be translated",
            where="config.json: layer_types, full_attention_interval",
            expected=f"{count} of {' and '.join(KINDS)}, some of them the former, the same in both options",
            got=f"layer_types={kinds}, full_attention_interval={interval}",
            fix="correct config.json; a model of delta nets alone has other keys in megatron-core's checkpoints",
        )
    first = linear.index(0) + 1
    return {"linear_attention_freq": first if linear == _every(first, count) else linear}


def write_layers(fields: Fields) -> dict[str, Any]:
    """The way back of `read_layers`."""
    freq = fields["linear_attention_freq"]
    interval = {"full_attention_interval": freq} if isinstance(freq, int) else {}
    return {"layer_types": [KINDS[kind] for kind in linear_layers(fields)], **interval}


def read_rotary(config: Config) -> Fields:
    """Rotary embedding of a part of the channels, and how these are shared out in models that also see.

    megatron-core 0.19 has the shares of the three positions (`mrope_section`), not that their channels are interleaved;
    for text, where the three positions are one, that is the same.
    """
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = dict(config.get(name) or {})
    said = rope.pop("partial_rotary_factor", None), config.get("partial_rotary_factor")
    percents = {percent for percent in said if percent is not None}
    section, interleaved = rope.pop("mrope_section", None), rope.pop("mrope_interleaved", None)
    if len(percents) > 1 or interleaved is not (None if section is None else True):
        raise ConfigError(
            "the rotary embedding cannot be translated",
            where=f"config.json: {name}, partial_rotary_factor",
            expected="one partial_rotary_factor, and mrope_interleaved=true beside mrope_section",
            got=f"partial_rotary_factor={said}, mrope_section={section}, mrope_interleaved={interleaved}",
            fix="compare config.json with that of a published model",
        )
    # A quarter by default: transformers 5.23, models/qwen3_next and models/qwen3_5, `__post_init__`.
    percent = next(iter(percents), 0.25)
    return read_rope({**config, name: rope}) | {"rotary_percent": percent, "mrope_section": section}


def write_rotary(fields: Fields) -> dict[str, Any]:
    """The way back of `read_rotary`, as `rope_parameters`: transformers 5 brought Qwen3.5."""
    plain = write_rope(fields)
    rope = plain["rope_scaling"] or {"rope_type": "default"}
    rope |= {"rope_theta": plain["rope_theta"], "partial_rotary_factor": fields["rotary_percent"]}
    if fields.get("mrope_section"):
        rope |= {"mrope_section": fields["mrope_section"], "mrope_interleaved": True}
    return {"rope_parameters": rope}


def read_mtp(config: Config) -> Fields:
    """The prediction layer. HF has one `mtp.fc` for all of them, megatron-core one `eh_proj` for each."""
    depths = config.get("mtp_num_hidden_layers") or 0
    if depths not in (0, 1):
        raise ConfigError(
            "several prediction layers cannot be translated",
            where="config.json: mtp_num_hidden_layers",
            expected="0 or 1",
            got=depths,
            fix="teach families/_gated_delta.py what they share",
        )
    return {"mtp_num_layers": depths or None}


def write_mtp(fields: Fields) -> dict[str, Any]:
    """The way back of `read_mtp`."""
    return {"mtp_num_hidden_layers": fields.get("mtp_num_layers") or 0}


QWEN3_5_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_output_gate": True,
    "mlp_only_layers": [],
    "mtp_use_dedicated_embeddings": False,
}
# The dtype in which serving engines keep a delta net's state says nothing of the weights.
QWEN3_5_OPTIONS = LAYER_OPTIONS | ROTARY_OPTIONS | {"mtp_num_hidden_layers", "mamba_ssm_dtype"}
QWEN3_5_READS = (read_layers, read_rotary, read_mtp)
QWEN3_5_WRITES = (write_layers, write_rotary, write_mtp)
QWEN3_5_DELTA = delta_net(QKV_Z_B_A, dtype="F32")


def inside_of(fields: Fields) -> dict[str, Any]:
    """Options of `text_config` that follow from those of the whole model."""
    return {"tie_word_embeddings": fields["share_embeddings_and_output_weights"]}


def is_delta_net(fields: Fields) -> bool:
    """Whether a model has gated delta nets."""
    return fields.get("experimental_attention_variant") == "gated_delta_net"

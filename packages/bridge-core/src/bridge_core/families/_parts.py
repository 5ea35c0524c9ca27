"""Rows and fields that several families share, so that a family file says only what is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bridge_core.errors import ConfigError
from bridge_core.families.family import Config, Copy, Field, Fields, Table
from bridge_core.rules import QKV, GateUp, Replicated, Row, Rule, Vocab

DECODER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"

# --- Mapping tables -------------------------------------------------------------------------------

EMBEDDING: Table = {
    "embedding.word_embeddings.weight": Vocab("model.embed_tokens.weight", "vocab", "hidden"),
    "decoder.final_layernorm.weight": Replicated("model.norm.weight", "hidden"),
}
OUTPUT: Table = {
    "output_layer.weight": Vocab("lm_head.weight", "vocab", "hidden"),
}
ATTENTION: Table = {
    f"{DECODER}.self_attention.linear_qkv.layer_norm_weight": Replicated(
        f"{HF_LAYER}.input_layernorm.weight", "hidden"
    ),
    f"{DECODER}.self_attention.linear_qkv.weight": QKV(f"{HF_LAYER}.self_attn.{{q,k,v}}_proj.weight", "hidden"),
    f"{DECODER}.self_attention.linear_proj.weight": Row(
        f"{HF_LAYER}.self_attn.o_proj.weight", "hidden", "heads*head_dim"
    ),
}
QKV_BIAS: Table = {
    f"{DECODER}.self_attention.linear_qkv.bias": QKV(f"{HF_LAYER}.self_attn.{{q,k,v}}_proj.bias"),
}
QK_NORM: Table = {
    f"{DECODER}.self_attention.q_layernorm.weight": Replicated(f"{HF_LAYER}.self_attn.q_norm.weight", "head_dim"),
    f"{DECODER}.self_attention.k_layernorm.weight": Replicated(f"{HF_LAYER}.self_attn.k_norm.weight", "head_dim"),
}
DENSE_MLP: Table = {
    f"{DECODER}.mlp.linear_fc1.layer_norm_weight": Replicated(f"{HF_LAYER}.post_attention_layernorm.weight", "hidden"),
    f"{DECODER}.mlp.linear_fc1.weight": GateUp(f"{HF_LAYER}.mlp.{{gate,up}}_proj.weight", "ffn", "hidden"),
    f"{DECODER}.mlp.linear_fc2.weight": Row(f"{HF_LAYER}.mlp.down_proj.weight", "hidden", "ffn"),
}


def moe_mlp(block: str, gate_up: str, down: str) -> Table:
    """Routed experts below `model.layers.{layer}.<block>`, with the family's names for the projections."""
    return {
        f"{DECODER}.pre_mlp_layernorm.weight": Replicated(f"{HF_LAYER}.post_attention_layernorm.weight", "hidden"),
        f"{DECODER}.mlp.router.weight": Replicated(f"{HF_LAYER}.{block}.gate.weight", "experts", "hidden"),
        f"{DECODER}.mlp.experts.linear_fc1.weight{{expert}}": GateUp(
            f"{HF_LAYER}.{block}.experts.{{expert}}.{gate_up}.weight", "moe_ffn", "hidden"
        ),
        f"{DECODER}.mlp.experts.linear_fc2.weight{{expert}}": Row(
            f"{HF_LAYER}.{block}.experts.{{expert}}.{down}.weight", "hidden", "moe_ffn"
        ),
    }


def on_layers(table: Table, layers: Sequence[int]) -> Table:
    """The same rows, for some layers only; no rows if there are none."""
    return {name: replace(rule, layers=tuple(layers)) for name, rule in table.items()} if layers else {}


def under(table: Table, prefix: str, other: str) -> Table:
    """The same rows with HF names that begin with another prefix, in all their forms."""

    def moved(rule: Rule) -> Rule:
        otherwise = moved(rule.otherwise) if rule.otherwise else None
        name = other + rule.hf.removeprefix(prefix) if rule.hf.startswith(prefix) else rule.hf
        return replace(rule, hf=name, otherwise=otherwise)

    return {name: moved(rule) for name, rule in table.items()}


def tied_head(fields: Fields) -> Mapping[str, Copy]:
    """Some models whose output layer is the embedding were saved with both; then both have to be equal."""
    if not fields["share_embeddings_and_output_weights"]:
        return {}
    return {"lm_head.weight": Copy("model.embed_tokens.weight", written=False)}


def head(fields: Fields) -> Table:
    """The output layer, unless it is the embedding."""
    return {} if fields["share_embeddings_and_output_weights"] else OUTPUT


# --- Configuration --------------------------------------------------------------------------------


def _head_dim(config: Config) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


DECODER_FIELDS = (
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "num_query_groups", lambda config: config["num_attention_heads"]),
    Field("head_dim", "kv_channels", _head_dim),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "seq_length"),
    Field("rms_norm_eps", "layernorm_epsilon"),
    Field("tie_word_embeddings", "share_embeddings_and_output_weights", False),
)
"""Options of every RMSNorm, SwiGLU, rotary decoder."""

RMS_SWIGLU = {
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""Megatron fields of the same decoders."""

ROPE_OPTIONS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

# What megatron-core fixes in code: 0.19, models/common/embeddings/rotary_pos_embedding.py,
# `RotaryEmbedding._apply_scaling`; the factor alone is an argument.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope(config: Config) -> Fields:
    """Rotary base and scaling, from transformers' new form (`rope_parameters`) or the old one."""
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = rope.pop("rope_theta", None) or config.get("rope_theta")
    if base is None:
        raise ConfigError(
            "the configuration lacks the base of its rotary embedding",
            where="config.json: rope_theta",
            expected="a number, there or in rope_parameters",
            got="nothing",
            fix="add it; transformers' default depends on its version and on the model",
        )
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    fields: Fields = {"rotary_base": base, "rope_scaling": False, "seq_len_interpolation_factor": None}
    if kind == "default":
        _nothing_left("default", rope)
    elif kind == "linear":
        fields["seq_len_interpolation_factor"] = rope.pop("factor")
        _nothing_left("linear", rope)
    elif kind == "llama3":
        fields |= {"rope_scaling": True, "rope_scaling_factor": rope.pop("factor")}
        for name, value in _LLAMA3_ROPE.items():
            if (got := rope.pop(name, value)) != value:
                raise ConfigError(
                    "megatron-core has this value of llama3 rope scaling fixed in its code",
                    where=f"config.json: rope_scaling.{name}",
                    expected=value,
                    got=got,
                    fix="such a model cannot run in megatron-core unchanged",
                )
        _nothing_left("llama3", rope)
    else:
        raise ConfigError(
            "a kind of rope scaling is not translated",
            where="config.json: rope_scaling",
            expected="default, linear or llama3",
            got=kind,
            fix="teach families/_parts.py `read_rope` and `write_rope` to translate it",
        )
    return fields


# transformers 5.23, models/qwen3_vl/modeling_qwen3_vl.py, `Qwen3VLTextRotaryEmbedding`.
_MROPE_SECTION = [24, 20, 20]


def read_mrope(config: Config, *, section: Sequence[int] = _MROPE_SECTION) -> Fields:
    """Rotary embedding over three positions (time, height, width), whose channels are interleaved.

    `section` says how many channels each has where config.json does not.

    megatron-core 0.19 has the positions (`mrope_section`), not the interleaving; for text, all three are one.
    """
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = dict(config.get(name) or {})
    channels = list(rope.pop("mrope_section", section))
    if not rope.pop("mrope_interleaved", True):
        raise ConfigError(
            "the channels of the three positions are not interleaved",
            where=f"config.json: {name}.mrope_interleaved",
            expected=True,
            got=False,
            fix="teach families/_parts.py `read_mrope` to translate it",
        )
    plain = read_rope({**config, name: rope})
    return plain | {"position_embedding_type": "mrope", "mrope_section": channels, "mrope_interleaved": True}


def write_mrope(fields: Fields) -> dict[str, Any]:
    """The way back of `read_mrope`."""
    written = write_rope(fields)
    scaling = written["rope_scaling"] or {"rope_type": "default"}
    interleaved = {"mrope_section": fields["mrope_section"], "mrope_interleaved": fields["mrope_interleaved"]}
    return written | {"rope_scaling": scaling | interleaved}


def _nothing_left(kind: str, rope: dict[str, Any]) -> None:
    if rope:
        raise ConfigError(
            f"rope scaling of kind {kind} has options that are not translated",
            where="config.json: rope_scaling",
            got=", ".join(f"{name}={value!r}" for name, value in sorted(rope.items())),
            fix="remove them, or teach families/_parts.py `read_rope` to translate them",
        )


def write_rope(fields: Fields) -> dict[str, Any]:
    """Rotary options in the form that both old and new transformers read: `rope_theta`, `rope_scaling`."""
    scaling: dict[str, Any] | None = None
    if fields.get("rope_scaling"):
        scaling = {"rope_type": "llama3", "factor": fields["rope_scaling_factor"], **_LLAMA3_ROPE}
    elif fields.get("seq_len_interpolation_factor"):
        scaling = {"rope_type": "linear", "factor": fields["seq_len_interpolation_factor"]}
    return {"rope_theta": fields["rotary_base"], "rope_scaling": scaling}


WINDOW_OPTIONS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def read_full_attention(config: Config) -> Fields:
    """Refuse sliding windows, which change what the model computes; accept their options when off."""
    kinds = set(config.get("layer_types") or ["full_attention"])
    if config.get("use_sliding_window") or kinds != {"full_attention"}:
        raise ConfigError(
            "sliding-window attention is not translated",
            where="config.json: use_sliding_window, layer_types",
            expected="use_sliding_window=false and full attention in every layer",
            got=f"use_sliding_window={config.get('use_sliding_window')}, layer_types={sorted(kinds)}",
            fix="teach the family to write `window_size` and `window_attn_skip_freq`",
        )
    return {}


MOE = {
    "moe_grouped_gemm": True,
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_dtype": "fp32",
}


def moe_layers(fields: Fields) -> list[int]:
    """One number per layer, 1 where it has experts.

    `moe_layer_freq` as megatron-core 0.19 reads it: models/gpt/gpt_layer_specs.py,
    `get_gpt_decoder_layer_specs`: an int N means every N-th layer from the first on, a list says it per layer.
    """
    freq = fields.get("moe_layer_freq", 1)
    if isinstance(freq, int):
        return [int(layer % freq == 0) for layer in range(fields["num_layers"])]
    return list(freq)

"""Nemotron-H and Nemotron 3: Mamba-2, attention and (latent) experts, one per layer; Megatron's HybridModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridge_core.errors import ConfigError
from bridge_core.families._parts import MOE
from bridge_core.families.family import Config, Family, Field, Fields, Table
from bridge_core.rules import QKV, Column, Either, Packed, Replicated, Row, Rule, Vocab
from bridge_core.topology.hybrid_pattern import ATTENTION, MAMBA, MLP, HybridPattern, parse_hybrid_pattern
from bridge_core.topology.hybrid_pattern import MOE as EXPERTS

ENDS: Table = {
    "embedding.word_embeddings.weight": Vocab("backbone.embeddings.weight", "vocab", "hidden"),
    "decoder.final_norm.weight": Replicated("backbone.norm_f.weight", "hidden"),
}
OUTPUT: Table = {"output_layer.weight": Vocab("lm_head.weight", "vocab", "hidden")}


def mamba(at: str, hf: str) -> Table:
    """A Mamba-2 layer: gate z, input x, B and C by group, time step dt; x, B and C go through the convolution."""
    mixer, theirs = f"{at}.mixer", f"{hf}.mixer"
    return {
        f"{mixer}.in_proj.layer_norm_weight": Replicated(f"{hf}.norm.weight", "hidden"),
        f"{mixer}.in_proj.weight": Packed(
            f"{theirs}.in_proj.weight",
            [("mamba_inner", "mamba_inner", "mamba_bc", "mamba_bc", "mamba_heads")],
            "hidden",
            names=("z", "x", "B", "C", "dt"),
        ),
        f"{mixer}.conv1d.weight": Packed(
            f"{theirs}.conv1d.weight", [("mamba_inner", "mamba_bc", "mamba_bc")], 1, "mamba_conv", names=("x", "B", "C")
        ),
        f"{mixer}.conv1d.bias": Packed(
            f"{theirs}.conv1d.bias", [("mamba_inner", "mamba_bc", "mamba_bc")], names=("x", "B", "C")
        ),
        # megatron-core keeps these two in float32, whatever the model's dtype (0.19.2, ssm/mamba_mixer.py).
        f"{mixer}.A_log": replace(Column(f"{theirs}.A_log", "mamba_heads"), dtype="F32"),
        f"{mixer}.D": replace(Column(f"{theirs}.D", "mamba_heads"), dtype="F32"),
        f"{mixer}.dt_bias": Column(f"{theirs}.dt_bias", "mamba_heads"),
        f"{mixer}.norm.weight": Column(f"{theirs}.norm.weight", "mamba_inner"),
        f"{mixer}.out_proj.weight": Row(f"{theirs}.out_proj.weight", "hidden", "mamba_inner"),
    }


def attention(at: str, hf: str) -> Table:
    """An attention layer, without positions."""
    return {
        f"{at}.self_attention.linear_qkv.layer_norm_weight": Replicated(f"{hf}.norm.weight", "hidden"),
        f"{at}.self_attention.linear_qkv.weight": QKV(f"{hf}.mixer.{{q,k,v}}_proj.weight", "hidden"),
        f"{at}.self_attention.linear_proj.weight": Row(f"{hf}.mixer.o_proj.weight", "hidden", "heads*head_dim"),
    }


def mlp(at: str, hf: str) -> Table:
    """A dense layer; squared ReLU has no gate."""
    return {
        f"{at}.mlp.linear_fc1.layer_norm_weight": Replicated(f"{hf}.norm.weight", "hidden"),
        f"{at}.mlp.linear_fc1.weight": Column(f"{hf}.mixer.up_proj.weight", "ffn", "hidden"),
        f"{at}.mlp.linear_fc2.weight": Row(f"{hf}.mixer.down_proj.weight", "hidden", "ffn"),
    }


def moe(at: str, hf: str) -> Table:
    """A layer with routed experts, which work on `latent` features, and a shared one, which works on all."""
    ours, theirs = f"{at}.mlp", f"{hf}.mixer"
    return {
        f"{at}.pre_mlp_layernorm.weight": Replicated(f"{hf}.norm.weight", "hidden"),
        f"{ours}.router.weight": Replicated(f"{theirs}.gate.weight", "experts", "hidden"),
        f"{ours}.router.expert_bias": replace(
            Replicated(f"{theirs}.gate.e_score_correction_bias", "experts"), dtype="F32"
        ),
        f"{ours}.experts.linear_fc1.weight{{expert}}": Column(
            f"{theirs}.experts.{{expert}}.up_proj.weight", "moe_ffn", "latent"
        ),
        f"{ours}.experts.linear_fc2.weight{{expert}}": Row(
            f"{theirs}.experts.{{expert}}.down_proj.weight", "latent", "moe_ffn"
        ),
        f"{ours}.shared_experts.linear_fc1.weight": Column(
            f"{theirs}.shared_experts.up_proj.weight", "shared_ffn", "hidden"
        ),
        f"{ours}.shared_experts.linear_fc2.weight": Row(
            f"{theirs}.shared_experts.down_proj.weight", "hidden", "shared_ffn"
        ),
    }


def latent_moe(at: str, hf: str) -> Table:
    """The same, with the projections to `latent` features and back."""
    return {
        **moe(at, hf),
        f"{at}.mlp.fc1_latent_proj.weight": Replicated(f"{hf}.mixer.fc1_latent_proj.weight", "latent", "hidden"),
        f"{at}.mlp.fc2_latent_proj.weight": Replicated(f"{hf}.mixer.fc2_latent_proj.weight", "hidden", "latent"),
    }


def prediction(at: str, first: str, last: str) -> Table:
    """What joins a depth of prediction layers to the model; HF keeps it in the first and the last of them."""
    return {
        f"{at}.enorm.weight": Replicated(f"{first}.enorm.weight", "hidden"),
        f"{at}.hnorm.weight": Replicated(f"{first}.hnorm.weight", "hidden"),
        f"{at}.eh_proj.weight": Column(f"{first}.eh_proj.weight", "hidden", "mtp_in"),
        f"{at}.final_layernorm.weight": Replicated(f"{last}.final_layernorm.weight", "hidden"),
    }


def pattern_of(fields: Fields) -> HybridPattern:
    """The layer pattern, with as many depths of prediction layers as the fields have."""
    pattern = parse_hybrid_pattern(fields["hybrid_layer_pattern"])
    return pattern._replace(depths=fields.get("mtp_num_layers") or 0)


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    pattern = pattern_of(fields)
    kinds = {MAMBA: mamba, ATTENTION: attention, MLP: mlp, EXPERTS: latent_moe if _is_latent(fields) else moe}
    rows: Table = dict(ENDS)
    for letter, kind in kinds.items():
        layers = tuple(layer for layer, found in enumerate(pattern.decoder) if found == letter)
        if layers:
            some = kind("decoder.layers.{layer}", "backbone.layers.{layer}")
            rows |= {name: replace(rule, layers=layers) for name, rule in some.items()}
    rows |= {} if fields["share_embeddings_and_output_weights"] else OUTPUT
    rows = {name: Either(rule, *_renamed(rule)) for name, rule in rows.items()}
    for depth in range(pattern.depths):
        # HF numbers the layers of all depths in one go.
        hf = [f"mtp.layers.{depth * len(pattern.mtp) + number}" for number in range(len(pattern.mtp))]
        at = f"mtp.layers.{depth}"
        rows |= prediction(at, hf[0], hf[-1])
        for number, letter in enumerate(pattern.mtp):
            rows |= kinds[letter](f"{at}.mtp_model_layer.layers.{number}", hf[number])
    return rows


def dims(fields: Fields) -> Mapping[str, int]:
    """Sizes of the mixers, of what experts work on, and of what prediction layers are given."""
    state = fields["mamba_num_groups"] * fields["mamba_state_dim"]
    return {
        "mamba_heads": fields["mamba_num_heads"],
        "mamba_inner": fields["mamba_num_heads"] * fields["mamba_head_dim"],
        "mamba_bc": state,
        "mamba_conv": CONVOLUTION,
        "latent": fields.get("moe_latent_size") or fields["hidden_size"],
        "mtp_in": 2 * fields["hidden_size"],
    }


def _is_latent(fields: Fields) -> bool:
    return bool(fields.get("moe_latent_size"))


def _renamed(rule: Rule) -> tuple[Rule, ...]:
    """The row for checkpoints that say `model.` where the publisher says `backbone.`, if the row is one of those."""
    hf = rule.hf.replace("backbone.", "model.", 1)
    return (replace(rule, hf=hf),) if hf != rule.hf else ()


# --- Configuration --------------------------------------------------------------------------------

CONVOLUTION = 4
MIXER_EPSILON = 1e-5
"""What megatron-core fixes in code: 0.19.2, ssm/mamba_mixer.py, `MambaMixer.__init__` (`d_conv`, `eps`)."""

_LETTERS = {
    "linear_attention": MAMBA,
    "mamba": MAMBA,
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "mlp": MLP,
    "moe": EXPERTS,
}

EXPERT_FIELDS = (
    Field("n_routed_experts", "num_moe_experts"),
    Field("num_experts_per_tok", "moe_router_topk"),
    Field("moe_intermediate_size", "moe_ffn_hidden_size"),
    Field("moe_shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    Field("moe_latent_size", "moe_latent_size", None),
    Field("routed_scaling_factor", "moe_router_topk_scaling_factor", 1.0),
)


def _letters(config: Config, pattern: str, kinds: str) -> str | None:
    """Layers by letter, from the option that spells them or the one that lists them by name."""
    text, listed = config.get(pattern), config.get(kinds)
    if listed is not None:
        if unknown := sorted(set(listed) - set(_LETTERS)):
            raise _refused(kinds, f"layers among {', '.join(_LETTERS)}", ", ".join(unknown))
        spelled = "".join(_LETTERS[kind] for kind in listed)
        if text not in (None, spelled):
            raise _refused(f"{pattern}, {kinds}", f"the same layers: {spelled}", text)
        text = spelled
    if text is not None and (not text or set(text) - set(_LETTERS.values())):
        raise _refused(pattern, f"letters among {' '.join(sorted(set(_LETTERS.values())))}", repr(text))
    return text


def _refused(where: str, expected: object, got: object) -> ConfigError:
    return ConfigError(
        "the nemotron_h family cannot express an option's value",
        where=f"config.json: {where}",
        expected=expected,
        got=got,
        fix="correct config.json, or teach families/nemotron_h.py to translate it",
    )


def read_pattern(config: Config) -> Fields:
    """The layers, in either of the forms in which HF gives them, as one pattern."""
    decoder = _letters(config, "hybrid_override_pattern", "layers_block_type")
    if decoder is None:
        raise _refused("hybrid_override_pattern", "a letter per layer", "nothing")
    if config.get("num_hidden_layers") not in (None, len(decoder)):
        raise _refused("num_hidden_layers", f"{len(decoder)}, as hybrid_override_pattern", config["num_hidden_layers"])
    depths = config.get("num_nextn_predict_layers") or 0
    # transformers' default, models/nemotron_h/configuration_nemotron_h.py.
    mtp = _letters(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or ATTENTION + EXPERTS
    return {
        "num_layers": len(decoder),
        "hybrid_layer_pattern": str(HybridPattern((decoder,), mtp, depths)),
        "mtp_num_layers": depths or None,
    }


def write_pattern(fields: Fields) -> dict[str, Any]:
    """The way back of `read_pattern`, in the form of the published files."""
    pattern = pattern_of(fields)
    return {
        "hybrid_override_pattern": pattern.decoder,
        "num_hidden_layers": len(pattern.decoder),
        "num_nextn_predict_layers": pattern.depths,
        **({"mtp_hybrid_override_pattern": pattern.mtp} if pattern.depths else {}),
    }


def read_experts(config: Config) -> Fields:
    """Experts, where a layer has some; config.json speaks of them even where none has."""
    if EXPERTS not in read_pattern(config)["hybrid_layer_pattern"]:
        return {"num_moe_experts": None}
    fields = {option.megatron: option.read(config) for option in EXPERT_FIELDS}
    chosen, groups, taken = fields["moe_router_topk"], config.get("n_group") or 1, config.get("topk_group") or 1
    # megatron-core normalises the weights of the chosen experts if there are several (moe/moe_utils.py,
    # `topk_routing_with_score_function`); a group's score is the sum of topk // topk_group experts, HF's of two.
    if config.get("norm_topk_prob", True) != (chosen > 1):
        raise _refused(
            "norm_topk_prob", f"{chosen > 1}, with num_experts_per_tok={chosen}", config.get("norm_topk_prob")
        )
    if groups > 1 and chosen // taken != 2:
        raise _refused("topk_group", "num_experts_per_tok // topk_group == 2", f"{chosen} // {taken}")
    limits = (groups, taken) if groups > 1 else (None, None)
    return {**fields, "moe_router_num_groups": limits[0], "moe_router_group_topk": limits[1]}


def write_experts(fields: Fields) -> dict[str, Any]:
    """The way back of `read_experts`."""
    if not fields.get("num_moe_experts"):
        return {}
    found = {option.hf: fields.get(option.megatron, option.default) for option in EXPERT_FIELDS}
    groups = fields.get("moe_router_num_groups") or 1
    return {
        **found,
        "norm_topk_prob": fields["moe_router_topk"] > 1,
        "n_group": groups,
        "topk_group": (fields.get("moe_router_group_topk") or 1) if groups > 1 else 1,
    }


def read_mixer(config: Config) -> Fields:
    """Options of the Mamba mixer that megatron-core takes, and those that it has fixed in its code."""
    low, high = config.get("time_step_limit") or (0.0, float("inf"))
    high = float(next(iter(high.values())) if isinstance(high, Mapping) else high)  # transformers' way to say infinity
    if (low, high) != (0.0, float("inf")):
        raise _refused("time_step_limit", "0 to infinity", config["time_step_limit"])
    epsilon = NORM_EPSILON.read(config)
    if MAMBA in read_pattern(config)["hybrid_layer_pattern"] and epsilon != MIXER_EPSILON:
        raise _refused(NORM_EPSILON.hf, f"{MIXER_EPSILON}, which megatron-core has fixed in its mixer", epsilon)
    return {"mamba_chunk_size": config.get("chunk_size", 128)}


def write_mixer(fields: Fields) -> dict[str, Any]:
    """The way back of `read_mixer`."""
    return {"chunk_size": fields.get("mamba_chunk_size") or 128}


def recognises(fields: Fields) -> bool:
    """A pattern of these layers, and of no others."""
    text = fields.get("hybrid_layer_pattern")
    return bool(text) and not set(text) - set("|/") - set(_LETTERS.values())


NORM_EPSILON = Field("layer_norm_epsilon", "layernorm_epsilon", 1e-5, aliases=("norm_eps",))

FAMILY = Family(
    name="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    model_type="nemotron_h",
    fields=(
        Field("hidden_size", "hidden_size"),
        Field("intermediate_size", "ffn_hidden_size"),
        Field("num_attention_heads", "num_attention_heads"),
        Field("num_key_value_heads", "num_query_groups", lambda config: config["num_attention_heads"]),
        Field("head_dim", "kv_channels", 128, aliases=("attention_head_dim",)),
        Field("vocab_size", "vocab_size"),
        Field("max_position_embeddings", "seq_length"),
        Field("tie_word_embeddings", "share_embeddings_and_output_weights", False),
        Field("mamba_num_heads", "mamba_num_heads"),
        Field("mamba_head_dim", "mamba_head_dim"),
        Field("ssm_state_size", "mamba_state_dim"),
        Field("n_groups", "mamba_num_groups"),
        Field("hidden_dropout", "hidden_dropout", 0.0),
        Field("residual_in_fp32", "fp32_residual_connection", False),
        NORM_EPSILON,
    ),
    fixed={
        "attention_bias": False,
        "conv_kernel": CONVOLUTION,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "n_shared_experts": 1,
        "sliding_window": None,
        "use_bias": False,
        "use_conv_bias": True,
    },
    megatron={
        "is_hybrid_model": True,
        "normalization": "RMSNorm",
        "activation_func": "squared_relu",
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "none",
        "attention_dropout": 0.0,
        **MOE,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    gives=frozenset({"mtp_num_layers"} | {option.megatron for option in EXPERT_FIELDS}),
    reads=(read_pattern, read_experts, read_mixer),
    writes=(write_pattern, write_experts, write_mixer),
    handled=frozenset({name for option in EXPERT_FIELDS for name in option.names})
    | {"hybrid_override_pattern", "layers_block_type", "num_hidden_layers", "num_nextn_predict_layers"}
    | {"mtp_hybrid_override_pattern", "mtp_layers_block_type", "n_group", "topk_group", "norm_topk_prob"}
    | {"chunk_size", "time_step_limit"}
    # Without effect: the sizes are given otherwise, there are no positions, or only new weights are made by them.
    | {"expand", "partial_rotary_factor", "rope_theta", "rescale_prenorm_residual"}
    | {"time_step_floor", "time_step_max", "time_step_min"}
    # How a program runs the model.
    | {"auto_map", "mamba_ssm_cache_dtype", "num_logits_to_keep", "use_mamba_kernels"},
    table=table,
    dims=dims,
    recognises=recognises,
)

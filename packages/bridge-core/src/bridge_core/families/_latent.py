"""Parts of families with latent attention and sigmoid routing: DeepSeek-V3 and what is built like it.

Names and cuts of the Megatron side: megatron-core 0.19, transformer/multi_latent_attention.py,
transformer/moe/router.py and transformer/multi_token_prediction.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bridge_core.errors import ConfigError
from bridge_core.families._parts import DECODER, HF_LAYER
from bridge_core.families.family import Config, Fields, Table
from bridge_core.rules import Column, GateUp, Replicated, Row

# --- Mapping tables -------------------------------------------------------------------------------


def latent_attention(fields: Fields) -> Table:
    """Queries and keys/values through low-rank latents; without `q_lora_rank`, queries straight from the input.

    Nothing is permuted: both sides keep rotary pairs interleaved, and per head first what is not rotated.
    """
    attention, hf = f"{DECODER}.self_attention", f"{HF_LAYER}.self_attn"
    if fields["q_lora_rank"] is None:
        query: Table = {f"{attention}.linear_q_proj.weight": Column(f"{hf}.q_proj.weight", "heads*q_head", "hidden")}
    else:
        query = {
            f"{attention}.linear_q_down_proj.weight": Replicated(f"{hf}.q_a_proj.weight", "q_lora", "hidden"),
            f"{attention}.linear_q_up_proj.layer_norm_weight": Replicated(f"{hf}.q_a_layernorm.weight", "q_lora"),
            f"{attention}.linear_q_up_proj.weight": Column(f"{hf}.q_b_proj.weight", "heads*q_head", "q_lora"),
        }
    return {
        f"{DECODER}.input_layernorm.weight": Replicated(f"{HF_LAYER}.input_layernorm.weight", "hidden"),
        **query,
        f"{attention}.linear_kv_down_proj.weight": Replicated(
            f"{hf}.kv_a_proj_with_mqa.weight", "kv_lora_and_rope", "hidden"
        ),
        f"{attention}.linear_kv_up_proj.layer_norm_weight": Replicated(f"{hf}.kv_a_layernorm.weight", "kv_lora"),
        f"{attention}.linear_kv_up_proj.weight": Column(f"{hf}.kv_b_proj.weight", "heads*kv_head", "kv_lora"),
        f"{attention}.linear_proj.weight": Row(f"{hf}.o_proj.weight", "hidden", "heads*v_head"),
    }


def latent_dims(fields: Fields) -> dict[str, int]:
    """The sizes that `latent_attention` names."""
    return {
        "q_lora": fields["q_lora_rank"] or 0,
        "q_head": fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"],
        "kv_lora": fields["kv_lora_rank"],
        "kv_lora_and_rope": fields["kv_lora_rank"] + fields["qk_pos_emb_head_dim"],
        "kv_head": fields["qk_head_dim"] + fields["v_head_dim"],
        "v_head": fields["v_head_dim"],
    }


EXPERT_BIAS: Table = {
    f"{DECODER}.mlp.router.expert_bias": replace(
        Replicated(f"{HF_LAYER}.mlp.gate.e_score_correction_bias", "experts"), dtype="F32"
    ),
}
SHARED_EXPERTS: Table = {
    f"{DECODER}.mlp.shared_experts.linear_fc1.weight": GateUp(
        f"{HF_LAYER}.mlp.shared_experts.{{gate,up}}_proj.weight", "shared_ffn", "hidden"
    ),
    f"{DECODER}.mlp.shared_experts.linear_fc2.weight": Row(
        f"{HF_LAYER}.mlp.shared_experts.down_proj.weight", "hidden", "shared_ffn"
    ),
}


def as_prediction_layer(layer: Table, depth: int, hf_layer: int) -> Table:
    """Rows of a decoder layer as the prediction layer number `depth`, which is HF's layer number `hf_layer`.

    `eh_proj` takes the embedding first and the hidden state second on both sides.
    """
    mtp, hf = f"mtp.layers.{depth}", f"model.layers.{hf_layer}"
    return {
        f"{mtp}.enorm.weight": Replicated(f"{hf}.enorm.weight", "hidden"),
        f"{mtp}.hnorm.weight": Replicated(f"{hf}.hnorm.weight", "hidden"),
        f"{mtp}.eh_proj.weight": Column(f"{hf}.eh_proj.weight", "hidden", "two_hidden"),
        **{
            name.replace(DECODER, f"{mtp}.transformer_layer"): replace(
                rule, hf=rule.hf.replace(HF_LAYER, hf), layers=None
            )
            for name, rule in layer.items()
        },
        f"{mtp}.final_layernorm.weight": Replicated(f"{hf}.shared_head.norm.weight", "hidden"),
    }


# --- Configuration --------------------------------------------------------------------------------

_YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}

# What yarn options have to be where there is no yarn: MLATransformerConfig's own defaults are those of DeepSeek-V3.
_NO_YARN = {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def read_latent_rope(config: Config) -> Fields:
    """Rotary embedding of latent attention: plain, or yarn with its options.

    megatron-core 0.19, transformer/transformer_config.py, `MLATransformerConfig`;
    transformers 5.23, modeling_rope_utils.py, `_compute_yarn_parameters`.
    """
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = rope.pop("rope_theta", None) or config["rope_theta"]
    kinds = {kind for name in ("rope_type", "type") if (kind := rope.pop(name, None))} or {"default"}
    fields: Fields = {"rotary_base": base}
    if kinds == {"default"}:
        fields |= {"rope_type": "rope", **_NO_YARN}
    elif kinds == {"yarn"}:
        said = {name: value for name, value in rope.items() if value is not None}
        rope = {name: value for name, value in said.items() if name not in _YARN and (name, value) not in _AS_ALWAYS}
        values = {"original_max_position_embeddings": config["max_position_embeddings"], **_YARN_DEFAULTS, **said}
        fields |= {"rope_type": "yarn", **{field: values[option] for option, field in _YARN.items()}}
        if not values["mscale_all_dim"] and values["mscale"] != 1:
            rope["mscale"] = values["mscale"]  # transformers and the publisher read it differently
    if len(kinds) > 1 or not kinds <= {"default", "yarn"} or rope:
        raise ConfigError(
            "a rotary embedding of latent attention is not translated",
            where="config.json: rope_scaling",
            expected=f"no scaling, or yarn with {', '.join(_YARN)} (mscale=1 without mscale_all_dim)",
            got=", ".join([*sorted(kinds), *(f"{name}={value!r}" for name, value in sorted(rope.items()))]),
            fix="teach families/_latent.py `read_latent_rope` and `write_latent_rope` to translate it",
        )
    return fields


_AS_ALWAYS = (("truncate", True),)


def write_latent_rope(fields: Fields) -> dict[str, Any]:
    """The way back, under the names that both the publisher's code and transformers read."""
    scaling = None
    if fields["rope_type"] == "yarn":
        scaling = {"type": "yarn", **{option: fields[field] for option, field in _YARN.items()}}
    return {"rope_theta": fields["rotary_base"], "rope_scaling": scaling}


def read_groups(config: Config) -> Fields:
    """Groups of experts, of which each token may use some.

    megatron-core rates a group by its `top_k // topk_group` best experts (0.19, transformer/moe/moe_utils.py,
    `group_limited_topk`), the publisher by its two best (transformers 5.23, models/deepseek_v3/modeling_deepseek_v3.py,
    `DeepseekV3TopkRouter`): they choose alike only if that is the same, or if no group is left out.
    """
    groups, kept, top_k = config.get("n_group") or 1, config.get("topk_group") or 1, config["num_experts_per_tok"]
    if kept < groups and top_k // kept != 2:
        raise ConfigError(
            "megatron-core would choose other groups of experts than the model was trained with",
            where="config.json: n_group, topk_group, num_experts_per_tok",
            expected="num_experts_per_tok = 2 * topk_group, or topk_group = n_group",
            got=f"n_group={groups}, topk_group={kept}, num_experts_per_tok={top_k}",
            fix="such a model cannot run in megatron-core unchanged",
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": kept}


def write_groups(fields: Fields) -> dict[str, Any]:
    """The way back of `read_groups`."""
    return {"n_group": fields["moe_router_num_groups"] or 1, "topk_group": fields["moe_router_group_topk"] or 1}

"""DeepSeek-V3 and R1, and models built like them (Moonlight): latent attention, sigmoid-routed and shared experts.

The first layers are dense. A prediction layer (MTP) follows the last layer under the next number, with copies of the
embedding and of the head. Published in fp8 blocks, or plain.
"""

from __future__ import annotations

from typing import Any

from bridge_core.errors import ConfigError
from bridge_core.families._latent import (
    EXPERT_BIAS,
    SHARED_EXPERTS,
    as_prediction_layer,
    latent_attention,
    latent_dims,
    read_groups,
    read_latent_rope,
    write_groups,
    write_latent_rope,
)
from bridge_core.families._parts import (
    DECODER_FIELDS,
    DENSE_MLP,
    EMBEDDING,
    MOE,
    RMS_SWIGLU,
    ROPE_OPTIONS,
    head,
    moe_layers,
    moe_mlp,
    on_layers,
)
from bridge_core.families.family import Config, Copy, Family, Field, Fields, Table

ROUTED = moe_mlp("mlp", "{gate,up}_proj", "down_proj")


def table(fields: Fields) -> Table:
    """Mapping table: Megatron name on the left, HF names and their relation on the right."""
    sparse = [layer for layer, is_sparse in enumerate(moe_layers(fields)) if is_sparse]
    dense = [layer for layer, is_sparse in enumerate(moe_layers(fields)) if not is_sparse]
    attention = latent_attention(fields)
    shared = SHARED_EXPERTS if fields["moe_shared_expert_intermediate_size"] else {}
    experts = {**ROUTED, **EXPERT_BIAS, **shared}
    rows = {**EMBEDDING, **attention, **on_layers(DENSE_MLP, dense), **on_layers(experts, sparse), **head(fields)}
    for depth in range(fields["mtp_num_layers"] or 0):
        rows |= as_prediction_layer({**attention, **experts}, depth, fields["num_layers"] + depth)
    return rows


def copies(fields: Fields) -> dict[str, Copy]:
    """Every prediction layer repeats the embedding and the head, of which Megatron keeps one each."""
    found: dict[str, Copy] = {}
    for depth in range(fields["mtp_num_layers"] or 0):
        layer = f"model.layers.{fields['num_layers'] + depth}"
        found[f"{layer}.embed_tokens.weight"] = Copy("model.embed_tokens.weight", written=True)
        found[f"{layer}.shared_head.head.weight"] = Copy("lm_head.weight", written=True)
    return found


def read_heads(config: Config) -> Fields:
    """Every head has its own keys and values, made from the latent."""
    heads, rope, nope = config["num_attention_heads"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    derived = {"num_key_value_heads": heads, "head_dim": rope, "qk_head_dim": rope + nope}
    if wrong := {name: config[name] for name, value in derived.items() if config.get(name) not in (None, value)}:
        raise ConfigError(
            "an option contradicts the sizes of latent attention",
            where=f"config.json: {', '.join(wrong)}",
            expected=", ".join(f"{name}={derived[name]}" for name in wrong),
            got=", ".join(f"{name}={value!r}" for name, value in wrong.items()),
            fix="correct config.json",
        )
    return {"num_query_groups": heads, "kv_channels": config["v_head_dim"]}


def read_layers(config: Config) -> Fields:
    """Which layers have experts, the width of all shared experts together, and prediction layers."""
    dense, layers = config.get("first_k_dense_replace") or 0, config["num_hidden_layers"]
    shared = (config.get("n_shared_experts") or 0) * config["moe_intermediate_size"]
    return {
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)] if dense else 1,
        "moe_shared_expert_intermediate_size": shared or None,
        "mtp_num_layers": config.get("num_nextn_predict_layers", config.get("num_mtp_layers")) or None,
    }


def write_layers(fields: Fields) -> dict[str, Any]:
    """The way back of `read_heads` and `read_layers`.

    Raises:
        ConfigError: layers without experts come after one with experts, or shared experts of another width.
    """
    sparse, width = moe_layers(fields), fields["moe_ffn_hidden_size"]
    dense, shared = sparse.index(1) if 1 in sparse else len(sparse), fields["moe_shared_expert_intermediate_size"] or 0
    if not all(sparse[dense:]) or shared % width:
        raise ConfigError(
            "config.json of this family cannot say what the Megatron model is",
            where="moe_layer_freq, moe_shared_expert_intermediate_size",
            expected=f"dense layers first, and shared experts of a multiple of {width}",
            got=f"{fields['moe_layer_freq']}, {shared}",
        )
    return {
        "num_key_value_heads": fields["num_attention_heads"],
        "first_k_dense_replace": dense,
        "n_shared_experts": shared // width or None,
        "num_nextn_predict_layers": fields["mtp_num_layers"] or 0,
    }


def recognises(fields: Fields) -> bool:
    """Latent attention, with experts that are chosen by sigmoid scores and a bias."""
    sigmoid = fields.get("moe_router_score_function") == "sigmoid" and fields.get("moe_router_enable_expert_bias")
    return bool(fields.get("multi_latent_attention") and sigmoid)


_SAME = ("num_key_value_heads", "head_dim")

FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    fields=(
        *(option for option in DECODER_FIELDS if option.hf not in _SAME),
        # No default: transformers' is 1536, and null means something else.
        Field("q_lora_rank", "q_lora_rank", lambda config: config["q_lora_rank"]),
        Field("kv_lora_rank", "kv_lora_rank"),
        Field("qk_nope_head_dim", "qk_head_dim"),
        Field("qk_rope_head_dim", "qk_pos_emb_head_dim"),
        Field("v_head_dim", "v_head_dim"),
        Field("n_routed_experts", "num_moe_experts", aliases=("num_local_experts", "num_experts")),
        Field("num_experts_per_tok", "moe_router_topk"),
        Field("moe_intermediate_size", "moe_ffn_hidden_size"),
        Field("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    ),
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    megatron={
        **RMS_SWIGLU,
        **MOE,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "add_qkv_bias": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
    },
    reads=(read_latent_rope, read_heads, read_layers, read_groups),
    writes=(write_latent_rope, write_layers, write_groups),
    # The last line is about training, about who loads the model, or for transformers' own code.
    handled=ROPE_OPTIONS
    | {"num_key_value_heads", "head_dim", "qk_head_dim", "first_k_dense_replace", "n_shared_experts"}
    | {"num_nextn_predict_layers", "num_mtp_layers", "n_group", "topk_group"}
    | {"aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "auto_map"},
    gives=frozenset({"mtp_num_layers", "moe_shared_expert_intermediate_size"}),
    table=table,
    dims=lambda fields: latent_dims(fields) | {"two_hidden": 2 * fields["hidden_size"]},
    copies=copies,
    quantised=("*.self_attn.*_proj.weight", "*.self_attn.kv_a_proj_with_mqa.weight", "*.mlp.*_proj.weight"),
    ignored={"model.layers.{layer}.self_attn.rotary_emb.inv_freq": "a buffer, computed from rope_theta"},
    recognises=recognises,
)

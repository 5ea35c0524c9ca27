"""A whole grid of ranks in one process: apply a plan's pieces with numpy, and models to do it with."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import strategies as st

from bridge_core.families import family_for
from bridge_core.geometry import Piece, View
from bridge_core.plan import Plan, Shard
from bridge_core.topology import ParallelLayout

BASE = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 3,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MOE = {"num_experts_per_tok": 2}
TEXT = {name: value for name, value in BASE.items() if name != "tie_word_embeddings"}
VISION = {
    "depth": 3,
    "hidden_size": 16,
    "num_heads": 8,
    "intermediate_size": 24,
    "in_channels": 3,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 12,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [0, 2],
}
IMAGES = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
HYBRID = (
    {name: value for name, value in BASE.items() if name not in ("rms_norm_eps", "rope_theta")}
    | MOE
    | {
        "architectures": ["NemotronHForCausalLM"],
        "hidden_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 2,
        "ssm_state_size": 3,
        "n_groups": 8,
        "n_routed_experts": 8,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    }
)
LATENT = {key: value for key, value in BASE.items() if key not in ("head_dim", "num_key_value_heads")} | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 16,  # eh_proj is cut along it
    "num_key_value_heads": 8,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}

SHARED = MOE | {"num_experts": 8, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16}
DELTA = BASE | {
    "hidden_size": 16,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
SEEING = IMAGES | {"vision_config": VISION | {"out_hidden_size": 16, "deepstack_visual_indexes": []}}

CONFIGS = {
    "llama": BASE | {"architectures": ["LlamaForCausalLM"]},
    "llama-tied": BASE | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "qwen2": BASE | {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": BASE | {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": BASE
    | MOE
    | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 8, "norm_topk_prob": True},
    "qwen3_moe-mixed": BASE
    | MOE
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "moe_intermediate_size": 8,
        "mlp_only_layers": [0, 2],
    },
    "mixtral": BASE | MOE | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
    "qwen3_next": DELTA | SHARED | {"architectures": ["Qwen3NextForCausalLM"], "mlp_only_layers": [2]},
    "qwen3_5_text": DELTA | {"architectures": ["Qwen3_5ForCausalLM"]},
    "qwen3_5": SEEING
    | {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": DELTA | {"mtp_num_hidden_layers": 1}},
    "qwen3_5_moe": SEEING
    | {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": DELTA | SHARED | {"mtp_num_hidden_layers": 1},
    },
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": TEXT,
        "vision_config": VISION,
        **IMAGES,
    },
    "qwen3_vl_moe": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": TEXT | MOE | {"num_experts": 8, "moe_intermediate_size": 8},
        "vision_config": VISION,
        **IMAGES,
    },
    "nemotron_h": HYBRID | {"hybrid_override_pattern": "M*E-"},
    "nemotron_h-latent": HYBRID
    | {"hybrid_override_pattern": "EMM*", "num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*ME"}
    | {"moe_latent_size": 8},
    "nemotron_h-dense": HYBRID | {"hybrid_override_pattern": "MMMM", "tie_word_embeddings": True},
    "deepseek_v3": LATENT | {"q_lora_rank": 5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
    "deepseek_v3-moonlight": LATENT | {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2},
}


def make_plan(config: dict, layout: ParallelLayout, **options) -> Plan:
    family = family_for(config)
    return Plan(family, family.to_megatron(config), layout, **options)


@st.composite
def layouts(draw, config: dict):
    """Layouts that the configuration admits, uneven pipelines and all."""
    text = config.get("text_config", config)
    moe = "num_experts_per_tok" in text and "E" in config.get("hybrid_override_pattern", "E")
    depths = family_for(config).to_megatron(config).get("mtp_num_layers") or 0
    pp = draw(st.sampled_from([1, 2, 4]))
    options = {
        "tp": draw(st.sampled_from([1, 2, 4, 8])),
        "pp": pp,
        "vpp": draw(st.sampled_from([1, 2] if pp == 2 else [1])),
        "ep": draw(st.sampled_from([1, 2, 4, 8])) if moe else 1,
        "etp": draw(st.sampled_from([1, 2, 4])) if moe else None,
        "cp": draw(st.sampled_from([1, 2])),
    }
    uneven = draw(st.sampled_from(["even", "first", "string"]))
    if uneven == "first" and pp == 2 and options["vpp"] == 1:
        options["num_layers_in_first_pipeline_stage"] = draw(st.sampled_from([1, 3]))
    if uneven == "string" and pp == 4:
        text = draw(st.sampled_from(["Et|tt||tL", "E|tt|t|tL"]))
        options["pipeline_model_parallel_layout"] = text.replace("L", "m" * depths + "L")
    return ParallelLayout(**options)


def distinct(plan: Plan) -> dict[str, np.ndarray]:
    """HF tensors in which no two elements of the whole model are equal; 0 and -1 do not occur. Without copies."""
    tensors, at = {}, 1
    for name, shape in plan.hf_tensors.items():
        if name in plan.copies:
            continue
        tensors[name] = np.arange(at, at + prod(shape), dtype=np.int64)
        at += prod(shape)
    return tensors


def look(flat: np.ndarray, shape, view: View) -> np.ndarray:
    size = flat.itemsize
    return np.ndarray(shape, flat.dtype, flat, view.offset * size, [n * size for n in view.strides])


def apply(piece: Piece, source: np.ndarray, target: np.ndarray) -> None:
    look(target, piece.shape, piece.target)[...] = look(source, piece.shape, piece.source)


def load_shard(shard: Shard, hf: dict[str, np.ndarray]) -> np.ndarray:
    """A parameter in its shape, filled from the HF tensors: every element once."""
    flat = np.full(prod(shard.shape), -1, np.int64)
    for piece in shard.pieces:
        apply(piece, hf[piece.source.tensor], flat)
    array = flat.reshape(shard.shape)
    for box in shard.pad:
        region = tuple(slice(s, s + n) for s, n in zip(*box, strict=True))
        assert (array[region] == -1).all(), "a piece wrote into the padding"
        array[region] = 0
    assert (array != -1).all(), f"{shard.param}: elements were left unwritten"
    return array


def load_rank(plan: Plan, rank: int, hf: dict[str, np.ndarray]) -> dict[tuple[int, str], np.ndarray]:
    """Every parameter of a rank by (chunk, name), in its shape."""
    return {(shard.chunk, shard.param): load_shard(shard, hf) for shard in plan.local_shards(rank)}


def save_shard(shard: Shard, array: np.ndarray, hf: dict[str, np.ndarray]) -> None:
    """Write a parameter back into the HF tensors; a second copy of something has to bring the same values."""
    flat = array.reshape(-1)
    for piece in shard.pieces:
        back = piece.inverse()
        before = look(hf[back.target.tensor], back.shape, back.target).copy()
        now = look(flat, back.shape, back.source)
        assert ((before == -1) | (before == now)).all(), f"{shard.param}: replicas differ"
        apply(back, flat, hf[back.target.tensor])


def save_rank(plan: Plan, rank: int, params: dict, hf: dict[str, np.ndarray]) -> None:
    """Write what a rank holds back into the HF tensors."""
    for shard in plan.local_shards(rank):
        save_shard(shard, params[shard.chunk, shard.param], hf)

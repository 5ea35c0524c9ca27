"""Tiny real transformers models with all weights distinct, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MODELS = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131072}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        EXPERTS | {"head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3_moe-mixed": (
        "Qwen3MoeConfig",
        EXPERTS | {"head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    "mixtral": ("MixtralConfig", EXPERTS | {"num_local_experts": 8}),
}


# --- Hybrids, multimodal models and latent attention -------------------------------------------------
# Every size divides by four, and sizes that could be mistaken for one another differ.

_GATED_DELTA_NET = COMMON | {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
_SHARED_EXPERT = EXPERTS | {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_DEEPSTACK = _VISION | {"depth": 3, "deepstack_visual_indexes": [0, 2]}
_QWEN3_VL = COMMON | {"head_dim": 16}
_NEMOTRON_H = {key: value for key, value in COMMON.items() if key != "num_hidden_layers"} | {
    "hybrid_override_pattern": "MEM*-EM*",
    "head_dim": 16,
    "ssm_state_size": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 4,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}
_LATENT_ATTENTION = COMMON | {
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}

HYBRIDS = {
    "qwen3_next": ("Qwen3NextForCausalLM", _GATED_DELTA_NET | _SHARED_EXPERT),
    "qwen3_next-mixed": ("Qwen3NextForCausalLM", _GATED_DELTA_NET | _SHARED_EXPERT | {"mlp_only_layers": [1]}),
    "qwen3_5-text": ("Qwen3_5ForCausalLM", _GATED_DELTA_NET),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": _GATED_DELTA_NET, "vision_config": _VISION},
    ),
    "qwen3_5-tied": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": _GATED_DELTA_NET | {"tie_word_embeddings": True},
            "vision_config": _VISION,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5_moe-text": ("Qwen3_5MoeForCausalLM", _GATED_DELTA_NET | _SHARED_EXPERT),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": _GATED_DELTA_NET | _SHARED_EXPERT, "vision_config": _VISION},
    ),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"text_config": _QWEN3_VL, "vision_config": _DEEPSTACK}),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": _QWEN3_VL | EXPERTS | {"num_experts": 8, "moe_intermediate_size": 48},
            "vision_config": _DEEPSTACK,
        },
    ),
    "nemotron_h": ("NemotronHForCausalLM", _NEMOTRON_H),
    "nemotron_h-latent": ("NemotronHForCausalLM", _NEMOTRON_H | {"moe_latent_size": 16}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT_ATTENTION),
    "deepseek_v3-moonlight": (
        "DeepseekV3ForCausalLM",
        _LATENT_ATTENTION | {"q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    ),
}
"""Model class and configuration by name. Some of these classes do not save in their publisher's layout, and none
saves prediction layers: see `bridge_core.testing.hf_layouts`."""


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """A transformers model in float32, in evaluation mode; no two of its weights are equal.

    `changes` are options of its configuration, `text_config` and `vision_config` as wholes.
    """
    import torch
    import transformers

    if name in HYBRIDS:
        class_name, options = HYBRIDS[name]
        model_class = getattr(transformers, class_name)
        model = model_class(model_class.config_class(**options | changes))
    else:
        config_class, options = MODELS[name]
        config = getattr(transformers, config_class)(**COMMON | options | changes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    fill_distinct(model)
    return model.to(torch.float32).eval()


def fill_distinct(model: Module, *, seed: int = 7) -> None:
    """Give every element of every weight its own value, of a size that keeps activations sane.

    Norms stay near what they are created with, one or (where one is added in use) zero.
    """
    import torch

    weights = dict(model.named_parameters())
    weights |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    total = sum(weight.numel() for weight in weights.values())
    # A shuffled ramp: all values differ by at least one step, and neighbours have nothing in common.
    values = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).double() / total - 0.5
    at = 0
    with torch.no_grad():
        for name, weight in weights.items():
            part = values[at : at + weight.numel()].reshape(weight.shape)
            weight.copy_(weight.flatten()[0].item() + 0.2 * part if "norm" in name else 0.3 * part)
            at += weight.numel()


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Save as transformers does, quietly."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder

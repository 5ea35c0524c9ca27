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


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """A transformers model in float32, in evaluation mode; no two of its weights are equal."""
    import torch
    import transformers

    config_class, options = MODELS[name]
    config = getattr(transformers, config_class)(**COMMON | options | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    fill_distinct(model)
    return model.to(torch.float32).eval()


def fill_distinct(model: Module) -> None:
    """Give every element of every parameter its own value, of a size that keeps activations sane."""
    import torch

    total = sum(parameter.numel() for parameter in model.parameters())
    # A shuffled ramp: all values differ by at least one step, and neighbours have nothing in common.
    values = torch.randperm(total, generator=torch.Generator().manual_seed(7)).double() / total - 0.5
    at = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = values[at : at + parameter.numel()].reshape(parameter.shape)
            parameter.copy_(1 + 0.2 * part if "norm" in name else 0.3 * part)
            at += parameter.numel()


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Save as transformers does, quietly."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder

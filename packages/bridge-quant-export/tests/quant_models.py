"""Small transformers models whose sizes hold blocks of 128, on one rank and on two; all weights distinct."""

from __future__ import annotations

from pathlib import Path

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 131,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}


def make(name: str, folder: Path, **changes: int) -> Path:
    """Save `qwen3`, `qwen3_moe` or `qwen2` (with biases) as transformers does, in fp32; `changes` are options."""
    import torch
    import transformers

    from bridge_core.testing.hf_models import save_model

    kind, options = {"qwen3": ("Qwen3", {}), "qwen3_moe": ("Qwen3Moe", EXPERTS), "qwen2": ("Qwen2", {})}[name]
    sizes = {key: value for key, value in SIZES.items() if name != "qwen2" or key != "head_dim"}
    config = getattr(transformers, f"{kind}Config")(**sizes | options | changes)
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.04 * noise)
    return save_model(model, folder)

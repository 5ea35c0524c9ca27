"""HF checkpoints of a given shape, made of cheap pseudo-random bytes; written without torch.

Run as a program: `python synthetic.py SHAPE FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from bridge_core.checkpoint.hf_folder import CONFIG, INDEX
from bridge_core.checkpoint.hf_layout import lay_out_files
from bridge_core.families import family_for
from bridge_core.plan import Plan
from bridge_core.topology import ParallelLayout

_COMMON = {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"}

# Published sizes of the models, but for "many-small": 48 layers x 128 experts of tiny width.
SHAPES: dict[str, dict] = {
    "qwen3-1.7b": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "many-small": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1024,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "qwen3-235b-a22b": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}


def write(
    config: dict, folder: Path, *, dtype: str = "BF16", seed: int = 0, max_shard_size: int = 5_000_000_000
) -> int:
    """Write a checkpoint of a configuration; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(family_for(config), family_for(config).to_megatron(config), ParallelLayout())
    layout = lay_out_files(plan.hf_tensors, dict.fromkeys(plan.hf_tensors, dtype), max_shard_size)
    random = np.random.default_rng(seed)
    block = random.integers(0, 256, 1 << 24, dtype=np.uint8).tobytes()
    for file in layout.files:
        with open(folder / file.name, "wb") as out:
            out.write(file.header)
            left = file.nbytes - len(file.header)
            while left:
                # Another rotation of the block each time, so that no two tensors are equal.
                at = int(random.integers(0, len(block) - 1))
                part = (block[at:] + block[:at])[: min(left, len(block))]
                left -= out.write(part)
    if len(layout.files) > 1:
        (folder / INDEX).write_text(layout.index(), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2), encoding="utf-8")
    return layout.nbytes


if __name__ == "__main__":
    # Live ranks write files side by side: several, so that each may have one.
    limit = {"qwen3-0.6b": 200_000_000}.get(sys.argv[1], 5_000_000_000)
    print(write(SHAPES[sys.argv[1]], Path(sys.argv[2]), max_shard_size=limit))

"""The memory of an export does not grow with the model: a layer is packed at a time, and written."""

from __future__ import annotations

import sys

import pytest
from memory_jobs import peak_of_export

pytest.importorskip("megatron.core", reason="live models need megatron-core")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "dtype": "float32",
}
LARGEST = 2 * 2048 * 512 * 4
"""Bytes of the largest weight of a layer: gate and up."""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_depth_costs_no_memory(rank_pool, tmp_path):
    for peaks in rank_pool.run(peak_of_export, CONFIG, {"tp": 2}, str(tmp_path), [2, 12], ranks=[0, 1]):
        (shallow, first), (deep, second) = peaks
        assert deep > 4 * shallow
        # Less than this rank's half of the largest weight: of gate or up a copy in order, and its packed rows.
        assert max(first, second) < LARGEST // 2, peaks
        assert second - first < LARGEST // 2, peaks

"""Exports stream: what a rank needs beside its component does not grow with any component, its own or another's."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core.models.mimo.comm", reason="live components need megatron-core 0.17")
pytest.importorskip("transformers", reason="configurations are transformers'")

from mimo_memory_jobs import peaks_of_exports

MATRIX = 2048 * 512 * 4
"""Bytes of the largest tensor of the folder: the projections of an MLP."""
BUCKET = 2 * MATRIX


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_depth_costs_no_memory(rank_pool, tmp_path):
    assert 8 * BUCKET <= 16 * 3 * MATRIX / 3
    results = rank_pool.run(peaks_of_exports, config(), str(tmp_path), [8, 24], BUCKET, ranks=range(2))
    for rank, (shallow, deep) in enumerate(results):
        if rank == 0:
            assert deep["held"] - shallow["held"] > 16 * 3 * MATRIX
        # In place: at most a tensor that is put together before it is written.
        assert deep["save"] < 2 * MATRIX, results
        assert deep["save"] - shallow["save"] < MATRIX, results
        # The bucket that the consumer still holds, the next one, and the sum's own buffers, whatever the depth.
        assert deep["stream"] < 8 * BUCKET, results
        assert deep["stream"] - shallow["stream"] < 2 * BUCKET, results


def config():
    """A small tower, and a language model whose layers are 16 MB."""
    from bridge_core.testing.hf_models import make_model

    tiny = make_model("qwen3_vl").config.to_dict()
    wide = {"hidden_size": 512, "intermediate_size": 2048}
    return tiny | {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": tiny["text_config"] | wide,
        "vision_config": tiny["vision_config"] | {"out_hidden_size": 512},
    }

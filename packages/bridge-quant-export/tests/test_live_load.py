"""Packed checkpoints loaded into live models: every rank dequantises its own part."""

from __future__ import annotations

import pytest
import torch
from live_jobs import load_packed
from packed_folders import write_packed
from quant_models import make
from safetensors.torch import load_file

from bridge_core import ParallelLayout

pytest.importorskip("megatron.core", reason="live models need megatron-core")

CASES = [
    ("qwen3", {"tp": 2}, "nvfp4", "modelopt", False),
    ("qwen3", {"tp": 2, "pp": 2}, "fp8_block", "modelopt", False),
    ("qwen3", {"tp": 2}, "int4", "compressed-tensors", True),
    ("qwen3_moe", {"ep": 2, "dp": 2}, "w4a16_nvfp4", "compressed-tensors", False),
    ("qwen3_moe", {"tp": 2, "ep": 1, "etp": 2}, "int4_awq", "modelopt", False),
]


@pytest.mark.parametrize(
    ("name", "layout", "kind", "writer", "one_reader"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3]}" for c in CASES]
)
def test_every_rank_reads_its_own_part(rank_pool, tmp_path, name, layout, kind, writer, one_reader):
    plain = make(name, tmp_path / "hf", num_hidden_layers=2)
    packed, read = write_packed(plain, tmp_path, lambda module: kind, writer)
    size = ParallelLayout(**layout).world_size
    reports = rank_pool.run(
        load_packed, str(packed), layout, str(tmp_path / "out"), ranks=range(size), one_reader=one_reader
    )
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(read / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    stored = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    whole = sum(tensor.nbytes for tensor in expected.values())
    for report in reports:
        # Packed bytes are read, and no rank of several reads them all (but the one that reads for its node).
        assert report.bytes_read <= stored < whole
    if not one_reader:
        assert max(report.bytes_read for report in reports) < 0.8 * stored

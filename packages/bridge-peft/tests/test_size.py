"""The cost of an offline conversion is the adapter's: bytes and memory counted for a base of 235 billion parameters."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "offline_export.py"


@pytest.mark.slow
def test_an_export_reads_the_adapter_and_nothing_else(tmp_path):
    """All 94 layers and 128 experts of the sizes of Qwen3-235B-A22B, at rank 1: 0.31 GB of factors."""
    spec = importlib.util.spec_from_file_location("offline_export", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.run(tmp_path, 1, 94)
    adapter, export = found["adapter_bytes"], found["export"]
    assert adapter > 300_000_000
    assert export["tensors_read"] == adapter
    # Beside them: config.json, run_config.yaml, the table of contents, and the heads of items.
    assert adapter <= export["kernel_read"] < adapter + 20_000_000
    assert export["peak_mb"] < 1000

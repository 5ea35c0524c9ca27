"""The default save, by its writes: replicas share the work, and columns are exchanged for whole rows first."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime.helpers import stored
from runtime.save_jobs import save_in_place

from bridge_core import ParallelLayout
from bridge_core.testing.hf_models import make_model, save_model

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the model is transformers'")

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux says what a process writes")

REPLICAS = [{"dp": 2}, {"cp": 2}, {"tp": 2, "dp": 2}]
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")


def save(pool, folder, layout, out):
    """What each rank reports, the writes of all of them to tensors, as (name, first byte of it, bytes), and counts.

    Every byte of every tensor is written once.
    """
    ranks = range(ParallelLayout(**layout).world_size)
    results = pool.run(save_in_place, str(folder), layout, str(out), ranks=ranks)
    for file in sorted(folder.glob("*.safetensors*")):
        assert (out / "second" / file.name).read_bytes() == file.read_bytes(), file.name
    tensors, writes = stored(folder), []
    for report, found, _ in results:
        mine = [
            (name, offset - first, count)
            for file, offset, count in found
            for name, (where, first, nbytes, _) in tensors.items()
            if file == where and first <= offset < first + nbytes
        ]
        assert sum(count for *_, count in mine) == report.bytes_written
        writes += mine
    for name, (_, _, nbytes, _) in tensors.items():
        at = 0
        for first, count in sorted((first, count) for written, first, count in writes if written == name):
            assert first == at, name
            at += count
        assert at == nbytes, name
    return [report for report, *_ in results], writes, [counted for *_, counted in results]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("layout", REPLICAS, ids=lambda value: str(value).replace(" ", ""))
def test_replicas_share_the_work(device_ranks, folders, tmp_path, name, layout):
    reports, _, _ = save(device_ranks, folders(name), layout, tmp_path)
    shares = [report.bytes_written for report in reports]
    assert max(shares) <= 1.5 * min(shares), shares


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_columns_are_exchanged_for_whole_rows(device_ranks, folders, tmp_path, name):
    """Of a row-parallel weight each of two ranks holds half of every row: no write is shorter than a whole one."""
    folder = folders(name)
    reports, writes, _ = save(device_ranks, folder, {"tp": 2}, tmp_path)
    tensors = stored(folder)
    cut = [name for name in tensors if name.endswith(ROW_PARALLEL)]
    for report in reports:
        assert report.exchanges == len(cut) > 0
        assert report.bytes_sent == sum(tensors[name][2] for name in cut) // 4  # half of its half
    for name, first, count in writes:
        _, _, nbytes, shape = tensors[name]
        row = nbytes // shape[0] if len(shape) == 2 else 1
        assert first % row == count % row == 0, name
    assert all(len([1 for written, *_ in writes if written == name]) == 2 for name in cut)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose weights outweigh headers, configuration and the ranks' words."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_attention_heads": 4}
    return save_model(make_model("qwen3", num_hidden_layers=2, **sizes), tmp_path_factory.mktemp("wide") / "hf")


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_the_kernel_counts_what_the_report_says(device_ranks, wide, tmp_path, layout):
    reports, _, counts = save(device_ranks, wide, layout, tmp_path)
    for report, counted in zip(reports, counts, strict=True):
        # With headers, other files and gloo's messages, of which only the exchanged columns grow with the model.
        assert report.bytes_written <= counted
        assert counted <= 1.02 * (report.bytes_written + report.bytes_sent) + 64 * 1024

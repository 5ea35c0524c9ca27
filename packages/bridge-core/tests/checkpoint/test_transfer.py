"""The three paths of the offline executor write the same bytes, and casts are numpy's."""

from __future__ import annotations

import os
import re
import tracemalloc
from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_core.checkpoint import transfer as module
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.checkpoint.transfer import Job, share, transfer
from bridge_core.dtypes import numpy_dtype
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Piece, View, slabs

PATHS = {"kernel": (1, 1), "gathered": (1 << 40, 1), "staged": (1 << 40, 1 << 40)}


def fused_jobs(source: str, target: str, groups: int, width: int, *, dtype: str = "BF16") -> list[Job]:
    """q, k and v of two layers into two fused tensors, as an import does it; heads and tails around each."""
    itemsize = {"BF16": 2, "F32": 4}[dtype]
    rows = (2, 1, 1)
    slots = sum(rows)
    jobs, read, write = [], 0, 0
    for number in range(2):
        parts, before = [], 0
        for count in rows:
            shape = (groups * count, width)
            stored = Stored(source, read, "BF16", shape)
            read += stored.nbytes
            piece = Piece(
                (groups, count, width),
                View("hf", 0, (count * width, width, 1)),
                View("megatron", before * width, (slots * width, width, 1)),
            )
            parts.append((stored, piece))
            before += count
        head, tail = bytes([number + 1]) * 5, bytes([number + 101]) * 3
        data = Stored(target, write + len(head), dtype, (groups * slots, width))
        jobs.append(Job(data, tuple(parts), head, tail))
        write = data.offset + groups * slots * width * itemsize + len(tail)
    return jobs


def run(folder, jobs, **options) -> bytes:
    end = max(job.target.offset + job.target.nbytes + len(job.tail) for job in jobs)
    with open(folder / "target", "wb") as file:
        file.truncate(end)
    transfer(jobs, **options)
    return (folder / "target").read_bytes()


@settings(max_examples=25)
@given(groups=st.integers(1, 5), width=st.integers(1, 40), threads=st.sampled_from([1, 2, 3]))
def test_all_paths_write_the_same_bytes(tmp_path_factory, groups, width, threads):
    folder = tmp_path_factory.mktemp("transfer")
    total = 2 * 4 * groups * width
    source = np.random.default_rng(1).integers(0, 1 << 16, total, dtype=np.uint16)
    source.tofile(folder / "source")
    jobs = fused_jobs(str(folder / "source"), str(folder / "target"), groups, width)
    results = {
        name: run(folder, jobs, threads=threads, kernel_run=kernel, gather_run=gather)
        for name, (kernel, gather) in PATHS.items()
    }
    assert len(set(results.values())) == 1
    half = total // 2
    q, k, v = np.split(source[:half], [2 * groups * width, 3 * groups * width])
    expected = np.concatenate(
        [q.reshape(groups, 2, width), k.reshape(groups, 1, width), v.reshape(groups, 1, width)], axis=1
    )
    assert results["kernel"][5 : 5 + 2 * half] == expected.tobytes()


@pytest.mark.parametrize("path", PATHS)
def test_every_byte_is_counted_on_its_path(tmp_path, path):
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "source")
    jobs = fused_jobs(str(tmp_path / "source"), str(tmp_path / "target"), 2, 4)
    (tmp_path / "target").write_bytes(bytes(1000))
    kernel, gather = PATHS[path]
    seen: list[int] = []
    moved = transfer(jobs, kernel_run=kernel, gather_run=gather, progress=seen.append)
    assert moved._asdict() == {"kernel": 0, "gathered": 0, "staged": 0, "read": 128} | {path: 128}
    assert sum(seen) == 128


def test_where_the_kernel_cannot_copy_bytes_go_through_a_buffer(tmp_path, monkeypatch):
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "source")
    jobs = fused_jobs(str(tmp_path / "source"), str(tmp_path / "target"), 2, 4)
    expected = run(tmp_path, jobs, kernel_run=1)

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert run(tmp_path, jobs, kernel_run=1) == expected


def test_a_cast_is_the_nearest_value_and_bounded_blocks_change_nothing(tmp_path, monkeypatch):
    values = np.random.default_rng(2).standard_normal(64).astype(ml_dtypes.bfloat16)
    values.tofile(tmp_path / "source")
    jobs = fused_jobs(str(tmp_path / "source"), str(tmp_path / "target"), 2, 4, dtype="F32")
    whole = run(tmp_path, jobs)
    monkeypatch.setattr(module, "STAGING", 40)  # two rows of a target at a time
    assert run(tmp_path, jobs) == whole
    data = np.frombuffer(whole, np.float32, 32, offset=5)
    assert np.array_equal(np.sort(data), np.sort(values[:32].astype(np.float32)))


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        ("F32", "F16", 65520.0),
        ("BF16", "F16", 1e6),
        ("F32", "BF16", 3.4e38),
        ("F64", "BF16", 1e39),
        ("F64", "F32", -1e39),
    ],
)
def test_a_value_beyond_the_new_range_is_named(tmp_path, source, target, value):
    """Beside values that are large and fit, and others that were not finite before."""
    largest = (
        65280.0
        if source == "BF16"
        else {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38}[target]
    )
    for bad in (value, 1.0):
        values = np.array([bad, largest, -largest, np.inf, np.nan]).astype(numpy_dtype(source))
        values.tofile(tmp_path / "source")
        view = View("t", 0, (1,))
        stored = Stored(str(tmp_path / "source"), 0, source, (5,))
        job = Job(Stored(str(tmp_path / "target"), 0, target, (5,)), ((stored, Piece((5,), view, view)),))
        if bad == value:
            with pytest.raises(
                CheckpointError,
                match=rf"do not fit[\s\S]*source[\s\S]*1 larger[\s\S]*{re.escape(str(float(values[0])))}",
            ):
                run(tmp_path, [job])
        else:
            assert run(tmp_path, [job]) == values.astype(numpy_dtype(target)).tobytes()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0, 100])
def test_a_source_that_ends_early_is_named(tmp_path, path, size):
    """However its bytes are moved: none is made up."""
    (tmp_path / "source").write_bytes(bytes(size))
    jobs = fused_jobs(str(tmp_path / "source"), str(tmp_path / "target"), 2, 4)
    (tmp_path / "target").write_bytes(bytes(1000))
    kernel, gather = PATHS[path]
    with pytest.raises(CheckpointError, match=r"ended while it was being read[\s\S]*source[\s\S]*more bytes"):
        transfer(jobs, kernel_run=kernel, gather_run=gather)


def test_a_kernel_that_copies_nothing_is_not_taken_at_its_word(tmp_path, monkeypatch):
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "source")
    jobs = fused_jobs(str(tmp_path / "source"), str(tmp_path / "target"), 2, 4)
    expected = run(tmp_path, jobs, kernel_run=1)
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments: 0)
    assert run(tmp_path, jobs, kernel_run=1) == expected


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(1, 40))
def test_blocks_are_bounded_and_follow_one_another(shape, most):
    numbers = np.arange(prod(shape)).reshape(shape)
    found = []
    for box in slabs(shape, most):
        assert box.numel <= most
        found.append(numbers[tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))].ravel())
    assert np.array_equal(np.concatenate(found), numbers.ravel())


def test_gathering_holds_the_runs_of_one_block_at_a_time(tmp_path, monkeypatch):
    """16 MB in runs of 256 bytes would be 65,536 Python objects and more."""
    rows, width = 4 * 16_384, 128
    source = np.random.default_rng(3).integers(0, 1 << 16, rows * width, dtype=np.uint16)
    source.tofile(tmp_path / "source")
    stored = Stored(str(tmp_path / "source"), 0, "BF16", (rows, width))
    # Two tensors of half the rows, row by row in turn.
    parts = []
    for number in range(2):
        view = View("hf", number * rows * width // 2, (width, 1))
        parts.append((stored, Piece((rows // 2, width), view, View("m", number * width, (2 * width, 1)))))
    job = Job(Stored(str(tmp_path / "target"), 0, "BF16", (rows, width)), tuple(parts))
    monkeypatch.setattr(module, "STAGING", 1 << 18)
    (tmp_path / "target").touch()
    os.truncate(tmp_path / "target", source.nbytes)
    tracemalloc.start()
    try:
        assert transfer([job], threads=1).gathered == source.nbytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "target").read_bytes() == source.reshape(2, rows // 2, width).swapaxes(0, 1).tobytes()
    assert peak < 2_000_000


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 5))
def test_shares_are_disjoint_complete_and_in_order(sizes, workers):
    jobs = [Job(Stored("f", 0, "U8", (size,)), ()) for size in sizes]
    shares = [share(jobs, rank, workers) for rank in range(workers)]
    assert [job for part in shares for job in part] == jobs
    if sizes and max(sizes, default=0):
        biggest = max(sum(prod(job.target.shape) for job in part) for part in shares)
        assert biggest <= sum(sizes) / workers + max(sizes)


def test_a_file_system_that_copies_nothing_is_not_taken_for_the_end_of_a_file(tmp_path, monkeypatch):
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "source")
    jobs = fused_jobs(str(tmp_path / "source"), str(tmp_path / "target"), 2, 4)
    (tmp_path / "target").write_bytes(bytes(1000))
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments: 0)
    with pytest.raises(CheckpointError, match=r"copied nothing[\s\S]*source[\s\S]*0 bytes of a file of 128"):
        transfer(jobs, kernel_run=1)

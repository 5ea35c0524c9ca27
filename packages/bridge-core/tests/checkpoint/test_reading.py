"""Regions of files: the values are those of numpy's views, the bytes those that were asked of the system."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_core.checkpoint import reading
from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.reading import LONG_READ, SHORTEST_READ, Reader, strided
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.checkpoint.transfer import Job, gather
from bridge_core.dtypes import numpy_dtype
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Piece, View, row_major


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A vector of 200,000 different numbers that does not start at the start of its file."""
    values = np.arange(200_000, dtype=np.float32)
    path = tmp_path_factory.mktemp("reading") / "data"
    path.write_bytes(b"head" + values.tobytes())
    return Stored(str(path), 4, "F32", values.shape), values


@contextmanager
def reader():
    with ExitStack() as stack:
        yield Reader(OpenFiles(stack))


def part(shape, strides, offset=0) -> Piece:
    return Piece(shape, View("", offset, strides), View("", 0, row_major(shape)))


@settings(max_examples=200)
@given(data=st.data())
def test_any_view_is_what_numpy_gives(stored, data):
    tensor, values = stored
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    strides = tuple(data.draw(st.integers(1, 5000)) for _ in shape)
    piece = part(shape, strides, data.draw(st.integers(0, 50_000)))
    with reader() as found:
        assert np.array_equal(found.values(tensor, piece), strided(values, shape, piece.source.offset, strides))
        target = np.zeros(piece.numel, np.float32)
        if found.straight(tensor, piece, target):
            assert np.array_equal(target.reshape(shape), strided(values, shape, piece.source.offset, strides))


@pytest.mark.parametrize("columns", [16, 32, 256])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_columns_are_read_alone_from_64_bytes_on(stored, columns, dtype):
    """As a rank of a row-parallel weight has them, 512 wide; read to their place, and through a cast."""
    tensor, values = stored
    job = Job(Stored("", 0, dtype, (300, columns)), ((tensor, part((300, columns), (512, 1), 512)),))
    with reader() as found:
        ((_, block),) = gather(job, found)
        expected = strided(values, (300, columns), 512, (512, 1)).reshape(-1)
        assert np.array_equal(block, expected.astype(numpy_dtype(dtype)))
        assert found.nbytes == 300 * columns * 4


def test_shorter_runs_are_read_with_what_lies_between(stored):
    tensor, values = stored
    columns = SHORTEST_READ // 4 - 1
    with reader() as found:
        got = found.values(tensor, part((300, columns), (512, 1)))
        assert np.array_equal(got, strided(values, (300, columns), 0, (512, 1)))
        assert found.nbytes == (299 * 512 + columns) * 4


def test_what_lies_in_one_stretch_is_read_with_one_call(stored, monkeypatch):
    """Rows whose order is another in the target, as when heads are interleaved."""
    tensor, values = stored
    calls = count_calls(monkeypatch)
    piece = Piece((8, 2, 64), View("", 0, (128, 64, 1)), View("", 0, (64, 512, 1)))
    with reader() as found:
        ((_, block),) = gather(Job(Stored("", 0, "F32", (1024,)), ((tensor, piece),)), found)
        assert np.array_equal(strided(block, (8, 2, 64), 0, (64, 512, 1)).reshape(-1), values[:1024])
        assert (len(calls), found.nbytes) == (1, 4096)


def test_long_runs_go_to_where_they_belong_in_the_order_of_the_file(stored, monkeypatch):
    tensor, values = stored
    calls = count_calls(monkeypatch)
    length = LONG_READ // 4
    piece = Piece((2, 2, length), View("", 0, (length, 2 * length, 1)), View("", 0, (2 * length, length, 1)))
    into = np.zeros(4 * length, np.float32)
    with reader() as found:
        for _ in gather(Job(Stored("", 0, "F32", into.shape), ((tensor, piece),)), found, into=into):
            pass
    assert np.array_equal(into, values[: 4 * length].reshape(2, 2, length).swapaxes(0, 1).reshape(-1))
    assert calls == [4 + number * LONG_READ for number in range(4)]


def test_the_same_memory_is_used_again_and_padding_is_zero(stored):
    tensor, _ = stored
    made = []

    def allocate(nbytes):
        made.append(nbytes)
        return np.full(nbytes, 255, np.uint8)

    with ExitStack() as stack:
        found = Reader(OpenFiles(stack), allocate)
        for numel in (1000, 800, 1000):
            job = Job(Stored("", 0, "F32", (numel + 24,)), ((tensor, part((numel,), (1,))),))
            ((_, block),) = gather(job, found)
            assert not block[numel:].any()
            assert block[:numel].tolist() == list(range(numel))
    assert made == [4096]


def test_a_system_that_reads_less_than_was_asked_for(stored, monkeypatch):
    tensor, values = stored
    whole = os.preadv
    monkeypatch.setattr(reading.os, "preadv", lambda file, to, offset: whole(file, [to[0][:1000]], offset))
    with reader() as found:
        assert np.array_equal(found.values(tensor, part((5000,), (1,), 7)), values[7:5007])
        assert found.nbytes == 20_000


def test_a_file_that_ends_too_early(stored, tmp_path):
    tensor, _ = stored
    short = tmp_path / "short"
    short.write_bytes(bytes(1000))
    with reader() as found, pytest.raises(CheckpointError, match=r"ended while it was being read[\s\S]*short"):
        found.values(tensor._replace(path=str(short)), part((5000,), (1,)))


def count_calls(monkeypatch) -> list[int]:
    """Offsets of all reads from here on."""
    calls: list[int] = []
    read = os.preadv

    def counted(file, to, offset):
        calls.append(offset)
        return read(file, to, offset)

    monkeypatch.setattr(reading.os, "preadv", counted)
    return calls

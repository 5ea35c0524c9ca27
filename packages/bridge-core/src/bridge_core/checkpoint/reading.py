"""Regions of stored tensors, read from their files: what was asked for, counted, into memory that is used again."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

from bridge_core.checkpoint.encoded import decode, region
from bridge_core.checkpoint.files import OpenFiles, file_ended
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.dtypes import dtype_of, numpy_dtype
from bridge_core.geometry import Box, Piece, Shape, View, row_major, run_length, series

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

SHORTEST_READ = 64
"""Shortest run in bytes that is read by a system call of its own; what lies between shorter ones is read with them.

A call costs as much as copying 4 to 8 KiB, so reading whole rows would take less processor time up to that length. But
then each of N tensor-parallel ranks would read N times its share of every row-parallel weight."""

LONG_READ = 64 * 1024
"""Run in bytes that loses nothing by being read alone."""

_MOST_WITH_GAPS = 64 * 1024 * 1024  # beyond that, short runs are read one by one: memory must not grow with the model
_ALIGN = 64

Allocate = Callable[[int], "np.ndarray"]
"""Makes so many bytes of memory, uninitialised."""


class Reader:
    """Reads for one thread.

    Attributes:
        nbytes: bytes that were asked of files and came, so far.
    """

    def __init__(self, files: OpenFiles, allocate: Allocate | None = None) -> None:
        """`allocate` makes the memory of `block`; by default numpy does."""
        self.nbytes = 0
        self._files = files
        self._staged = _Room()
        self._block = _Room(allocate)

    def block(self, numel: int, dtype: str) -> np.ndarray:
        """Room for a block of a target, uninitialised and flat; the same memory each time."""
        self._block.clear()
        return self._block.take(numel, dtype)

    def values(self, source: Stored, piece: Piece) -> np.ndarray:
        """The elements of a stored tensor that a piece takes, in the piece's shape; of a quantised one, decoded.

        They may lie in memory that the next call uses again.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        self._staged.clear()
        if source.encoded is None or not piece.numel:
            return self._stage(source, piece.shape, piece.source)
        box, view = region(source.shape, piece.shape, piece.source)
        return strided(decode(source, box, self._box), piece.shape, view.offset, view.strides)

    def straight(self, source: Stored, piece: Piece, target: np.ndarray) -> bool:
        """Read a piece to where it belongs in a flat target of the source's dtype, if no other reads would be longer.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        size, length = dtype_of(source.dtype).itemsize, run_length(piece)
        _, span = _read_at_once(piece.shape, piece.source.strides, size)
        if length < span and length * size < LONG_READ:
            return False
        self._read(source, target, piece)
        return True

    def _box(self, stored: Stored, box: Box) -> np.ndarray:
        strides = row_major(stored.shape)
        start = sum(at * stride for at, stride in zip(box.start, strides, strict=True))
        return self._stage(stored, box.shape, View("", start, strides))

    def _stage(self, stored: Stored, shape: Shape, view: View) -> np.ndarray:
        """A region as a strided view of staging memory, which holds it in the order of the file."""
        size = dtype_of(stored.dtype).itemsize
        inner, span = _read_at_once(shape, view.strides, size)
        strides = dict.fromkeys(range(len(shape)), 0) | {axis: view.strides[axis] for axis in inner}
        outer = sorted((axis for axis in range(len(shape)) if axis not in inner), key=lambda axis: -view.strides[axis])
        packed = row_major((*(shape[axis] for axis in outer), span))
        strides |= dict(zip(outer, packed, strict=False))
        room = self._staged.take(prod(shape[axis] for axis in outer) * span if prod(shape) else 0, stored.dtype)
        if room.size:
            source = View("", view.offset, (*(view.strides[axis] for axis in outer), 1))
            piece = Piece((*(shape[axis] for axis in outer), span), source, View("", 0, packed))
            self._read(stored, room, piece)
        return strided(room, shape, 0, [strides[axis] for axis in range(len(shape))])

    def _read(self, stored: Stored, target: np.ndarray, piece: Piece) -> None:
        """Read the runs of a piece, in the order of the file. Every read of a file goes through here."""
        import numpy as np

        size = dtype_of(stored.dtype).itemsize
        descriptor = self._files.descriptor(stored.path, write=False)
        memory = target.view(np.uint8).data
        read = os.preadv
        for first, count, target_step, source_step in series(piece.inverse()):
            at, offset, nbytes = first.source * size, stored.offset + first.target * size, first.length * size
            for _ in range(count):
                got = read(descriptor, (memory[at : at + nbytes],), offset)
                if got < nbytes:
                    got += self._rest(descriptor, memory[at + got : at + nbytes], offset + got, stored.path)
                self.nbytes += got
                at += target_step * size
                offset += source_step * size

    def _rest(self, descriptor: int, memory: memoryview, offset: int, path: str) -> int:
        """Read on where the system read less than it was asked for."""
        done = 0
        while done < len(memory):
            got = os.preadv(descriptor, (memory[done:],), offset + done)
            if not got:
                raise file_ended(path, offset + done, len(memory) - done)
            done += got
        return done


def _read_at_once(shape: Shape, strides: Shape, itemsize: int) -> tuple[frozenset[int], int]:
    """The axes of a view that are read with one call, and the elements from the first to the last of them.

    Innermost first: those that go on without gaps, and those whose runs would be too short alone.
    """
    inner: set[int] = set()
    span = 1
    for axis in sorted(range(len(shape)), key=lambda axis: strides[axis]):
        more = (shape[axis] - 1) * strides[axis] + span
        short = span * itemsize < SHORTEST_READ and more * itemsize <= _MOST_WITH_GAPS
        if shape[axis] > 1 and strides[axis] > span and not short:
            break
        inner.add(axis)
        span = max(more, span)
    return frozenset(inner), span


class _Room:
    """Memory that is used again; it grows to the most that was in use at once."""

    def __init__(self, allocate: Allocate | None = None) -> None:
        self._allocate = allocate or _allocate
        self._memory: np.ndarray | None = None
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def take(self, numel: int, dtype: str) -> np.ndarray:
        nbytes = numel * dtype_of(dtype).itemsize
        if self._memory is None or self._used + nbytes > self._memory.size:
            # What was given out before keeps the old memory; next time all of it fits.
            self._memory = self._allocate(self._used + nbytes)
        found = self._memory[self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGN) * _ALIGN
        return found.view(numpy_dtype(dtype))


def _allocate(nbytes: int) -> np.ndarray:
    import numpy as np

    return np.empty(nbytes, np.uint8)


def strided(array: np.ndarray, shape: Sequence[int], offset: int, strides: Sequence[int]) -> np.ndarray:
    """A strided view on a flat array, which must hold all of it; offset and strides in elements."""
    import numpy as np

    # numpy checks the bounds here, and not in `as_strided`, which takes ten times as long.
    size = array.itemsize
    return np.ndarray(shape, array.dtype, array, offset * size, [n * size for n in strides])

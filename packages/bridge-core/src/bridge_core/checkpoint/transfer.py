"""The offline executor: runs the pieces of a conversion as copies between files.

Two paths, the same bytes. Where a piece needs no cast and its runs are long, the kernel moves each run
from file to file (`copy_file_range`) and no byte enters this process. Everything else is gathered in
numpy, one bounded block of the target at a time, and written in one go.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from bridge_core.checkpoint.safetensors import Stored
from bridge_core.dtypes import dtype_of, numpy_dtype
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Box, Piece, restrict, run_length, runs, whole

if TYPE_CHECKING:
    import numpy as np

KERNEL_RUN = 64 * 1024
"""Shortest run in bytes that is worth a system call of its own."""

STAGING = 16 * 1024 * 1024
"""Bytes of a target that are gathered at a time: the bound of this executor's memory, per thread."""

Progress = Callable[[int], None]


class Job(NamedTuple):
    """One target tensor, and the pieces that fill it, each with the stored tensor it comes from.

    The views of a piece are in elements of the stored tensors; the names in them are not looked at.
    `frame` is written around the data: bytes with their offsets in the target's file.
    """

    target: Stored
    parts: tuple[tuple[Stored, Piece], ...]
    frame: tuple[tuple[int, bytes], ...] = ()


class Moved(NamedTuple):
    """Bytes that a transfer read and wrote, by path taken."""

    kernel: int
    staged: int
    read: int


def share(jobs: Sequence[Job], rank: int, size: int) -> list[Job]:
    """The jobs of one of `size` workers: consecutive, and equal in bytes as far as jobs allow."""
    total = sum(job.target.nbytes for job in jobs)
    found: list[Job] = []
    before = 0
    for job in jobs:
        middle = before + job.target.nbytes // 2
        if total * rank <= middle * size < total * (rank + 1) or (total == 0 and rank == 0):
            found.append(job)
        before += job.target.nbytes
    return found


def transfer(
    jobs: Sequence[Job], *, threads: int = 2, progress: Progress | None = None, kernel_run: int = KERNEL_RUN
) -> Moved:
    """Run all jobs. Target files must exist with their final size.

    Args:
        jobs: what to copy; targets must not overlap.
        threads: how many jobs run at a time. System calls and numpy's copies release the interpreter lock.
        progress: called with a number of bytes, from any thread, after they were written.
        kernel_run: shortest run in bytes for the kernel's path; mostly for tests.

    Returns:
        Bytes written by each path, and read.

    Raises:
        CheckpointError: a source ended early.
        OSError: the operating system refused a write.
    """
    with ExitStack() as stack:
        files = _Files(stack)
        workers = [_Worker(files, kernel_run, progress) for _ in range(max(1, threads))]
        if len(workers) == 1:
            workers[0].run(jobs)
        else:
            chunks = [share(jobs, number, len(workers)) for number in range(len(workers))]
            with ThreadPoolExecutor(len(workers)) as pool:
                for result in [pool.submit(w.run, chunk) for w, chunk in zip(workers, chunks, strict=True)]:
                    result.result()
        return Moved(*(sum(column) for column in zip(*(w.moved for w in workers), strict=True)))


class _Files:
    """Open files and maps of one transfer, shared by its threads."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._lock = Lock()
        self._open: dict[tuple[Path, bool], int] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def descriptor(self, path: Path, *, write: bool) -> int:
        with self._lock:
            found = self._open.get((path, write))
            if found is None:
                found = os.open(path, os.O_RDWR if write else os.O_RDONLY)
                self._stack.callback(os.close, found)
                self._open[path, write] = found
            return found

    def bytes_of(self, path: Path) -> mmap.mmap:
        descriptor = self.descriptor(path, write=False)
        with self._lock:
            if path not in self._maps:
                # Not closed by hand: numpy views may hold on to it until they are gone.
                self._maps[path] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            return self._maps[path]


class _Worker:
    def __init__(self, files: _Files, kernel_run: int, progress: Progress | None) -> None:
        self._files = files
        self._kernel_run = kernel_run
        self._progress = progress or (lambda nbytes: None)
        self._kernel = self._staged = self._read = 0

    @property
    def moved(self) -> Moved:
        return Moved(self._kernel, self._staged, self._read)

    def run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            descriptor = self._files.descriptor(job.target.path, write=True)
            for offset, data in job.frame:
                write_all(descriptor, data, offset)
            if self._by_kernel(job):
                for source, piece in job.parts:
                    self._copy(descriptor, job.target, source, piece)
            else:
                self._stage(descriptor, job)
            self._progress(job.target.nbytes)

    def _by_kernel(self, job: Job) -> bool:
        itemsize = dtype_of(job.target.dtype).itemsize
        return all(
            source.dtype == job.target.dtype and run_length(piece) * itemsize >= self._kernel_run
            for source, piece in job.parts
        )

    def _copy(self, descriptor: int, target: Stored, source: Stored, piece: Piece) -> None:
        itemsize = dtype_of(target.dtype).itemsize
        origin = self._files.descriptor(source.path, write=False)
        for run in runs(piece):
            nbytes = run.length * itemsize
            copy_run(
                origin,
                source.offset + run.source * itemsize,
                descriptor,
                target.offset + run.target * itemsize,
                nbytes,
                where=source.path,
            )
            self._kernel += nbytes
            self._read += nbytes

    def _stage(self, descriptor: int, job: Job) -> None:
        import numpy as np

        itemsize = dtype_of(job.target.dtype).itemsize
        for box, parts in blocks(job):
            buffer = np.zeros(box.numel, numpy_dtype(job.target.dtype))
            for source, piece in parts:
                array = self._array(source)
                buffer_view = strided(buffer, piece.shape, piece.target.offset, piece.target.strides)
                buffer_view[...] = strided(array, piece.shape, piece.source.offset, piece.source.strides)
                self._read += piece.numel * array.itemsize
            first = box.start[0] * prod(box.shape[1:]) if box.start else 0
            write_all(descriptor, memoryview(buffer.view(np.uint8)), job.target.offset + first * itemsize)
            self._staged += buffer.nbytes

    def _array(self, source: Stored) -> np.ndarray:
        import numpy as np

        count = prod(source.shape)
        raw = np.frombuffer(self._files.bytes_of(source.path), np.uint8, source.nbytes, source.offset)
        return raw.view(numpy_dtype(source.dtype)) if count else np.zeros(0, numpy_dtype(source.dtype))


def strided(array: np.ndarray, shape: Sequence[int], offset: int, strides: Sequence[int]) -> np.ndarray:
    """A view on a flat array; offset and strides in elements."""
    from numpy.lib.stride_tricks import as_strided

    return as_strided(array[offset:], shape, [stride * array.itemsize for stride in strides])


def blocks(job: Job) -> Iterator[tuple[Box, list[tuple[Stored, Piece]]]]:
    """The target of a job in blocks of whole rows of at most `STAGING` bytes, with the pieces cut to match."""
    shape = job.target.shape
    row = prod(shape[1:]) * dtype_of(job.target.dtype).itemsize
    rows = max(1, STAGING // max(row, 1))
    if not shape or rows >= shape[0]:
        yield whole(shape), list(job.parts)
        return
    for start in range(0, shape[0], rows):
        extent = (min(rows, shape[0] - start), *shape[1:])
        box = Box((start, *(0 for _ in shape[1:])), extent)
        at = (0,) * len(shape)
        yield (
            box,
            [
                (source, part)
                for source, piece in job.parts
                for part in restrict(piece, "target", shape, box, extent, at)
            ],
        )


def copy_run(
    source: int, source_offset: int, target: int, target_offset: int, nbytes: int, *, where: Path
) -> None:
    """Copy a range of bytes between open files: in the kernel where the file system can, else through a buffer.

    Raises:
        CheckpointError: the source ended before `nbytes` were read.
    """
    while nbytes:
        try:
            count = os.copy_file_range(source, target, nbytes, source_offset, target_offset)
        except OSError as error:
            if error.errno not in _NOT_BY_KERNEL:
                raise
            count = write_all(target, os.pread(source, min(nbytes, STAGING), source_offset), target_offset)
        if count == 0:
            raise CheckpointError(
                "a file ended while it was being read",
                where=where,
                expected=f"{nbytes} more bytes at offset {source_offset}",
                got="end of file",
                fix="make sure that nothing writes to the source during a conversion",
            )
        nbytes -= count
        source_offset += count
        target_offset += count


# Different file systems, or one (or a kernel) that has no such copy.
_NOT_BY_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """`pwrite` until everything is written; returns the number of bytes."""
    left = memoryview(data)
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
    return len(data)

"""The offline executor: runs the pieces of a conversion as copies between files.

Three paths, the same bytes; which one a job takes depends on its dtypes and on how long its runs are.

* kernel: long runs are moved from file to file by `copy_file_range`; no byte enters this process.
* gather: short runs are written from a map of the source, many with one system call (`pwritev`).
* staged: casts, quantised tensors, and runs of a few bytes, go through numpy.

The last two take a target block by block, so memory does not grow with the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import lru_cache, partial
from math import inf, prod
from operator import itemgetter
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from bridge_core.checkpoint.files import OpenFiles, copy_run, write_all
from bridge_core.checkpoint.fp8 import encode
from bridge_core.checkpoint.reading import Reader, strided
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Box, Piece, Shape, View, restrict, row_major, run_length, runs, slabs

if TYPE_CHECKING:
    import numpy as np

KERNEL_RUN = 64 * 1024
"""Shortest run in bytes that is worth a system call of its own."""

GATHER_RUN = 256
"""Shortest run in bytes that is worth a Python object of its own."""

STAGING = 16 * 1024 * 1024
"""Bytes of a target that are assembled at a time, the measure of this executor's memory: a thread holds one block, or
the list of its runs (at most `STAGING / GATHER_RUN`, about as large), and the masks of a checked cast. Pages of mapped
files are the system's to keep or drop."""

_VECTOR = 512  # buffers per system call; IOV_MAX is 1024

Progress = Callable[[int], None]


class Job(NamedTuple):
    """One target tensor, and the pieces that fill it, each with the stored tensor it comes from.

    The views of a piece are in elements of the stored tensors; the names in them are not looked at.
    `head` and `tail` are written before and after the data; `shift` is added to every value. A target that is
    stored quantised is assembled in its own dtype, and quantised then.
    """

    target: Stored
    parts: tuple[tuple[Stored, Piece], ...]
    head: bytes = b""
    tail: bytes = b""
    shift: float = 0.0


class Moved(NamedTuple):
    """Bytes of tensors that a transfer wrote, by path taken, and bytes that it read."""

    kernel: int
    gathered: int
    staged: int
    read: int


def share(jobs: Sequence[Job], rank: int, size: int) -> list[Job]:
    """The jobs of one of `size` workers: consecutive, and equal in bytes as far as jobs allow."""
    total = sum(job.target.nbytes for job in jobs)
    found: list[Job] = []
    before = 0
    for job in jobs:
        middle = min(before + job.target.nbytes // 2, max(total - 1, 0))  # an empty job at the end has an owner too
        if total * rank <= middle * size < total * (rank + 1) or (total == 0 and rank == 0):
            found.append(job)
        before += job.target.nbytes
    return found


def in_file_order(parts: Iterable[tuple[Stored, Piece]]) -> tuple[tuple[Stored, Piece], ...]:
    """Parts of a job by the place of their first byte."""
    return tuple(sorted(parts, key=lambda part: place_of(*part)))


def place_of(source: Stored, piece: Piece) -> tuple[str, int]:
    """File and offset of the first byte of a piece; of a quantised tensor, as if its codes were of its dtype."""
    return source.path, source.offset + piece.source.offset * dtype_of(source.dtype).itemsize


def transfer(
    jobs: Sequence[Job],
    *,
    threads: int = 2,
    progress: Progress | None = None,
    kernel_run: int = KERNEL_RUN,
    gather_run: int = GATHER_RUN,
) -> Moved:
    """Run all jobs. Target files must exist with their final size.

    Args:
        jobs: what to copy; targets must not overlap.
        threads: how many jobs run at a time. System calls and numpy's copies release the interpreter lock.
        progress: called with a number of bytes, from any thread, when they are written or next to be.
        kernel_run, gather_run: shortest run in bytes for these paths; mostly for tests.

    Returns:
        Bytes written by each path, and read.

    Raises:
        CheckpointError: a source ended early, or a value does not fit into the dtype asked for.
        OSError: the operating system refused to read or write.
    """
    stop = Event()
    with ExitStack() as stack:
        files = OpenFiles(stack)
        workers = [_Worker(files, kernel_run, gather_run, progress, stop) for _ in range(max(1, threads))]
        chunks = [share(jobs, number, len(workers)) for number in range(len(workers))]
        in_threads([partial(w.run, chunk) for w, chunk in zip(workers, chunks, strict=True)], stop)
        return Moved(*(sum(column) for column in zip(*(w.moved for w in workers), strict=True)))


def in_threads(tasks: Sequence[Callable[[], None]], stop: Event) -> None:
    """Run tasks at the same time, a thread each. The first that fails, or Ctrl-C, sets `stop` for all of them."""
    if len(tasks) == 1:
        tasks[0]()
        return
    with ThreadPoolExecutor(len(tasks)) as pool:
        try:
            for result in as_completed([pool.submit(task) for task in tasks]):
                result.result()
        except BaseException:
            stop.set()
            raise


class _Writer:
    """Writes what follows one another in a file with one system call."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._path = ""
        self._start = self._end = 0
        self._buffers: list[bytes | memoryview] = []

    def add(self, path: str, offset: int, data: bytes | memoryview) -> None:
        if not data:
            return
        if path != self._path or offset != self._end or len(self._buffers) >= _VECTOR:
            self.flush()
            self._path, self._start, self._end = path, offset, offset
        self._buffers.append(data)
        self._end += len(data)

    def flush(self) -> None:
        buffers, offset = self._buffers, self._start
        self._buffers = []
        if not buffers:
            return
        descriptor = self._files.descriptor(self._path, write=True)
        count = os.pwritev(descriptor, buffers, offset)
        for buffer in buffers:
            if count < len(buffer):
                # The system stopped in the middle: finish by hand, or learn why it cannot.
                write_all(descriptor, memoryview(buffer)[max(count, 0) :], offset + max(count, 0))
            count -= len(buffer)
            offset += len(buffer)


class _Worker:
    """One thread of a transfer: runs its jobs, each by the path that fits it."""

    def __init__(
        self, files: OpenFiles, kernel_run: int, gather_run: int, progress: Progress | None, stop: Event
    ) -> None:
        self._files = files
        self._reader = Reader(files)
        self._writer = _Writer(files)
        self._kernel_run = kernel_run
        self._gather_run = gather_run
        self._progress = progress or (lambda nbytes: None)
        self._stop = stop
        self._kernel = self._gathered = self._staged = self._read = 0

    @property
    def moved(self) -> Moved:
        return Moved(self._kernel, self._gathered, self._staged, self._read + self._reader.nbytes)

    def run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._stop.is_set():
                return
            target = job.target
            self._writer.add(target.path, target.offset - len(job.head), job.head)
            shortest = self._shortest_run(job)
            if shortest >= self._kernel_run:
                for source, piece in job.parts:
                    self._copy(self._files.descriptor(target.path, write=True), target, source, piece)
            elif shortest >= self._gather_run:
                self._gather(job)
            else:
                self._writer.flush()
                self._stage(self._files.descriptor(target.path, write=True), job)
            self._writer.add(target.path, target.offset + target.nbytes, job.tail)
            self._progress(target.disk_bytes)
        self._writer.flush()

    def _shortest_run(self, job: Job) -> int:
        """Bytes of the shortest run of a job; 0 if it needs arithmetic."""
        dtype = job.target.dtype
        if job.shift or any(source.dtype != dtype or source.encoded for source, _ in job.parts) or job.target.encoded:
            return 0
        elements = min((_run_length(p.shape, p.source.strides, p.target.strides) for _, p in job.parts), default=1)
        return elements * dtype_of(dtype).itemsize

    def _gather(self, job: Job) -> None:
        itemsize = dtype_of(job.target.dtype).itemsize
        for first, _, parts in blocks(job):
            found: list[tuple[int, memoryview]] = []
            for source, piece in parts:
                data = self._files.bytes_of(source)
                for at_source, at_target, length in runs(piece):
                    start = at_source * itemsize
                    found.append(((first + at_target) * itemsize, data[start : start + length * itemsize]))
            found.sort(key=itemgetter(0))
            for offset, view in found:
                self._writer.add(job.target.path, job.target.offset + offset, view)
        self._gathered += job.target.nbytes
        self._read += job.target.nbytes

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
        for first, buffer in gather(job, self._reader):
            if job.target.encoded:
                self._encode(descriptor, job.target, first, buffer)
                continue
            write_all(descriptor, buffer.view(np.uint8).data, job.target.offset + first * itemsize)
            self._staged += buffer.nbytes

    def _encode(self, descriptor: int, target: Stored, first: int, buffer: np.ndarray) -> None:
        """Write whole rows of blocks of a quantised target, from the element `first` on, and their scales."""
        import numpy as np

        assert target.encoded is not None
        codec, _, (_, stored) = target.encoded
        assert isinstance(codec, Fp8Blocks)
        width = target.shape[1]
        where = f"{target.path}, tensor at byte {target.offset}"
        codes, scales = encode(buffer.reshape(-1, width), codec, where=where)
        write_all(descriptor, codes.reshape(-1).view(np.uint8).data, target.offset + first)
        before = first // (width * codec.rows) * scales.shape[1] * scales.itemsize
        beside = self._files.descriptor(stored.path, write=True)
        write_all(beside, scales.reshape(-1).view(np.uint8).data, stored.offset + before)
        self._staged += codes.nbytes + scales.nbytes


def gather(job: Job, reader: Reader, into: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """The target of a job, assembled in memory block by block: the first element's number, and the block, flat.

    Args:
        into: memory of the whole target, flat and in its dtype, of which the blocks are then parts. Without it a block
            lies in the reader's memory, where the next one of the same reader replaces it.
    """
    for first, numel, parts in blocks(job):
        block = reader.block(numel, job.target.dtype) if into is None else into[first : first + numel]
        _assemble(block, job, parts, reader)
        yield first, block


def _assemble(block: np.ndarray, job: Job, parts: Sequence[tuple[Stored, Piece]], reader: Reader) -> None:
    import numpy as np

    dtype = job.target.dtype
    if sum(piece.numel for _, piece in parts) < block.size:
        block.view(np.uint8).fill(0)  # some of it is padding
    for source, piece in parts:
        as_stored = source.dtype == dtype and not source.encoded and not job.shift
        if as_stored and reader.straight(source, piece, block):
            continue
        view = strided(block, piece.shape, piece.target.offset, piece.target.strides)
        values = reader.values(source, piece)
        if job.shift:
            values = values.astype(np.float32) + np.float32(job.shift)
        with np.errstate(over="ignore", invalid="ignore"):
            view[...] = values
            if _LARGEST.get(dtype, inf) < _LARGEST.get(source.dtype, inf):
                _check_range(view, values, dtype, source)


# The largest finite value of each floating-point type that may be asked for.
_LARGEST = {"F16": 65504.0, "BF16": 2.0**128 - 2.0**120, "F32": 2.0**128 - 2.0**104}


def _check_range(view: np.ndarray, values: np.ndarray, dtype: str, source: Stored) -> None:
    """A value beyond the range of the new dtype would become infinite in silence."""
    import numpy as np

    largest = _LARGEST[dtype]
    if not values.size or -largest <= values.min() <= values.max() <= largest:
        return  # nearly always; NaN fails the comparison
    lost = ~np.isfinite(view) & np.isfinite(values)
    if lost.any():
        name = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}[dtype]
        raise CheckpointError(
            f"values do not fit into {name}",
            where=f"{source.path}, tensor at byte {source.offset}",
            expected=f"absolute values of at most {largest:.6g}",
            got=f"{int(lost.sum())} larger one(s), such as {float(values[lost].flat[0])}",
            fix="convert to bf16 instead" if dtype == "F16" else "keep the dtype that the tensors have",
        )


@lru_cache(maxsize=4096)
def _run_length(shape: Shape, source: Shape, target: Shape) -> int:
    return run_length(Piece(shape, View("", 0, source), View("", 0, target)))


def blocks(job: Job) -> Iterator[tuple[int, int, list[tuple[Stored, Piece]]]]:
    """The target of a job in contiguous blocks of at most `STAGING` bytes: number of the first element, how many,
    and the pieces cut to match, with targets counted from the start of the block."""
    shape = job.target.shape
    boxes = list(_pieces_of_target(job))
    if len(boxes) == 1:
        yield 0, prod(shape), list(job.parts)
        return
    at, strides = (0,) * len(shape), row_major(shape)
    for box in boxes:
        cut = [
            (source, part)
            for source, piece in job.parts
            for part in restrict(piece, "target", shape, box, box.shape, at)
        ]
        yield sum(i * s for i, s in zip(box.start, strides, strict=True)), box.numel, cut


def _pieces_of_target(job: Job) -> Iterator[Box]:
    """The target in boxes of at most `STAGING` bytes; whole blocks of rows, if their scale comes from all of them."""
    shape, encoded = job.target.shape, job.target.encoded
    most = STAGING // dtype_of(job.target.dtype).itemsize
    if encoded is None:
        yield from slabs(shape, most)
        return
    assert isinstance(encoded.codec, Fp8Blocks)
    height = encoded.codec.rows
    rows = max(height, most // max(prod(shape[1:]), 1) // height * height)
    for start in range(0, shape[0], rows):
        yield Box((start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:]))

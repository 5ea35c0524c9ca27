"""Bytes of files: opened once, mapped, copied, written to the end. Nothing here knows what the bytes mean."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

from bridge_core.checkpoint.safetensors import Stored
from bridge_core.errors import CheckpointError

COPY_BUFFER = 16 * 1024 * 1024
"""Bytes that are read at a time where the kernel does not copy by itself."""


class OpenFiles:
    """Files that are open for reading or writing, and maps of them, shared by the threads of one run."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._lock = Lock()
        self._open: dict[tuple[str, bool], int] = {}
        self._maps: dict[str, memoryview] = {}

    def descriptor(self, path: str, *, write: bool) -> int:
        """The file's descriptor; opened once, closed when the run ends."""
        with self._lock:
            found = self._open.get((path, write))
            if found is None:
                found = os.open(path, os.O_RDWR if write else os.O_RDONLY)
                self._stack.callback(os.close, found)
                self._open[path, write] = found
            return found

    def bytes_of(self, stored: Stored) -> memoryview:
        """The bytes of a stored tensor, mapped: nothing is read yet.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        found = self._map(stored.path)[stored.offset : stored.offset + stored.nbytes]
        if len(found) != stored.nbytes:
            raise file_ended(stored.path, stored.offset + len(found), stored.nbytes - len(found))
        return found

    def _map(self, path: str) -> memoryview:
        found = self._maps.get(path)
        if found is None:
            descriptor = self.descriptor(path, write=False)
            with self._lock:
                # Not closed by hand: views may hold on to it until they are gone. An empty file cannot be mapped.
                held = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if os.fstat(descriptor).st_size else b""
                found = self._maps.setdefault(path, memoryview(held))
        return found


def create_file(path: Path, nbytes: int, head: bytes = b"") -> None:
    """Make a file of its final size, sparse but for its first bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, nbytes)
        write_all(descriptor, head, 0)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """`pwrite` until everything is written; returns the number of bytes."""
    left = memoryview(data)
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
    return len(data)


def copy_run(source: int, source_offset: int, target: int, target_offset: int, nbytes: int, *, where: object) -> None:
    """Copy a range of bytes between open files: in the kernel where the file system can, else through a buffer.

    Raises:
        CheckpointError: the source ended before `nbytes` were read.
    """
    while nbytes:
        count = _copy_some(source, source_offset, target, target_offset, nbytes)
        if count == 0:
            raise file_ended(where, source_offset, nbytes)
        nbytes -= count
        source_offset += count
        target_offset += count


def _copy_some(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy as much as one system call does; 0 at the end of the source."""
    try:
        # 0 is not proof of the end: Linux 5.3 to 5.18 say so of file systems that have no sizes (man copy_file_range).
        if count := os.copy_file_range(source, target, nbytes, source_offset, target_offset):
            return count
    except OSError as error:
        if error.errno not in _NOT_BY_KERNEL:
            raise
    return write_all(target, os.pread(source, min(nbytes, COPY_BUFFER), source_offset), target_offset)


# Different file systems, or one (or a kernel) that has no such copy.
_NOT_BY_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def file_ended(where: object, offset: int, missing: int) -> CheckpointError:
    """The error for a file that ended `missing` bytes too early, at `offset`."""
    return CheckpointError(
        "a file ended while it was being read",
        where=where,
        expected=f"{missing} more bytes at offset {offset}",
        got="end of file",
        fix="make sure that nothing writes to the source during a conversion",
    )

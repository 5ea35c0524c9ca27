"""Output folders that are either finished or not there: written aside, renamed at the end.

A run writes into `.<name>.partial` beside the output folder. Only the last step, one `rename`, gives
the folder its name, so a run that is killed leaves nothing that looks finished, and the next run
clears its remains. A lock on the partial folder keeps two runs from writing the same output.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_core.errors import OutputError, preview


def partial_path(path: Path) -> Path:
    """Where the output is written until it is finished."""
    return path.parent / f".{path.name}.partial"


def real_path(path: Path) -> Path:
    """Where an output really goes, links followed: a rename would replace a link, not what it points to.

    Raises:
        OutputError: it is the root of a file system or the working directory, which nothing can be renamed to.
    """
    real = Path(os.path.realpath(path))
    if os.path.ismount(real) or real == Path.cwd():
        raise OutputError(
            "the output cannot be a mount point or the working directory",
            where=path,
            expected="a folder that can be renamed",
            got=real,
            fix="choose a folder below it",
        )
    return real


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise unless `path` may become an output folder.

    Raises:
        OutputError: it is a file, or a folder with something in it and `overwrite` was not given.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(
            "the output is a file", where=path, expected="a folder, or nothing", got="a file", fix="choose another path"
        )
    if path.is_dir() and not overwrite and (held := sorted(file.name for file in path.iterdir())):
        raise OutputError(
            "the output folder already holds something",
            where=path,
            expected="an empty folder, or none",
            got=preview(held),
            fix="choose another folder, or pass --overwrite (overwrite=True) to replace it",
        )


def check_apart(output: Path, source: Path) -> None:
    """Raise if writing `output` would remove `source`.

    Raises:
        OutputError: they are the same folder, or the source lies in the output.
    """
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise OutputError(
            "the output would replace the folder that is converted",
            where=output,
            expected="a folder apart from the source",
            got=f"the source {source}",
            fix="choose another output folder",
        )


def check_space(path: Path, nbytes: int) -> None:
    """Raise unless the file system that `path` will be on has room for `nbytes`.

    Raises:
        OutputError: it has not; says how much is needed and how much there is.
    """
    parent = path.absolute().parent  # the output is written beside its place
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputError(
            "the disk has not enough room for the output",
            where=path,
            expected=f"{nbytes:,} bytes",
            got=f"{free:,} bytes free",
            fix="free some space, or write to another disk",
        )


@contextmanager
def finished_folder(path: Path, *, overwrite: bool, nbytes: int = 0) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error.

    Args:
        path: the output folder.
        overwrite: replace a folder that holds something; it stays as it was until the new one is finished.
        nbytes: room needed; checked before anything is created.

    Raises:
        OutputError: the output is in use, the disk is full, or a write failed for another reason of the
            operating system. What was written so far is removed.
    """
    check_free(path, overwrite=overwrite)
    path = real_path(path)
    check_space(path, nbytes)
    partial = partial_path(path)
    with _locked(partial, path):
        try:
            _remove(partial)
            partial.mkdir(parents=True)
            yield partial
            _publish(partial, path)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, OutputError):
                raise OutputError(
                    "the output could not be written",
                    where=error.filename or path,
                    expected=f"room and permission for {nbytes:,} bytes",
                    got=error.strerror or error,
                    fix="nothing was left behind; free space or mend permissions and run again",
                ) from error
            raise


def _publish(partial: Path, path: Path) -> None:
    """Make the finished folder visible under its name; the one it replaces is removed afterwards."""
    old = path.parent / f".{path.name}.replaced"
    _remove(old)
    if path.is_dir():
        if any(path.iterdir()):
            os.rename(path, old)
        else:
            path.rmdir()
    os.rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)  # the output is finished, whatever becomes of the old one


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[None]:
    lock = partial.with_suffix(".lock")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            "the output's parent folder cannot be written",
            where=partial.parent,
            expected="a folder with permission to write",
            got=error.strerror or error,
            fix="choose another output folder",
        ) from error
    try:
        _lock(descriptor, lock, path)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, lock: Path, path: Path) -> None:
    """Take the lock, and make sure that the file is still the one that others would open."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = lock.exists() and os.fstat(descriptor).st_ino == lock.stat().st_ino
    except BlockingIOError:
        held = False
    except OSError as error:
        raise OutputError(
            "the output's file system has no locks",
            where=lock,
            expected="a file system that supports flock",
            got=error.strerror or error,
            fix="mount it with locks, or write elsewhere and move the folder",
        ) from error
    if not held:
        raise OutputError(
            "another run is writing this output",
            where=path,
            expected="one run at a time",
            got=f"{lock.name} is locked",
            fix="wait for it, or choose another folder",
        )

"""Output folders that are either finished or not there: written aside, renamed at the end.

A run writes into `.<name>.partial` beside the output folder. Only the last step, one `rename`, gives
the folder its name, so a run that is killed leaves nothing that looks finished, and the next run
clears its remains. A lock on the partial folder keeps two runs from writing the same output.

That holds for processes. Whether it also holds when the machine crashes is the caller's choice (`durable`): then
everything is on the disk before the rename, and the rename is when the call returns.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from bridge_core.checkpoint.workers import Workers, jointly
from bridge_core.errors import BridgeError, CheckpointError, OutputError, preview

T = TypeVar("T")


def partial_path(path: Path) -> Path:
    """Where the output is written until it is finished."""
    return path.parent / f".{path.name}.partial"


def _replaced_path(path: Path) -> Path:
    """Where the folder that is replaced waits for the new one to be there."""
    return path.parent / f".{path.name}.replaced"


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


def write_folder(
    output: Path,
    nbytes: int,
    workers: Workers,
    prepare: Callable[[Path], None],
    fill: Callable[[Path, int, int], T],
    finish: Callable[[Path], None],
    *,
    overwrite: bool,
    durable: bool = False,
    check: Callable[[], None] | None = None,
) -> T:
    """Prepare, fill and finish an output folder: the first and last by worker 0, the filling by all. Collective.

    Args:
        output: the folder; gets its name when everything in it is done.
        nbytes: room needed.
        workers: the processes that share the work; all must see the folder.
        prepare: makes what must be there before the filling.
        fill: writes this worker's part: folder, rank, number of workers.
        finish: writes what makes the folder complete.
        overwrite: replace a folder that holds something.
        durable: every worker waits until what it wrote is on the disk.
        check: runs on all workers once all have filled, before the finish; may be collective.

    Returns:
        What `fill` returned here.
    """
    output = real_path(output)
    partial = partial_path(output)
    with ExitStack() as stack:

        def open_and_prepare() -> None:
            if workers.rank == 0:
                stack.enter_context(finished_folder(output, overwrite=overwrite, nbytes=nbytes, durable=durable))
                prepare(partial)

        def fill_and_sync() -> T:
            filled = fill(partial, workers.rank, workers.size)
            if durable:
                _sync_tree(partial)  # on every worker: another node does not write this one's caches out
            return filled

        workers.together(open_and_prepare)
        filled = jointly(workers, fill_and_sync)
        if check is not None:
            workers.together(check)
        workers.together(lambda: finish(partial) if workers.rank == 0 else None)
        workers.together(stack.close)  # gives the folder its name, on worker 0
        return filled


@contextmanager
def finished_folder(path: Path, *, overwrite: bool, nbytes: int = 0, durable: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error.

    Args:
        path: the output folder.
        overwrite: replace a folder that holds something; it stays as it was until the new one is finished.
        nbytes: room needed; checked before anything is created.
        durable: return only when the folder and its name are on the disk.

    Raises:
        OutputError: the output is in use, something was put there in the meantime, the disk is full, or a write
            failed for another reason of the operating system. What was written so far is removed.
        CheckpointError: a file that was to be read from could not be.
    """
    check_free(path, overwrite=overwrite)
    path = real_path(path)
    check_space(path, nbytes)
    partial = partial_path(path)
    with _locked(partial, path):
        try:
            _restore(path)
            check_free(path, overwrite=overwrite)
            _remove(partial)
            partial.mkdir(parents=True)
            yield partial
            if durable:
                _sync_tree(partial)
            check_free(path, overwrite=overwrite)  # a run takes hours: somebody may have put something there
            _publish(partial, path)
            if durable:
                _sync(path.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, BridgeError):
                raise _in_our_words(error, path, nbytes) from error
            raise


def _in_our_words(error: OSError, path: Path, nbytes: int) -> BridgeError:
    """What the operating system refused: to write the output, or to read something else on the way."""
    named = None if error.filename is None else Path(os.fsdecode(error.filename))
    ours = (path, partial_path(path), _replaced_path(path))
    inside = named is None or any(folder in (named, *named.parents) for folder in ours)
    many = error.errno in (errno.EMFILE, errno.ENFILE)
    if inside and not many:
        return OutputError(
            "the output could not be written",
            where=named or path,
            expected=f"room and permission for {nbytes:,} bytes",
            got=error.strerror or error,
            fix="nothing was left behind; free space or mend permissions and run again",
        )
    return CheckpointError(
        "a file could not be opened or read",
        where=named,
        expected="permission to read it, and a free file descriptor" if many else "permission to read it",
        got=error.strerror or error,
        fix=f"nothing was left behind; {'raise the limit of open files (ulimit -n)' if many else 'mend it'}, run again",
    )


def _publish(partial: Path, path: Path) -> None:
    """Make the finished folder visible under its name; the one it replaces is removed afterwards."""
    old = _replaced_path(path)
    _remove(old)
    if path.is_dir():
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if old.is_dir():
            os.rename(old, path)  # the new one is about to be removed
        raise
    shutil.rmtree(old, ignore_errors=True)  # the output is finished, whatever becomes of the old one


def _restore(path: Path) -> None:
    """Give a folder its name back if a run was killed after it had taken it, and before the new one had it."""
    if not path.exists() and _replaced_path(path).is_dir():
        os.rename(_replaced_path(path), path)


def _sync_tree(folder: Path) -> None:
    """Wait until everything below a folder, and its own entries, are on the disk."""
    for root, _, files in os.walk(folder):
        for name in (*files, "."):
            _sync(Path(root, name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        held = os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except (BlockingIOError, FileNotFoundError):
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

"""Several processes, one output folder: who does what, and how all learn that one failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from bridge_core.checkpoint.output import finished_folder, partial_path


class Workers(Protocol):
    """Processes that share a conversion. `size` 1 needs no communication at all."""

    rank: int
    size: int

    def together(self, step: Callable[[], None]) -> None:
        """Run `step` here; return when all workers did, raise if one of them failed. Collective."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def together(self, step: Callable[[], None]) -> None:
        """Run `step`."""
        step()


def write_folder(
    output: Path,
    nbytes: int,
    workers: Workers,
    prepare: Callable[[Path], None],
    fill: Callable[[Path, int, int], None],
    finish: Callable[[Path], None],
    *,
    overwrite: bool,
) -> None:
    """Prepare, fill and finish an output folder: the first and last by worker 0, the filling by all. Collective.

    Args:
        output: the folder (`real_path`); gets its name when everything in it is done.
        nbytes: room needed.
        workers: the processes that share the work; all must see the folder.
        prepare: makes the files, at their full size.
        fill: writes this worker's part: folder, rank, number of workers.
        finish: writes what makes the folder complete.
        overwrite: replace a folder that holds something.
    """
    partial = partial_path(output)
    with ExitStack() as stack:

        def open_and_prepare() -> None:
            if workers.rank == 0:
                stack.enter_context(finished_folder(output, overwrite=overwrite, nbytes=nbytes))
                prepare(partial)

        workers.together(open_and_prepare)
        workers.together(lambda: fill(partial, workers.rank, workers.size))
        workers.together(lambda: finish(partial) if workers.rank == 0 else None)
        workers.together(stack.close)  # gives the folder its name, on worker 0

"""A progress bar on stderr with bytes per second and time left; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from bridge_core.extras import require


class Bar(NamedTuple):
    """What a run calls: once with all of its bytes, then with bytes that are done, from any thread."""

    on_total: Callable[[int], None]
    progress: Callable[[int], None] | None


@contextmanager
def bar(label: str, *, workers: int = 1, quiet: bool = False) -> Iterator[Bar]:
    """A bar for the time of the block.

    Args:
        label: what is being done.
        workers: processes that share the bytes equally; this one reports its own share.
        quiet: show nothing.
    """
    if quiet or not sys.stderr.isatty():
        yield Bar(lambda total: None, None)
        return
    rich = require("rich.progress", extra="cli")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    console = require("rich.console", extra="cli").Console(stderr=True)
    with rich.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield Bar(
            lambda total: shown.update(task, total=-(-total // workers)),
            lambda nbytes: shown.advance(task, nbytes),
        )

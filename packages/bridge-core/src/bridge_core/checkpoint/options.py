"""How a conversion runs, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.matching import check_wanted
from bridge_core.checkpoint.transfer import Moved, Progress
from bridge_core.checkpoint.workers import Alone, Workers
from bridge_core.errors import check_count


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did.

    Attributes:
        output: the finished folder.
        family: name of the model family.
        tensors: HF tensors converted.
        nbytes: bytes of the tensors written, all workers together, without headers and other files.
        moved: bytes by the path they took, this worker's share of `nbytes`.
        ignored: tensors of the source that were left out, each with the reason.
        carried: files beside the weights that were copied.
        from_source: HF tensors that the checkpoint did not hold, and that were copied from the source of an export.
    """

    output: Path
    family: str
    tensors: int
    nbytes: int
    moved: Moved
    ignored: dict[str, str]
    carried: tuple[str, ...]
    from_source: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a conversion runs; the same in both directions.

    Attributes:
        dtype: convert floating-point tensors to this type; None keeps each as it is.
        overwrite: replace an output folder that holds something.
        durable: wait for the disk before the output gets its name, so that it also outlives a crash of the machine;
            without it, as after `cp`, the system writes its caches out in its own time.
        workers: the processes that share the work.
        threads: copies in flight per worker.
        progress: called with numbers of bytes written, from any thread.
    """

    dtype: str | None = None
    overwrite: bool = False
    durable: bool = False
    workers: Workers = field(default_factory=Alone)
    threads: int = 2
    progress: Progress | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
        """The options of the run among those given, and the rest, which are of one direction."""
        names = cls.__dataclass_fields__
        run = {name: value for name, value in given.items() if name in names}
        return cls(**run), {name: value for name, value in given.items() if name not in names}

    def __post_init__(self) -> None:
        check_count("threads", self.threads)
        check_wanted(self.dtype)

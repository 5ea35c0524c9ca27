"""Processes that share an offline conversion, over a gloo process group: `Workers` of `checkpoint.convert`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bridge_core.errors import BridgeError
from bridge_core.extras import require

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FACTS = ("what", "where", "expected", "got", "fix")


class WorkerError(BridgeError):
    """Another worker of a shared conversion failed, or was lost.

    Attributes:
        worker: rank of the worker in its group; None for one that did not say why.
    """

    def __init__(self, what: str, *, worker: int | None, **facts: Any) -> None:
        self.worker = worker
        super().__init__(what, **facts)


class TorchWorkers:
    """The ranks of a process group, as the workers of one conversion.

    They have to see the same files, and to be called with the same arguments.

    Args:
        group: a group whose backend exchanges objects on the CPU, such as gloo.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._told = False
        self.rank = group.rank()
        self.size = group.size()

    def together(self, step: Callable[[], None]) -> None:
        """Run `step` here; return when all workers did. Collective.

        Raises:
            WorkerError: another worker failed; has its message. If several did, it is that of the lowest rank.
                The worker that this is about raises its own error.
        """
        failure: Exception | None = None
        try:
            step()
        except Exception as error:
            failure = error
        said = self._exchange(None if failure is None else _facts_of(failure))
        first = next((rank for rank, facts in enumerate(said) if facts is not None), None)
        if first is None:
            return
        self._told = True
        if first == self.rank and failure is not None:
            raise failure
        facts = dict(said[first] or {})
        raise WorkerError(f"worker {first} failed: {facts.pop('what')}", worker=first, **facts) from failure

    def tell(self, error: Exception) -> Exception:
        """Let the others know of an error outside of any step, and return the one to raise. Collective.

        It meets the others in the step that they are at. Nothing is said if a failure is known already.
        """
        if self._told or isinstance(error, WorkerError):
            return error

        def fail() -> None:
            raise error

        try:
            self.together(fail)
        except WorkerError as other:
            return error if other.worker is None else other
        except Exception as own:
            return own
        return error

    def part(self) -> None:
        """Wait until all workers have got here, or are lost. Collective.

        torchrun ends all processes once one has failed; whoever has to clean up or to say why comes first.
        """
        with suppress(WorkerError):
            self._exchange(None)

    def _exchange(self, facts: dict[str, str | None] | None) -> list[dict[str, str | None] | None]:
        dist = require("torch.distributed", extra="torch")
        said: list[dict[str, str | None] | None] = [None] * self.size
        try:
            dist.all_gather_object(said, facts, group=self._group)
        except RuntimeError as error:  # gloo: the connection to a rank broke, or nothing came in time
            raise WorkerError(
                "a worker was lost",
                worker=None,
                expected=f"an answer from all {self.size} workers",
                got=str(error).strip().splitlines()[0],
                fix="look at the output of the other workers; nothing was finished",
            ) from error
        return said


def _facts_of(error: Exception) -> dict[str, str | None]:
    """An error as the five lines of a `BridgeError`, without objects that others could not unpickle."""
    if isinstance(error, BridgeError):
        values = {name: getattr(error, name) for name in _FACTS}
        return {name: None if value is None else str(value) for name, value in values.items()}
    if isinstance(error, OSError):
        where = None if error.filename is None else str(error.filename)
        return {"what": "a file could not be read or written", "where": where, "got": error.strerror or str(error)}
    return {"what": f"{type(error).__name__}: {error}"}


def world_size() -> int:
    """Number of processes that a launcher such as torchrun says it started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@contextmanager
def torchrun_workers(*, timeout_s: float = 6 * 3600) -> Iterator[TorchWorkers]:
    """Workers from the environment that torchrun sets. The gloo group is made here, and gone afterwards.

    Args:
        timeout_s: how long a worker may wait for the others: the longest difference between their shares.
            One that dies is noticed at once, by its broken connection.

    Raises:
        BridgeError: this process has a default process group already; give one of its groups to
            `TorchWorkers` instead.
        MissingExtraError: torch is not installed.
    """
    dist = require("torch.distributed", extra="torch")
    if dist.is_initialized():
        raise BridgeError(
            "this process already has a default process group",
            expected="to make one, for the time of the conversion",
            got=f"a {dist.get_backend()} group of {dist.get_world_size()} ranks",
            fix="pass TorchWorkers(group) with a gloo group of yours",
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        workers = TorchWorkers(dist.group.WORLD)
        try:
            yield workers
        except Exception as error:
            told = workers.tell(error)
            workers.part()
            raise told from error.__cause__
    finally:
        dist.destroy_process_group()

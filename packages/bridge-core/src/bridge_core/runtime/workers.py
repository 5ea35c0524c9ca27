"""Processes that agree on what they do, over a process group: `Workers` of `checkpoint`, offline and on live ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bridge_core.errors import BridgeError
from bridge_core.extras import require
from bridge_core.runtime.words import words_device, words_group

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

_LOST = "a rank was lost"
_FACTS = ("what", "where", "expected", "got", "fix")


class WorkerError(BridgeError):
    """Another worker of a shared conversion failed, or was lost.

    Attributes:
        worker: rank of the worker in its group, where the message has its rank among all processes; None for one that
            did not say why.
    """

    def __init__(self, what: str, *, worker: int | None, **facts: Any) -> None:
        self.worker = worker
        super().__init__(what, **facts)


class LostWorkerError(WorkerError):
    """Another worker is gone, or gave up in the middle of an exchange: never the first thing that went wrong."""

    def __init__(self, got: str) -> None:
        super().__init__(
            _LOST,
            worker=None,
            expected="an answer from all ranks",
            got=got.strip().splitlines()[0] if got.strip() else "none",
            fix="look at the output of the other ranks; nothing was finished",
        )


class RendezvousError(BridgeError):
    """The workers of a run did not meet: each of them has to say so itself."""


class TorchWorkers:
    """The ranks of a process group, as the workers of one conversion.

    They have to see the same files, and to be called with the same arguments.

    Args:
        group: their group; gloo, or another backend that has an all-to-all (see `words_group`).
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = words_group(group)
        self._told = False
        self.rank = group.rank()
        self.size = group.size()

    def together(self, step: Callable[[], None]) -> None:
        """Run `step` here; return when all workers did. Collective.

        Raises:
            WorkerError: another worker failed; has its message. If several did, it is that of the lowest rank that
                did not only lose another one. The worker that this is about raises its own error.
        """
        failure: Exception | None = None
        try:
            step()
        except Exception as error:
            failure = error
        said: list[dict[str, str | None] | None] = self._exchange(None if failure is None else _facts_of(failure))
        failed = [rank for rank, facts in enumerate(said) if facts is not None]
        if not failed:
            return
        first = min(failed, key=lambda rank: (said[rank] or {}).get("what") == _LOST)
        self._told = True
        if first == self.rank and failure is not None:
            raise failure
        facts = dict(said[first] or {})
        text = f"rank {self.number_of(first)} failed: {facts.pop('what')}"
        raise WorkerError(text, worker=first, **facts) from failure

    def number_of(self, rank: int) -> int:
        """The number that launchers and logs know a rank of the group by: that among all processes."""
        return require("torch.distributed", extra="torch").get_global_rank(self._group, rank)

    def share(self, value: Any) -> list[Any]:
        """What every worker has to say, by rank: JSON values. Collective.

        Words between ranks go this way, and by no collective of torch's own: a lost worker is noticed by all others.

        Raises:
            LostWorkerError: a worker is gone.
        """
        return self._exchange(value)

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

    def _exchange(self, value: Any) -> list[Any]:
        """What every worker has to say: a JSON value, or None, which costs next to nothing."""
        torch = require("torch", extra="torch")
        data = b"" if value is None else json.dumps(value).encode()
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        with noticing_loss():
            sizes = self._to_all(torch.tensor([len(data)]), [1] * self.size).tolist()
            said = self._to_all(mine, sizes) if any(sizes) else mine
        parts = said.split(sizes) if any(sizes) else [mine] * self.size
        return [json.loads(part.numpy().tobytes()) if part.numel() else None for part in parts]

    def _to_all(self, message: Tensor, sizes: list[int]) -> Tensor:
        """Send a flat tensor to all workers; theirs, of `sizes` elements, one after the other, on the CPU.

        All-to-all and not all-gather: gloo's all-gather goes round a ring, where a worker that is lost is noticed by
        its neighbours alone, and everybody else waits for those.
        """
        dist, torch = require("torch.distributed", extra="torch"), require("torch", extra="torch")
        device = words_device(self._group)
        given = message.to(device).repeat(self.size)
        received = torch.empty(sum(sizes), dtype=message.dtype, device=device)
        dist.all_to_all_single(received, given, sizes, [message.numel()] * self.size, group=self._group)
        return received.cpu()


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns what gloo says when the connection to a rank broke, or nothing came in time, into `LostWorkerError`."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise LostWorkerError(str(error)) from error


# What gloo says when a peer has closed its connections, or gave no answer (torch 2.13, third_party/gloo,
# gloo/transport/tcp/pair.cc and unbound_buffer.cc).
_GLOOS = ("gloo/transport", "Connection closed by peer")


def is_loss(error: BaseException) -> bool:
    """Whether an error says that a peer is gone, and nothing that this rank did wrong."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _GLOOS)


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
def torchrun_workers(*, rendezvous_minutes: float = 10.0, wait_minutes: float = 360.0) -> Iterator[TorchWorkers]:
    """Workers from the environment that torchrun sets. The gloo group is made here, and gone afterwards.

    Args:
        rendezvous_minutes: how long to wait until all workers are there.
        wait_minutes: how long a worker may wait for the others afterwards: the longest difference between their
            shares. One that dies is noticed at once, by its broken connection.

    Raises:
        RendezvousError: workers are missing, or the environment does not say where they meet.
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
    store, rank, size = _meet(timedelta(minutes=rendezvous_minutes))
    limit = timedelta(minutes=wait_minutes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
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


def _meet(limit: timedelta) -> tuple[Any, int, int]:
    """The store at which all workers have arrived, this worker's rank, and their number. Collective.

    torch's own rendezvous waits on the first worker only; the others could wait for it, or for one another, without
    an end in sight. So every worker leaves a note, and waits for those of all others.
    """
    dist = require("torch.distributed", extra="torch")
    minutes = limit.total_seconds() / 60
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        met = dist.PrefixStore("bridge_core", store)
        met.set(f"arrived/{rank}", "")
        met.wait([f"arrived/{other}" for other in range(size)], limit)
    except (ValueError, RuntimeError) as error:  # a variable is missing, or a worker
        launched = " ".join(f"{name}={os.environ.get(name, '')}" for name in _LAUNCHED)
        raise RendezvousError(
            "the workers of this run did not meet",
            where=launched,
            expected=f"{world_size()} processes within {minutes:g} minutes (rendezvous_minutes)",
            got=str(error).strip().splitlines()[0],
            fix="start all of them with torchrun, or unset WORLD_SIZE to run as one process",
        ) from error
    return met, rank, size


_LAUNCHED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")

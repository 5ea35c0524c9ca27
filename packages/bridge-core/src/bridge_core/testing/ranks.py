"""A pool of long-lived rank processes: start once per test session, run many small distributed jobs.

Importing torch and megatron costs many seconds, so one process imports them, the ranks are forked from it
before it has threads, and they stay while the jobs change:

    with RankPool(4) as pool:
        sizes = pool.run(world_size)                # all 4 ranks -> [4, 4, 4, 4]
        sizes = pool.run(world_size, ranks=[0, 1])  # a job of 2 ranks -> [2, 2]

Inside a job, `torch.distributed` is initialised with exactly the job's ranks, numbered from 0: code that
uses the default group (mcore's `dist_checkpointing` does) sees no other rank. The world of a job is kept
for the next job of the same ranks, and made anew after an error. Here is the caller's side; the loop of
the rank processes is in `rank_worker`.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from bridge_core.errors import BridgeError
from bridge_core.testing.rank_worker import LEAVE, Call, Job, Reply, portable, serve

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

# After one rank has failed, the others get this long to notice their lost peer and answer.
_GRACE_S = 10.0
# Importing torch and megatron on a busy machine.
_START_S = 600.0
# Set before the first import of torch, which reads them then. Without dynamo, functions that mcore compiles
# at import run uncompiled, and the import is shorter.
_CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCHDYNAMO_DISABLE": "1",
}
# Read by CUDA when a rank first uses it. Ranks on gloo see no GPU, so that they do the same work on every machine;
# on a GPU float32 is multiplied as float32, so that results can be compared with those of a CPU.
_DEVICE_ENVIRONMENT = {"gloo": {"CUDA_VISIBLE_DEVICES": ""}, "nccl": {"NVIDIA_TF32_OVERRIDE": "0"}}
# What most jobs need; a module that is not installed is passed over.
_PRELOAD = ("torch", "torch.distributed", "megatron.core.models.gpt", "megatron.core.dist_checkpointing")


class RankError(BridgeError):
    """A job failed on at least one rank: an exception there, a dead process, or no answer in time.

    Attributes:
        rank: the rank, within the job, that failed first.
        traceback_text: that rank's traceback, or the stacks of all ranks when nobody answered in time.
    """

    def __init__(self, what: str, *, rank: int, traceback_text: str, fix: str | None = None) -> None:
        self.rank = rank
        self.traceback_text = traceback_text
        super().__init__(what, where=f"rank {rank}", got="\n" + traceback_text.rstrip(), fix=fix)


class RankPool:
    """Processes that run functions as ranks of a torch.distributed job.

    Args:
        size: number of processes, the largest job.
        backend: "gloo" for CPU, where ranks see no GPU, or "nccl" for one GPU per rank (CPU tensors then go
            through gloo).
        timeout_s: default limit of one job, and of each collective in it.
        preload: modules that are imported once, before the ranks exist. Only the first pool of a program has
            a say: all pools share one multiprocessing fork server.

    The processes are started (method "forkserver", one thread each) by the first `run`; with NCCL each on its own
    (method "spawn"), as CUDA does not survive a fork. The script that uses the pool must be import-safe
    (`if __name__ == "__main__"`). Not safe for use from several threads.
    """

    def __init__(
        self,
        size: int,
        backend: Literal["gloo", "nccl"] = "gloo",
        *,
        timeout_s: float = 120.0,
        preload: Sequence[str] = _PRELOAD,
    ) -> None:
        self.size = size
        self.backend = backend
        self.timeout_s = timeout_s
        self.preload = tuple(preload)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._worlds = 0
        self._world_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # pool rank -> its world's number and ranks

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether the rank processes exist."""
        return bool(self._processes)

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Run `fn(*args, **kwargs)` on every rank of a job and return the results in rank order.

        Args:
            fn: a top-level function. It is found by module and name in the rank processes, or by its
                file when the module cannot be imported there (tests under pytest's importlib mode).
            args, kwargs: picklable; every rank gets its own copy.
            ranks: which processes of the pool make up the job; all, when left out. The function sees
                a world of `len(ranks)` ranks, numbered from 0 in the given order.
            timeout_s: limit for this job.

        Raises:
            RankError: `fn` raised on a rank (`__cause__` is that exception where it can be pickled), a
                process died, or the limit passed. The pool can be used again at once: hung or dead
                processes are replaced by the next `run`.
        """
        job = tuple(range(self.size) if ranks is None else ranks)
        if not job or len(set(job)) != len(job) or not set(job) <= set(range(self.size)):
            raise ValueError(f"a job needs distinct ranks of 0 to {self.size - 1}, not {job}")
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        call = pickle.dumps(Call(portable(fn), args, kwargs))  # before anything is sent: an error here hurts nobody
        self._start()
        world = self._world(job)
        self._leave_old_worlds()
        for index, rank in enumerate(job):
            self._pipes[rank].send(Job(call, index, len(job), world, limit_s))
        replies, missing = self._collect(job, limit_s)
        if not missing and not any(reply.failed for reply in replies.values()):
            return [replies[rank].value for rank in job]
        failure = self._failure(job, replies, missing, limit_s)
        for rank in job:
            self._world_of.pop(rank, None)  # pending collectives must not meet the next job's
        if missing or self.backend == "nccl":  # NCCL's groups cannot be left while a peer waits in one
            self.close(kill=True)
        raise failure from next((reply.error for reply in _by_time(replies) if reply.error is not None), None)

    def close(self, *, kill: bool = False) -> None:
        """End the rank processes; a later `run` starts new ones."""
        atexit.unregister(self.close)
        for pipe in self._pipes:
            if not kill:
                _send_quietly(pipe, None)
        for process in self._processes:
            if not kill:
                process.join(timeout=_GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._store, self._folder = [], [], None, None
        self._world_of.clear()

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        if self._processes:
            self.close(kill=True)
        from torch.distributed import TCPStore

        if self.backend == "nccl":
            self._check_devices()
        # The store lives here and takes any free port: it outlives every job, and no port is guessed.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="bridge-ranks-")
        atexit.register(self.close)  # multiprocessing would wait for the ranks, and they for a job
        context = get_context("spawn") if self.backend == "nccl" else get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        environment = _CHILD_ENVIRONMENT | _DEVICE_ENVIRONMENT[self.backend]
        # The fork server too must see no GPU: what torch counted there, a forked rank takes over.
        with _environment(environment):
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                place = (rank, self._store.port, self.backend, str(self._stacks_file(rank)))
                arguments = (theirs, *place, environment, self.preload if self.backend == "nccl" else ())
                # Not a daemon: dist_checkpointing's writers are children of a rank, and daemons may have none.
                process = context.Process(target=serve, args=arguments, daemon=False, name=f"rank-{rank}")
                process.start()
                theirs.close()  # else the parent would keep a dead child's pipe open
                self._processes.append(process)
                self._pipes.append(ours)
        for rank, pipe in enumerate(self._pipes):
            self._await_ready(rank, pipe)

    def _check_devices(self) -> None:
        import torch

        if torch.cuda.device_count() < self.size:
            raise BridgeError(
                "NCCL needs a GPU for each rank",
                expected=f"{self.size} GPUs",
                got=torch.cuda.device_count(),
                fix='use backend="gloo", or fewer ranks',
            )

    def _await_ready(self, rank: int, pipe: Connection) -> None:
        """Imports are not part of a job's time; they have a limit of their own."""
        try:
            if pipe.poll(_START_S):
                pipe.recv()
                return
            what = f"a rank process did not start within {_START_S:g} s"
        except (EOFError, ConnectionError):
            what = "a rank process died while it started"
        self.close(kill=True)
        raise RankError(what, rank=rank, traceback_text="(see its standard error)")

    def _world(self, job: tuple[int, ...]) -> int:
        """The number of the job's world; a new number when any of its ranks is in another one."""
        current = {self._world_of.get(rank, (0, ())) for rank in job}
        if len(current) > 1 or next(iter(current))[1] != job:
            self._worlds += 1
            self._world_of |= dict.fromkeys(job, (self._worlds, job))
        return self._world_of[job[0]][0]

    def _leave_old_worlds(self) -> None:
        """Have idle ranks leave worlds that a new job takes ranks from: NCCL lets none go before all do."""
        whole = {number for number, ranks in self._world_of.values() if all(self._is_in(r, number) for r in ranks)}
        for rank in [rank for rank, (number, _) in self._world_of.items() if number not in whole]:
            self._pipes[rank].send(LEAVE)
            del self._world_of[rank]

    def _is_in(self, rank: int, world: int) -> bool:
        return self._world_of.get(rank, (0, ()))[0] == world

    def _collect(self, job: tuple[int, ...], limit_s: float) -> tuple[dict[int, Reply], list[int]]:
        """Wait for all answers; after the first failure only as long as peers need to notice it."""
        deadline = time.monotonic() + limit_s
        replies: dict[int, Reply] = {}
        waiting = list(job)
        while waiting:
            # A dead process closes its pipe, which wakes this up as an end of file.
            ready = connection.wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank in waiting if self._pipes[rank] in ready]:
                waiting.remove(rank)
                try:
                    replies[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionError):
                    replies[rank] = Reply(died=True)
                if replies[rank].failed:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        dead = [rank for rank, reply in replies.items() if reply.died]
        return {rank: reply for rank, reply in replies.items() if not reply.died}, sorted(waiting + dead)

    def _failure(
        self, job: tuple[int, ...], replies: dict[int, Reply], missing: list[int], limit_s: float
    ) -> RankError:
        raised = [rank for rank in job if rank in replies and replies[rank].failed]
        dead = [rank for rank in missing if _joined(self._processes[rank])]
        if dead:
            code = self._processes[dead[0]].exitcode
            return RankError(
                f"a rank process died (exit code {code}) before it answered",
                rank=job.index(dead[0]),
                traceback_text="\n".join(replies[rank].traceback_text for rank in raised) or "(no traceback)",
                fix="look for a crash or for memory pressure; the next run starts a new pool",
            )
        if raised:
            first = min(raised, key=lambda rank: replies[rank].failed_at)
            others = [job.index(rank) for rank in raised if rank != first]
            return RankError(
                f"{replies[first].summary}" + (f" (ranks {others} failed after it)" if others else ""),
                rank=job.index(first),
                traceback_text=replies[first].traceback_text,
            )
        stacks = "\n".join(f"rank {job.index(rank)}:\n{self._stacks(rank)}" for rank in missing)
        return RankError(
            f"{len(missing)} of {len(job)} ranks did not answer within {limit_s:g} s",
            rank=job.index(missing[0]),
            traceback_text=stacks,
            fix="look for a collective that not all ranks reach; the next run starts a new pool",
        )

    def _stacks_file(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"rank-{rank}.stacks"

    def _stacks(self, rank: int) -> str:
        """Where a hung rank is: its Python stacks, written by faulthandler on a signal."""
        pid = self._processes[rank].pid
        if pid is None:
            return "(never started)"
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self._stacks_file(rank).read_text() or "(no stack: still starting)"


class FirstRanks:
    """The first ranks of some pools, as if they were all that there is.

    Args:
        size: number of ranks, the largest job.
        pools: a job runs in the first of them that has a process for each of its ranks. The last one has `size`.
    """

    def __init__(self, size: int, *pools: RankPool) -> None:
        self.size, self.pools = size, pools

    @property
    def started(self) -> bool:
        """Whether the processes of the last pool exist."""
        return self.pools[-1].started

    def run(self, fn: Callable[..., Any], *args: Any, ranks: Sequence[int] | None = None, **options: Any) -> list[Any]:
        """`RankPool.run`, on all of these ranks where none are named."""
        job = range(self.size) if ranks is None else ranks
        pool = next((pool for pool in self.pools if max(job, default=0) < pool.size), self.pools[-1])
        return pool.run(fn, *args, ranks=job, **options)


def _by_time(replies: dict[int, Reply]) -> list[Reply]:
    return sorted(replies.values(), key=lambda reply: reply.failed_at)


def _joined(process: BaseProcess) -> bool:
    """Whether the process has ended; the moment between its pipe's end and its own is waited for."""
    process.join(timeout=0.5)
    return process.exitcode is not None


def _send_quietly(pipe: Connection, message: object) -> None:
    with suppress(OSError):  # the process is gone: that is what the message would have asked for
        pipe.send(message)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

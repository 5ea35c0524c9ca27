"""What runs in a rank process of `bridge_core.testing.ranks`: a loop that makes worlds and runs jobs.

Nothing here imports torch at module level: the process must have its environment first, and the caller's
side imports this module only for the messages.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import io
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Function:
    """A top-level function by name, and by the file of its module for modules that are not on the path."""

    module: str
    name: str
    file: str | None

    def load(self) -> Callable[..., Any]:
        """The function, with its module imported by name, or else from its file."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError:
            spec = None if self.file is None else importlib.util.spec_from_file_location(self.module, self.file)
            if spec is None or spec.loader is None:
                raise
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.module] = module  # before it runs: its classes are pickled by this name
            spec.loader.exec_module(module)
        return getattr(module, self.name)


def portable(fn: Callable[..., Any]) -> Function:
    """`fn` as something that a fresh process can find again.

    Raises:
        ValueError: `fn` is not a top-level function of an importable module.
    """
    module = sys.modules.get(fn.__module__)
    if "." in fn.__qualname__ or fn.__name__ == "<lambda>" or getattr(module, fn.__name__, None) is not fn:
        raise ValueError(f"{fn.__qualname__} is not a top-level function of {fn.__module__}; ranks cannot find it")
    return Function(fn.__module__, fn.__name__, getattr(module, "__file__", None))


@dataclass(frozen=True)
class Call:
    """A function and its arguments."""

    function: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One rank's order: a pickled `Call`, this rank's place in the job, and the number of the job's world."""

    call: bytes
    rank: int
    size: int
    world: int
    timeout_s: float


@dataclass
class Reply:
    """One rank's answer. `failed_at` is the machine's monotonic clock, comparable between processes."""

    value: Any = None
    error: BaseException | None = None
    summary: str = ""
    traceback_text: str = ""
    failed_at: float = float("inf")
    died: bool = False

    @property
    def failed(self) -> bool:
        """Whether this answer is a failure."""
        return self.died or bool(self.traceback_text)


LEAVE = "leave"
"""An order without an answer: leave the world."""

_groups: dict[tuple[tuple[str, Any], ...], ProcessGroupCollection] = {}


def groups(**layout: Any) -> ProcessGroupCollection:
    """`bridge_core.runtime.groups.pg_collection(**layout)`, made once per world of this rank process.

    Collective on first use with a layout: every rank of the job must ask for it.
    """
    from bridge_core.runtime.groups import pg_collection

    key = tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in layout.items()))
    if key not in _groups:
        _groups[key] = pg_collection(**layout)
    return _groups[key]


def serve(
    pipe: Connection,
    rank: int,
    port: int,
    backend: str,
    stacks_file: str,
    environment: dict[str, str],
    preload: Sequence[str],
) -> None:
    """The life of a rank process: take jobs until told to end, or until the caller is gone."""
    os.environ.update(environment)  # a fork server that somebody else started does not have them
    with open(stacks_file, "w", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        import torch

        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        for name in preload:  # a fork server's children have them
            importlib.import_module(name)
        world = None
        pipe.send("ready")
        while True:
            try:
                job: Job | str | None = pipe.recv()
            except EOFError:
                break
            if job is None:
                break
            if isinstance(job, str):
                _leave_world()
                world = None
                continue
            reply = _run(job, world, port, backend)
            world = None if reply.failed else job.world
            _answer(pipe, reply)
        _leave_world()


def _run(job: Job, world: int | None, port: int, backend: str) -> Reply:
    try:
        if job.world != world:
            _enter_world(job, port, backend)
        call: Call = pickle.loads(job.call)
        return Reply(value=call.function.load()(*call.args, **call.kwargs))
    except BaseException as error:  # also SystemExit: the caller must get an answer
        reply = Reply(
            error=error,
            summary=f"{type(error).__name__}: {error}",
            traceback_text=traceback.format_exc(),
            failed_at=time.monotonic(),
        )
        # Frames keep the job's models and groups alive; leaving the world closes the sockets, and peers
        # that wait for this rank get an error instead of hanging.
        error.__traceback__ = None
        error.__context__ = error.__cause__ = None
    if backend != "nccl":  # there it would wait for the peers; the caller ends the pool
        _leave_world()
    return reply


def _enter_world(job: Job, port: int, backend: str) -> None:
    import torch.distributed as dist

    _leave_world()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
        store=dist.PrefixStore(f"world-{job.world}", store),
        rank=job.rank,
        world_size=job.size,
        timeout=timedelta(seconds=job.timeout_s),
    )


def _leave_world() -> None:
    import torch.distributed as dist

    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _answer(pipe: Connection, reply: Reply) -> None:
    """Send the answer; what cannot be pickled is replaced by a description."""
    try:
        message = _pickled(reply)
        pickle.loads(message)  # an error class may pickle and not unpickle: find out here
    except Exception as error:  # any failure to pickle is an answer too
        if reply.failed:
            reply.error = None
        else:
            text = f"the result of the job cannot be pickled: {type(error).__name__}: {error}"
            reply = Reply(summary=text, traceback_text=traceback.format_exc(), failed_at=time.monotonic())
        message = pickle.dumps(reply)
    pipe.send_bytes(message)


class _OnCpu(pickle.Pickler):
    """Pickles tensors as if they were on the CPU: the caller has no part in this rank's GPU."""

    def reducer_override(self, obj: Any) -> Any:
        import torch

        if isinstance(obj, torch.Tensor) and obj.device.type != "cpu":
            return obj.detach().cpu().__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return NotImplemented


def _pickled(reply: Reply) -> bytes:
    file = io.BytesIO()
    _OnCpu(file).dump(reply)
    return file.getvalue()

"""Jobs for pools of their own: a rank is killed in the middle of a verb, and the others say what they were told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

LONGEST = 20.0
"""Seconds that a rank which was told stays alive and connected, for those that were not told by then."""


def die_in(path: str, layout: dict[str, Any], verb: str, place: str | float, victim: int, out: str, notes: str) -> None:
    """Rank `victim` is killed in a verb; every other rank notes after how many seconds it was told what.

    Args:
        verb: one of `VERBS`.
        place: "bytes", while weights move; or which of the words that are exchanged in the verb, as a fraction of them.
    """
    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.workers import TorchWorkers
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        with _counted(TorchWorkers, "_exchange") as words:
            VERBS[verb](bridge, chunks, f"{out}-before")
        assert words, "no words are exchanged: nothing can be killed there"
        where = _BYTES[verb]() if place == "bytes" else (TorchWorkers, "_exchange")
        number = 1 if place == "bytes" else int(float(place) * len(words))
        note_loss(lambda: VERBS[verb](bridge, chunks, out), where, number, victim, notes)


def note_loss(run: Callable[[], Any], where: tuple[Any, str], number: int, victim: int, notes: str) -> None:
    """Rank `victim` is killed while it runs something; every other rank notes after how many seconds it was told what.

    Args:
        where, number: a function, as what has it and its name, and the call of it (from 0) at which the rank is killed.
        notes: folder; gets a file for each of the other ranks.
    """
    import torch.distributed as dist

    from bridge_core import BridgeError

    with _killed(*where, number) if dist.get_rank() == victim else nullcontext():
        started = time.monotonic()
        try:
            run()
            text = "no error"
        except BridgeError as error:
            text = f"{type(error).__name__}: {error}"
        except RuntimeError as error:
            text = f"torch's own {type(error).__name__}: {error}"
    Path(notes, str(dist.get_rank())).write_text(f"{time.monotonic() - started:.1f}\n{text}")
    while len(list(Path(notes).iterdir())) < dist.get_world_size() - 1 and time.monotonic() - started < LONGEST:
        time.sleep(0.05)


def check_told(notes: Path, victim: int, size: int) -> None:
    """All others of `size` ranks were told, and not by the end of one another."""
    told = {int(file.name): file.read_text().split("\n", 1) for file in notes.iterdir()}
    assert sorted(told) == [rank for rank in range(size) if rank != victim]
    for seconds, text in told.values():
        assert float(seconds) < LONGEST, "it was told by the end of another rank"
        assert text.startswith("LostWorkerError: "), text


def _stream(bridge: Any, chunks: Any, out: str) -> None:
    for _, tensor in bridge.export_hf_weights(chunks, bucket_bytes=20_000):
        assert tensor.numel()


def _node(bridge: Any, chunks: Any, out: str) -> None:
    import torch.distributed as dist

    bridge.load_hf_weights(chunks, one_reader_per_node=True, node_group=dist.group.WORLD, bucket_bytes=20_000)


VERBS: dict[str, Callable[[Any, Any, str], Any]] = {
    "load": lambda bridge, chunks, out: bridge.load_hf_weights(chunks),
    "load from one reader": _node,
    "save": lambda bridge, chunks, out: bridge.save_hf_pretrained(chunks, out),
    "save by one writer": lambda bridge, chunks, out: bridge.save_hf_pretrained(
        chunks, out, one_writer_per_file=True, bucket_bytes=20_000, max_shard_size=200_000
    ),
    "stream": _stream,
}


def _in_load() -> tuple[Any, str]:
    from bridge_core.runtime import load

    return load, "read_into"


def _in_node_load() -> tuple[Any, str]:
    from bridge_core.runtime import node_load

    return node_load, "_broadcast"


def _in_save() -> tuple[Any, str]:
    from bridge_core.runtime.shared_files import SharedFiles

    return SharedFiles, "_write"


def _in_save_by_one_writer() -> tuple[Any, str]:
    from bridge_core.runtime.file_owners import WholeFiles

    return WholeFiles, "_exchanged"


def _in_stream() -> tuple[Any, str]:
    from bridge_core.runtime.stream import Stream

    return Stream, "_filled"


_BYTES = {
    "load": _in_load,
    "load from one reader": _in_node_load,
    "save": _in_save,
    "save by one writer": _in_save_by_one_writer,
    "stream": _in_stream,
}


@contextmanager
def _counted(where: Any, name: str) -> Iterator[list[int]]:
    """Yields a list that has a number for every call of a function."""
    calls: list[int] = []
    original = getattr(where, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        return original(*args, **kwargs)

    with patch.object(where, name, call):
        yield calls


@contextmanager
def _killed(where: Any, name: str, number: int) -> Iterator[None]:
    """This process ends at a call of a function: the first one is number 0."""
    original = getattr(where, name)
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(number)
        return original(*args, **kwargs)

    with patch.object(where, name, call):
        yield

"""Jobs for the pool: options of saving to HF folders, and facts about who opened what and sent how much."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_opened: set[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """The interpreter's own account of weight files that are opened for writing."""
    if event == "open" and _opened is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        name = Path(os.fsdecode(arguments[0])).name if not isinstance(arguments[0], int) else ""
        if name.endswith(".safetensors"):
            _opened.add(name)


sys.addaudithook(_note)  # stays with the process; it notes nothing outside of `_noting`


@contextmanager
def _noting():
    """Yields the names of weight files opened for writing, and the sizes of the owners' exchanges, within the block."""
    import sys

    import torch.distributed as dist

    from bridge_core.runtime import file_owners

    global _opened
    original, sizes = dist.all_to_all_single, []

    def noted(output, given, *args, **kwargs):
        if sys._getframe(1).f_globals is vars(file_owners):  # workers exchange words in the same way
            sizes.append((output.nbytes, given.nbytes))
        return original(output, given, *args, **kwargs)

    _opened, dist.all_to_all_single = set(), noted
    try:
        yield _opened, sizes
    finally:
        _opened, dist.all_to_all_single = None, original


def save_both_ways(path: str, layout: dict[str, Any], out: str, bucket_bytes: int):
    """Load; save by owners of bytes and by owners of files; reports, and what was really opened and exchanged."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    found = {}
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
        bridge.load_hf_weights(chunks)
        with poisoned_parallel_state(frozenset()) as reads:
            for way in ("shared", "owned"):
                options = {"one_writer_per_file": True, "bucket_bytes": bucket_bytes} if way == "owned" else {}
                with _noting() as (opened, sizes):
                    report = bridge.save_hf_pretrained(chunks, f"{out}/{way}", **options)
                    found[way] = report, set(opened), list(sizes)
    assert not reads, reads
    return found


def disagree(path: str, layout: dict[str, Any], out: str, rank: int) -> str:
    """One rank takes the vocabulary to be padded otherwise than the embedding is; what this rank is told."""
    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
        bridge.load_hf_weights(chunks)
        if dist.get_rank() == rank:
            chunks[0].vocab_size += 16
        try:
            bridge.save_hf_pretrained(chunks, out, one_writer_per_file=True)
        except BridgeError as error:
            return str(error)
    return "no error"


def fail(path: str, layout: dict[str, Any], out: str, step: str, rank: int, *, killed: bool) -> str:
    """One rank fails, or is killed, while files are written by their owners; what this rank is told."""
    import signal

    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.file_owners import WholeFiles
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    calls = []
    original = getattr(WholeFiles, step)

    def broken(*args):
        calls.append(step)
        if step == "_create" or len(calls) == 3:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no memory left on this rank")
        return original(*args)

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        if dist.get_rank() == rank:
            setattr(WholeFiles, step, broken)
        try:
            with _noting() as (_, sizes):
                bridge.save_hf_pretrained(chunks, out, one_writer_per_file=True, bucket_bytes=20_000)
        except (BridgeError, MemoryError) as error:
            return f"{len(sizes)} rounds; {error}"
        finally:
            setattr(WholeFiles, step, original)
    return "no error"

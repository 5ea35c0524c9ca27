"""Jobs for the pool: options of saving to HF folders, and facts about who opened what and sent how much."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_opened: set[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """The interpreter's own account of files that are opened for writing."""
    if event == "open" and _opened is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = arguments[0]
        _opened.update(() if isinstance(path, int) else [Path(os.fsdecode(path)).name])


sys.addaudithook(_note)  # stays with the process; it notes nothing outside of `_noting`


@contextmanager
def _noting():
    """Yields the names of files opened for writing, and the sizes of the owners' exchanges, within the block."""
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
    from runtime.helpers import poisoned_parallel_state, small_bands

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    found = {}
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
        bridge.load_hf_weights(chunks)
        with poisoned_parallel_state(frozenset()) as reads, small_bands():
            for way in ("shared", "owned"):
                options = {"one_writer_per_file": True, "bucket_bytes": bucket_bytes} if way == "owned" else {}
                with _noting() as (opened, sizes):
                    report = bridge.save_hf_pretrained(chunks, f"{out}/{way}", **options)
                    weights = {name for name in opened if name.endswith(".safetensors")}
                    found[way] = report, weights, list(sizes), opened - weights
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


def fail(path: str, layout: dict[str, Any], out: str, step: str, rank: int) -> str:
    """One rank fails while files are written by their owners; what this rank is told."""
    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.file_owners import WholeFiles
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    original = getattr(WholeFiles, step)

    def no_memory():
        raise MemoryError("no memory left on this rank")

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        if dist.get_rank() == rank:
            setattr(WholeFiles, step, _at_call(1 if step == "_create" else 3, original, no_memory))
        try:
            with _noting() as (_, sizes):
                bridge.save_hf_pretrained(chunks, out, one_writer_per_file=True, bucket_bytes=20_000)
        except (BridgeError, MemoryError) as error:
            return f"{len(sizes)} rounds; {error}"
        finally:
            setattr(WholeFiles, step, original)
    return "no error"


def _at_call(number: int, function: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    """A function that does something else first in one of its calls."""
    calls = []

    def call(*args, **kwargs):
        calls.append(number)
        if len(calls) == number:
            then()
        return function(*args, **kwargs)

    return call


def die(path: str, layout: dict[str, Any], out: str, step: str, rank: int, notes: str) -> None:
    """One rank is killed in a save; the others note what they were told, and after how many seconds.

    Args:
        step: `"files"`, while files are written by their owners; `"index"`, when everything is written (index and
            config.json as well) and the folder has no name yet.
    """
    import signal
    import time

    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime import save
    from bridge_core.runtime.file_owners import WholeFiles
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    def end():
        os.kill(os.getpid(), signal.SIGKILL)

    def finish_and_end(*args, **kwargs):
        finish(*args, **kwargs)
        end()

    bridge, finish = AutoBridge.from_hf_pretrained(path), save.finish_hf_folder
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        if dist.get_rank() == rank:
            save.finish_hf_folder = finish_and_end
            if step == "files":
                WholeFiles._write = _at_call(3, WholeFiles._write, end)
        options = {"one_writer_per_file": True, "bucket_bytes": 20_000} if step == "files" else {}
        started = time.monotonic()
        try:
            bridge.save_hf_pretrained(chunks, out, **options)
            text = "no error"
        except (BridgeError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
    Path(notes, str(dist.get_rank())).write_text(f"{time.monotonic() - started:.1f}\n{text}")


def save_again(path: str, layout: dict[str, Any], out: str) -> None:
    """Load, and save in the default way."""
    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        bridge.save_hf_pretrained(chunks, out)


def save_in_place(path: str, layout: dict[str, Any], out: str):
    """Load, and save in the default way: the report, the writes to weight files, and what the kernel counted."""
    from runtime.helpers import small_bands
    from runtime.live_jobs import build_at

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        chunks, _, pg = build_at(bridge.fields, layout, "host")
        bridge.load_hf_weights(chunks, groups=pg)
        bridge.save_hf_pretrained(chunks, f"{out}/first", groups=pg)  # whatever is imported late is
        with _writing() as writes, small_bands():
            before = _wchar()
            report = bridge.save_hf_pretrained(chunks, f"{out}/second", groups=pg)
            counted = _wchar() - before
    return report, writes, counted


@contextmanager
def _writing():
    """Yields the writes into weight files within the block: file, offset, bytes."""
    write, found = os.pwrite, []

    def noted(descriptor, data, offset):
        count = write(descriptor, data, offset)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if file.endswith(".safetensors"):
            found.append((file, offset, count))
        return count

    os.pwrite = noted
    try:
        yield found
    finally:
        os.pwrite = write


def _wchar() -> int:
    """Bytes that this process gave to write and its like; pages of maps are not in it (man proc_pid_io)."""
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))

"""Loading and saving a live model on ranks of this machine, in alternation with `cp -r` of the same bytes.

Run as a program: `python live.py SOURCE FOLDER RANKS ROUNDS`; prints JSON. Real megatron-core models on gloo ranks, in
bfloat16, with the modules of the CPU host backend.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import SAMPLING, memory_of, spread
from peer import peer

from bridge_core import AutoBridge, verify

LAYOUTS: dict[int, dict[str, int]] = {1: {}, 2: {"tp": 2}, 4: {"tp": 2, "pp": 2}}
"""What is measured, by the number of ranks."""

VERBS: dict[str, dict[str, Any]] = {"load": {}, "save": {}, "save, a file per rank": {"one_writer_per_file": True}}

_COLLECTIVES = ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "monitored_barrier")
_model: Any = None


def measure_live(source: Path, folder: Path, ranks: int, *, rounds: int) -> dict[str, Any]:
    """All figures of one number of ranks.

    Raises:
        RankError: a rank failed.
        RuntimeError: what was saved is not what was loaded.
    """
    from bridge_core.testing.ranks import RankPool

    out = folder / f"{source.name}-live"
    nbytes = sum(file.stat().st_size for file in source.iterdir())
    runs: dict[str, list[Any]] = {name: [] for name in ("cp", *VERBS)}
    with RankPool(ranks, timeout_s=600) as pool:
        pool.run(build, str(source), LAYOUTS[ranks])
        memory = {name: _run(pool, name, source, out, watch=True) for name in VERBS}
        if not (found := verify(source, out)).ok:
            raise RuntimeError(f"what was saved is not what was loaded: {found.counts}")
        for number in range(rounds):
            names = list(runs)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                runs[name].append(_cp(source, out) if name == "cp" else _run(pool, name, source, out, watch=False))
    shutil.rmtree(out, ignore_errors=True)
    cp = spread(runs["cp"])
    return {
        "layout": LAYOUTS[ranks],
        "bytes": nbytes,
        "cp": cp,
        "load_average": os.getloadavg()[0],
        **{name: _summary(runs[name], memory[name], cp["median"]) for name in VERBS},
    }


def _summary(runs: list[list[dict[str, Any]]], watched: list[dict[str, Any]], cp: float) -> dict[str, Any]:
    """A run takes as long as its slowest rank; counts are the same in all runs."""
    seconds = spread([max(rank["seconds"] for rank in run) for run in runs])
    return {
        "seconds": seconds,
        "ratio": seconds["median"] / cp,
        "collectives": [sum(rank["collectives"].values()) for rank in runs[-1]],
        "by_name": runs[-1][0]["collectives"],
        "bytes": [rank["bytes"] for rank in runs[-1]],
        "sent": [rank["sent"] for rank in runs[-1]],
        "memory": [rank["memory"] for rank in watched],
    }


def _cp(source: Path, out: Path) -> float:
    _clear(out)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    return time.perf_counter() - started


def _run(pool: Any, name: str, source: Path, out: Path, *, watch: bool) -> list[dict[str, Any]]:
    if name != "load":
        _clear(out)
    os.sync()
    return pool.run(once, name, str(source), str(out), watch=watch)


def _clear(out: Path) -> None:
    """Remove the last output, and write out what is dirty, so that nothing pays for what ran before it."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


# --- On every rank -----------------------------------------------------------------------------


def build(source: str, layout: dict[str, int]) -> None:
    """Make this rank's part of the model, which stays for all runs. Collective."""
    global _model
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import settings
    from bridge_core.testing.rank_worker import groups

    provider = AutoBridge.from_hf_pretrained(source).to_megatron_provider(spec="host")
    dtype = {"bf16": True, "params_dtype": torch.bfloat16, "perform_initialization": False}
    provider.apply_overrides(settings(layout) | dtype)
    with host_backend():
        _model = provider.provide_distributed_model(groups(**layout))
    for chunk in _model:
        for parameter in chunk.parameters():
            parameter.data.zero_()  # its memory is there before anything is measured


def once(name: str, source: str, out: str, *, watch: bool) -> dict[str, Any]:
    """One run of a verb on this rank: seconds, collectives by name, bytes of files, and memory if that is watched."""
    import torch.distributed as dist

    bridge = AutoBridge.from_hf_pretrained(source)
    dist.barrier()
    started = time.perf_counter()
    with _counted() as collectives, _watched(watch) as peak:
        if name == "load":
            report: Any = bridge.load_hf_weights(_model)
        else:
            report = bridge.save_hf_pretrained(_model, out, **VERBS[name])
    return {
        "seconds": time.perf_counter() - started,
        "collectives": dict(collectives),
        "bytes": report.bytes_read if name == "load" else report.bytes_written,
        "sent": 0 if name == "load" else report.bytes_sent,
        "memory": peak(),
    }


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Calls of torch.distributed's collectives, by name; what they call themselves is not counted again."""
    import torch.distributed as dist

    count: Counter[str] = Counter()
    inside = threading.local()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outermost = not getattr(inside, "yes", False)
            count[name] += outermost
            inside.yes = True
            try:
                return function(*args, **kwargs)
            finally:
                inside.yes = not outermost

        return call

    originals = {name: value for name, value in vars(dist).items() if callable(value) and name.startswith(_COLLECTIVES)}
    for name, function in originals.items():
        setattr(dist, name, counting(name, function))
    try:
        yield count
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


@contextmanager
def _watched(watch: bool) -> Iterator[Callable[[], int]]:
    """How many bytes that are not page cache this process held at most beyond those that it held before."""
    before, peak, done = memory_of("self").anonymous, 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(SAMPLING):
            peak = max(peak, memory_of("self").anonymous - before)

    thread = threading.Thread(target=look) if watch else None
    if thread is not None:
        thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        if thread is not None:
            thread.join()


if __name__ == "__main__":
    where, work, size, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    found = measure_live(where, work, size, rounds=times)
    print(json.dumps(found | {"megatron-bridge": peer(where, work, size, LAYOUTS[size], rounds=times)}))

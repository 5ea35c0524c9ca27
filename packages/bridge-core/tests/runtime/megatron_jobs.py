"""Jobs for the pool: live models to Megatron checkpoints and back, with mcore's global state poisoned."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any


def _opened(bridge, chunks):
    from bridge_core.runtime.live import open_live

    return open_live(chunks, bridge.family, bridge.fields, ignore=bridge.ignore)


def _build(bridge, layout: dict[str, Any]):
    from bridge_core.testing.mcore_jobs import build

    _, _, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return chunks


def save(path: str, layout: dict[str, Any], out: str, *, ignore: tuple[str, ...] = (), **options: Any):
    """Load HF weights, save a Megatron checkpoint; the report."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path, ignore=ignore)
    with host_backend():
        chunks = _build(bridge, layout)
        with poisoned_parallel_state(frozenset()) as reads:
            bridge.load_hf_weights(chunks)
            report = bridge.save_megatron_model(chunks, out, **options)
    assert not reads, reads
    return report


def load(path: str, layout: dict[str, Any], folder: str, *, ignore: tuple[str, ...] = ()):
    """Load a Megatron checkpoint and, into a second model, the HF weights: parameters must be equal."""
    import torch
    from runtime.helpers import poisoned_parallel_state

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path, ignore=ignore)
    with host_backend():
        chunks, others = _build(bridge, layout), _build(bridge, layout)
        with poisoned_parallel_state(frozenset()) as reads:
            report = bridge.load_megatron_model(chunks, folder)
        assert not reads, reads
        bridge.load_hf_weights(others)
    live, other = _opened(bridge, chunks), _opened(bridge, others)
    for shard in live.shards:
        assert torch.equal(live.tensor(shard), other.tensor(shard)), shard.param
    return report


def save_unequally(path: str, iterations: list[Any], out: str) -> str:
    """Save with a number of the iteration for each rank; what this rank is told."""
    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        chunks = _build(bridge, {"tp": 2})
        bridge.load_hf_weights(chunks)
        try:
            bridge.save_megatron_model(chunks, out, iteration=iterations[dist.get_rank()])
        except BridgeError as error:
            return str(error)
    return "no error"


def load_refused(path: str, changes: dict[str, Any], layout: dict[str, Any], folder: str) -> str:
    """Load a checkpoint into a model of other fields; the error's text. Nothing may have been copied."""
    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    bridge.fields = bridge.fields | changes
    with host_backend():
        chunks = _build(bridge, layout)
        try:
            bridge.load_megatron_model(chunks, folder)
        except BridgeError as error:
            assert all(p.isnan().all() for chunk in chunks for p in chunk.parameters())
            return str(error)
    return "no error"


def fail(path: str, layout: dict[str, Any], verb: str, place: str, rank: int, folder: str, notes: str) -> str:
    """One rank fails at a place inside of megatron-core, or is killed there; what a rank was told, and how late.

    Whoever is left also notes it in a file: a killed rank ends the whole job.
    """
    import time
    from pathlib import Path

    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    own = dist.get_rank()
    with host_backend():
        chunks = _build(bridge, layout)
        bridge.load_hf_weights(chunks)
        with _fault(verb, place) if own == rank else nullcontext():
            started = time.monotonic()
            try:
                if verb == "save":
                    bridge.save_megatron_model(chunks, folder)
                else:
                    bridge.load_megatron_model(chunks, folder)
                text = "no error"
            except (BridgeError, OSError) as error:
                text = f"{type(error).__name__}: {error}"
            text = f"{time.monotonic() - started:.1f}\n{text}"
    Path(notes, str(own)).write_text(text)
    if place == "killed":
        time.sleep(15)  # alive longer than the pool waits, so that nobody is released by this rank's end
    # The groups of the caller still work: they have not seen what happened.
    else:
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, own)
        assert said == list(range(len(said)))
    return text


@contextmanager
def _fault(verb: str, place: str):
    """Break megatron-core's save or load: before its first collective, where it moves bytes, or by a kill.

    The kill is where the others wait for this rank: while bytes move, mcore starts processes of its own, which can
    take longer than a pool waits for the ranks that are left.
    """
    import os
    import signal
    from unittest.mock import patch

    import torch.distributed.checkpoint as dcp
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    moving = (
        (filesystem_async.FileSystemWriterAsync, "prepare_write_data")
        if verb == "save"
        else (dcp.FileSystemReader, "read_data")
    )
    where = moving if place == "moving" else (dist_checkpointing, verb)
    with patch.object(*where, die if place == "killed" else full):
        yield

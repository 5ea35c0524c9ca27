"""Jobs for the pool: live models to Megatron checkpoints and back, with mcore's global state poisoned."""

from __future__ import annotations

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
    from bridge_core.testing.mcore_jobs import global_state_for_mtp

    bridge = AutoBridge.from_hf_pretrained(path, ignore=ignore)
    with host_backend(), global_state_for_mtp(bridge.fields, layout):
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
    from bridge_core.testing.mcore_jobs import global_state_for_mtp

    bridge = AutoBridge.from_hf_pretrained(path, ignore=ignore)
    with host_backend(), global_state_for_mtp(bridge.fields, layout):
        chunks, others = _build(bridge, layout), _build(bridge, layout)
        with poisoned_parallel_state(frozenset()) as reads:
            report = bridge.load_megatron_model(chunks, folder)
        assert not reads, reads
        bridge.load_hf_weights(others)
    live, other = _opened(bridge, chunks), _opened(bridge, others)
    for shard in live.shards:
        assert torch.equal(live.tensor(shard), other.tensor(shard)), shard.param
    return report


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

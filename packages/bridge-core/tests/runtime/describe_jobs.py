"""Jobs for the pool: what a live rank says of what it holds."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any


class CommunicationError(Exception):
    """A collective was called where none may be."""


@contextmanager
def no_communication():
    """Every function of torch.distributed that sends or receives raises."""
    import torch.distributed as dist

    words = ("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv", "barrier")
    originals = {name: value for name, value in vars(dist).items() if callable(value) and name.startswith(words)}

    def refuse(*args, **kwargs):
        raise CommunicationError("a collective was called")

    for name in originals:
        setattr(dist, name, refuse)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(dist, name, value)


def describe(path: str, layout: dict[str, Any]):
    """Local shards, manifest entries and the vLLM source of a loaded model, as plain values."""
    import torch

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    with host_backend():
        bridge = AutoBridge.from_hf_pretrained(path)
        _, _, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
        bridge.load_hf_weights(chunks)
        memory = [
            (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for chunk in chunks for p in chunk.parameters()
        ]
        with no_communication():
            shards = list(bridge.iter_local_shards(chunks))
            entries = bridge.m2n_entries(chunks)
            locals_ = [None if (local := entry.local_tensor()) is None else local.clone() for entry in entries]
        source = bridge.weight_source(chunks, bucket_bytes=60_000)
        said = source.metadata()
        passes = [[(name, tensor.clone()) for name, tensor in source] for _ in range(2)]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*passes, strict=True))
    for shard in shards:
        assert any(start <= shard.tensor.data_ptr() < end for start, end in memory), shard.name
        assert not shard.tensor.requires_grad
    # A view shows what is written to the parameter afterwards.
    with torch.no_grad():
        copies = [shard.tensor.clone() for shard in shards]
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.add_(1)
    assert all(torch.equal(copy + 1, shard.tensor) for copy, shard in zip(copies, shards, strict=True))
    return {
        "shards": [
            (s.name, s.shape, s.dtype, s.box, s.piece, copy.contiguous(), s.replica)
            for s, copy in zip(shards, copies, strict=True)
        ],
        "entries": [
            (e.key, e.global_shape, e.mesh, e.placements, e.box, e.replica, e.allow_full_fallback, local)
            for e, local in zip(entries, locals_, strict=True)
        ],
        "metadata": said,
        "streamed": [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in passes[0]],
    }

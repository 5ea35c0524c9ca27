"""Jobs for the pool: fp8 checkpoints into live models and out again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


def fp8_round_trip(path: str, layout: dict[str, Any], out: str, one_reader: bool) -> dict[str, Any]:
    """Load an fp8 folder in bfloat16, save and stream it in fp8; what was read, written and streamed."""
    import torch
    import torch.distributed as dist
    from runtime.helpers import poisoned_parallel_state, small_bands

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    with ExitStack() as stack:
        stack.enter_context(host_backend())
        bridge = AutoBridge.from_hf_pretrained(path)
        _, _, chunks = build(bridge.fields | {"params_dtype": torch.bfloat16}, layout, spec="host")
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        everyone = dist.group.WORLD
        reads = stack.enter_context(poisoned_parallel_state(frozenset()))
        node = {"one_reader_per_node": True, "node_group": everyone, "bucket_bytes": 30_000} if one_reader else {}
        loaded = bridge.load_hf_weights(chunks, **node)
        with small_bands():
            saved = bridge.save_hf_pretrained(chunks, out, fp8=True)
        stream = bridge.stream(chunks, fp8=True, bucket_bytes=40_000)
        # Bytes: fp8 tensors cannot be pickled.
        tensors = [(name, tensor.contiguous().view(torch.uint8).clone()) for name, tensor in stream]
        assert not reads, reads
    shards = bridge.plan().quantised
    codes = plain = 0
    from bridge_core.runtime.live import open_live

    for shard in open_live(chunks, bridge.family, bridge.fields).shards:
        for piece in shard.pieces:
            if piece.source.tensor in shards:
                codes += piece.numel
            else:
                plain += 4 * piece.numel
    return {
        "read": loaded.bytes_read,
        "written": saved.bytes_written,
        "metadata": stream.metadata(),
        "planned": stream.live.plan.metadata(),
        "stream": tensors,
        "codes": codes,
        "plain": plain,
    }


def expert_bias_after(path: str) -> tuple[set[str], bool]:
    """The dtype of expert biases in a bfloat16 model after loading, and whether they are the file's."""
    import torch
    from fp8_folders import load

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.live import open_live
    from bridge_core.runtime.tensors import dtype_name
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields | {"params_dtype": torch.bfloat16}, {}, spec="host")
        bridge.load_hf_weights(chunks)
        live = open_live(chunks, bridge.family, bridge.fields)
    from pathlib import Path

    tensors = load(Path(path))
    held = [(shard, live.tensor(shard)) for shard in live.shards if shard.entry.endswith("expert_bias")]
    equal = all(torch.equal(tensor, tensors[shard.pieces[0].source.tensor]) for shard, tensor in held)
    return {dtype_name(tensor) for _, tensor in held}, equal and len(held) == 4

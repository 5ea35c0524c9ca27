"""Jobs for the pool: load HF weights into a live model, save and stream them again."""

from __future__ import annotations

from typing import Any


def build_at(fields: dict[str, Any], layout: dict[str, Any], spec: str):
    """Chunks of a layout on this rank, the groups that they were built with, and the groups of the layout.

    mcore's attention refuses context parallelism without Transformer Engine. Weights do not know of it: the model is
    built as without, its context-parallel ranks data-parallel ones, and its weights move in the groups of the layout.
    """
    from bridge_core.testing.mcore_jobs import build
    from bridge_core.testing.rank_worker import groups

    plain = dict(layout)
    cp = plain.pop("cp", 1)
    plain["dp"] = plain.get("dp", 1) * cp
    _, built, chunks = build(fields, plain if cp > 1 else layout, spec=spec, vocab_divisible_by=16)
    sizes = {name: layout[name] for name in ("tp", "pp", "ep", "etp", "dp") if name in layout}
    return chunks, built, groups(**sizes, cp=cp) if cp > 1 else built


def round_trip(
    path: str, layout: dict[str, Any], spec: str, out: str, tokens, *, bucket_bytes: int = 60_000, ignore=()
):
    """Load, run, save, stream: what each step said on this rank."""
    import torch
    from runtime.helpers import poisoned_parallel_state, small_bands

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.live import open_live
    from bridge_core.testing.mcore_jobs import forward

    bridge = AutoBridge.from_hf_pretrained(path, ignore=ignore)
    with host_backend():
        chunks, built, pg = build_at(bridge.fields, layout, spec)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        with poisoned_parallel_state(frozenset()) as reads, small_bands():
            loaded = bridge.load_hf_weights(chunks, groups=pg)
            saved = bridge.save_hf_pretrained(chunks, out, groups=pg)
            stream = bridge.stream(chunks, groups=pg, bucket_bytes=bucket_bytes)
            tensors = {name: tensor.clone() for name, tensor in stream}
            collectives = stream.collectives
            again = [name for name, _ in stream]
            parts = {shard.name for shard in bridge.iter_local_shards(chunks, groups=pg)}
            assert parts >= {entry.key for entry in bridge.m2n_entries(chunks, groups=pg)}
        assert not reads, reads
        with torch.no_grad():
            logits = forward([chunk.eval() for chunk in chunks], built, tokens)
    live = open_live(chunks, bridge.family, bridge.fields, groups=pg, ignore=ignore)
    return {
        "loaded": loaded,
        "saved": saved,
        "stream": tensors,
        "order": list(tensors),
        "again": again,
        "metadata": stream.metadata(),
        "collectives": collectives,
        "buckets": len(stream._buckets),
        "logits": logits,
        "tp": pg.tp.rank(),
        "parts": parts,
        "held": sum(tensor.numel() * tensor.element_size() for tensor in live.tensors.values()),
        "padding": sum(box.numel * 4 for shard in live.shards for box in shard.pad),
    }


def refuse(path: str, fields_changes: dict[str, Any], layout: dict[str, Any]) -> str:
    """Load into a model that was built from other fields; the error's text."""
    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields | fields_changes, layout, spec="host")
        before = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
        try:
            bridge.load_hf_weights(chunks)
        except BridgeError as error:
            after = [parameter for chunk in chunks for parameter in chunk.parameters()]
            assert all((a == b).all() for a, b in zip(before, after, strict=True)), "bytes were copied"
            return str(error)
    return "no error"


def build_without_global_state(path: str, spec: str) -> str:
    """Build a model with prediction layers; the error's text."""
    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    with host_backend():
        try:
            build(AutoBridge.from_hf_pretrained(path).fields, {}, spec=spec)
        except BridgeError as error:
            return str(error)
    return "no error"


def fail_on_one_rank(path: str, layout: dict[str, Any], step: str, out: str) -> str:
    """One rank cannot read (or write, or stream); what every rank is told."""
    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime import load, node_load, shared_files
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    def broken(*args, **kwargs):
        raise MemoryError("no memory left on this rank")

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        places = {
            "load": [(load, "read_into")],
            "load, room": [(node_load, "staging")],
            "save": [(shared_files.SharedFiles, "_write")],
            "save, room": [(shared_files, "staging")],
        }.get(step, [])
        originals = [(where, name, getattr(where, name)) for where, name in places]
        if dist.get_rank() == 1:
            for where, name in places:
                setattr(where, name, broken)
        try:
            if step == "load, room":
                bridge.load_hf_weights(chunks, one_reader_per_node=True, node_group=dist.group.WORLD)
            elif step == "load":
                bridge.load_hf_weights(chunks)
            elif step.startswith("save"):
                bridge.save_hf_pretrained(chunks, out)
            else:
                for number, (_, tensor) in enumerate(bridge.export_hf_weights(chunks, bucket_bytes=20_000)):
                    assert tensor.numel()
                    if dist.get_rank() == 1 and number == 3:
                        break
                if dist.get_rank() == 1:
                    return "left"
        except (BridgeError, MemoryError) as error:
            return str(error)
        finally:
            for where, name, original in originals:
                setattr(where, name, original)
    return "no error"


def die_on_one_rank(path: str, layout: dict[str, Any], step: str, out: str, notes: str) -> None:
    """The last rank is killed in the middle of a step; the others note what they were told, and when."""
    import os
    import signal
    import time
    from pathlib import Path

    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime import load, save
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    rank = dist.get_rank()
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, _, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        if rank == dist.get_world_size() - 1:
            load.read_into, save.SharedFiles._write = die, die
        started = time.monotonic()
        try:
            if step == "load":
                bridge.load_hf_weights(chunks)
            else:
                bridge.save_hf_pretrained(chunks, out)
            text = "no error"
        except (BridgeError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
        Path(notes, str(rank)).write_text(f"{time.monotonic() - started:.1f}\n{text}")

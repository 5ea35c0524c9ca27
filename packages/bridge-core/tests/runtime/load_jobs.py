"""Jobs for the pool: options of loading HF weights."""

from __future__ import annotations

from typing import Any


def _build(bridge, layout: dict[str, Any]):
    from bridge_core.testing.mcore_jobs import build

    _, pg, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return pg, chunks


def one_reader(path: str, layout: dict[str, Any], node: int, *, broken: bool = False):
    """Load with a reader per `node` ranks and without: equal parameters; the report, or the error's text."""
    import torch
    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime import node_load
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    size = dist.get_world_size()
    nodes = [dist.new_group(list(range(start, start + node))) for start in range(0, size, node)]
    original = node_load._read
    with host_backend():
        (_, chunks), (_, others) = _build(bridge, layout), _build(bridge, layout)
        if broken and dist.get_rank() == 0:
            node_load._read = _no_memory
        try:
            report = bridge.load_hf_weights(
                chunks, one_reader_per_node=True, node_group=nodes[dist.get_rank() // node], bucket_bytes=60_000
            )
        except (BridgeError, MemoryError) as error:
            return str(error)
        finally:
            node_load._read = original
        bridge.load_hf_weights(others)
    for chunk, other in zip(chunks, others, strict=True):
        for a, b in zip(chunk.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    return report


def _no_memory(*args):
    raise MemoryError("no memory left on this rank")


def changed_head(path: str, layout: dict[str, Any], allowed: tuple[str, ...]):
    """Load into a model whose last stage has a head of one row; the report and the head, or the error's text."""
    import torch

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        pg, chunks = _build(bridge, layout)
        last = pg.pp.rank() == pg.pp.size() - 1
        if last:
            device = next(chunks[-1].parameters()).device
            chunks[-1].output_layer = torch.nn.Linear(bridge.fields["hidden_size"], 1, device=device)
            torch.nn.init.constant_(chunks[-1].output_layer.weight, 3.0)
        try:
            report = bridge.load_hf_weights(chunks, allowed_mismatched=allowed)
        except BridgeError as error:
            return str(error)
    rest = [p for chunk in chunks for name, p in chunk.named_parameters() if not name.startswith("output_layer")]
    assert not any(parameter.isnan().any() for parameter in rest)
    assert not last or (chunks[-1].output_layer.weight == 3.0).all()
    return report


def witnessed(path: str, layout: dict[str, Any], one_reader: bool) -> dict[str, int]:
    """Load, and what the kernel counted meanwhile; bytes in files of what this rank holds."""
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.checkpoint.hf_folder import open_hf
    from bridge_core.dtypes import dtype_of
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.live import open_live

    options = {"one_reader_per_node": True, "node_group": dist.group.WORLD} if one_reader else {}
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, chunks = _build(bridge, layout)
        bridge.load_hf_weights(chunks, **options)  # whatever is imported late is
        before = _rchar()
        report = bridge.load_hf_weights(chunks, **options)
        counted = _rchar() - before
    tensors = open_hf(path).tensors
    pieces = [piece for shard in open_live(chunks, bridge.family, bridge.fields).shards for piece in shard.pieces]
    owned = sum(piece.numel * dtype_of(tensors[piece.source.tensor].parts[0].dtype).itemsize for piece in pieces)
    return {"read": report.bytes_read, "counted": counted, "owned": owned}


def _rchar() -> int:
    """Bytes that this process asked for and got by read and its like; pages of maps are not in it (man proc_pid_io)."""
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("rchar:"))


def lose_a_file(paths: list[str], layout: dict[str, Any], lost: str | None):
    """Load, each rank from a folder of its own; rank 1 loses a file once all have read the headers, if it is named.

    What this rank is told, whether anything was copied, and whether it loads from the first folder afterwards.
    """
    from pathlib import Path

    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime import load
    from bridge_core.runtime.host import host_backend

    original = load.check_copies

    def check_and_lose(*args, **kwargs):
        original(*args, **kwargs)
        if lost and dist.get_rank() == 1:
            Path(paths[1], lost).unlink()

    bridge = AutoBridge.from_hf_pretrained(paths[0])
    with host_backend():
        _, chunks = _build(bridge, layout)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        load.check_copies = check_and_lose
        try:
            bridge.load_hf_weights(chunks, paths[dist.get_rank()])
            told = "no error"
        except (BridgeError, OSError) as error:
            told = f"{type(error).__name__}: {error}"
        finally:
            load.check_copies = original
        copied = not all(parameter.isnan().all() for parameter in parameters)
        bridge.load_hf_weights(chunks)
    return told, copied, not any(parameter.isnan().any() for parameter in parameters)


def read_in_threads(path: str, layout: dict[str, Any], threads: int):
    """Load with some threads: the report, all parameters, and what each thread asked of which file: first byte, bytes.

    No thread reads before all of them are there.
    """
    import os
    from pathlib import Path
    from threading import Barrier, get_ident

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    read, asked, together = os.preadv, {}, Barrier(threads, timeout=30)

    def noted(descriptor, buffers, offset):
        if get_ident() not in asked:
            asked[get_ident()] = []
            together.wait()
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        asked[get_ident()].append((file, offset, sum(map(len, buffers))))
        return read(descriptor, buffers, offset)

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, chunks = _build(bridge, layout)
        os.preadv = noted
        try:
            report = bridge.load_hf_weights(chunks, threads=threads)
        finally:
            os.preadv = read
    filled = {(n, name): p.detach() for n, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    return report, filled, list(asked.values())


def padded_rows(path: str, layout: dict[str, Any], one_reader: bool):
    """Load over ones: this rank's part of the embedding and of the output layer."""
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    options = {"one_reader_per_node": True, "node_group": dist.group.WORLD} if one_reader else {}
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        _, (chunk,) = _build(bridge, layout)
        for parameter in chunk.parameters():
            parameter.data.fill_(1)
        bridge.load_hf_weights(chunk, **options)
    return chunk.embedding.word_embeddings.weight.detach(), chunk.output_layer.weight.detach()


def in_different_ways(path: str, layout: dict[str, Any], options: list[dict[str, Any]]) -> tuple[str, bool]:
    """Load with options of each rank's own; what it is told, and whether nothing was copied.

    An option of `node_group` stands for one of all ranks.
    """
    import torch.distributed as dist
    from runtime.helpers import errors_of

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    own = options[dist.get_rank()]
    if "node_group" in own:
        own = own | {"node_group": dist.group.WORLD}
    with host_backend():
        _, chunks = _build(bridge, layout)
        (text,) = errors_of(lambda: bridge.load_hf_weights(chunks, **own))
    return text, all(p.isnan().all() for chunk in chunks for p in chunk.parameters())


def no_model(path: str) -> list[str]:
    """What every verb says of things that are no model."""
    import torch
    from runtime.helpers import errors_of

    from bridge_core import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(path)
    things = (None, [], "model", torch.nn.Linear(2, 2))
    verbs = (bridge.load_hf_weights, bridge.stream, lambda model: bridge.save_hf_pretrained(model, f"{path}/out"))
    return errors_of(*(lambda verb=verb, thing=thing: verb(thing) for verb in verbs for thing in things))

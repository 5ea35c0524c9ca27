"""One reader per node: it reads each tensor that a rank of the node needs once, and the others hear it.

For shared filesystems that are slower than the links within a node. Tensors travel in buckets, one broadcast
per bucket; every rank copies its own pieces out of the bucket.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.checkpoint.reading import Reader
from bridge_core.checkpoint.transfer import Job
from bridge_core.checkpoint.workers import jointly
from bridge_core.geometry import Piece, View, row_major
from bridge_core.plan import Shard
from bridge_core.runtime.agreement import agreed_device
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.tensors import cast, dtype_name, flat, host_memory, read_into, staging, torch_dtype, window
from bridge_core.runtime.workers import TorchWorkers, noticing_loss

if TYPE_CHECKING:
    from torch import Tensor

_ALIGN = 16  # bytes; every tensor in a bucket starts at a multiple, so that it can be viewed in its dtype


Bucket = list[tuple[str, int]]
"""Tensors by name, each with the place of its first byte in a bucket."""


class Tally(NamedTuple):
    """Bytes that this rank read from files, and broadcasts that it took part in."""

    bytes_read: int
    broadcasts: int


def fill_from_node(live: LiveModel, folder: HfFolder, node_group: Any, bucket_bytes: int) -> Tally:
    """Fill the parameters of `live`; rank 0 of `node_group` reads. Collective over `node_group`.

    If a rank fails, all ranks of the node raise before the next broadcast.

    Args:
        live: the model, on CPU or GPU; `node_group` must be able to broadcast there.
        folder: the HF folder; only the reader's is read.
        node_group: ranks of this node.
        bucket_bytes: bytes of a bucket; a larger tensor makes a larger bucket.
    """
    workers = TorchWorkers(node_group)
    live = replace(live, place=agreed_device(live, node_group))
    mine: dict[str, list[tuple[Shard, Piece]]] = {}
    for shard in live.shards:
        for piece in shard.pieces:
            mine.setdefault(piece.source.tensor, []).append((shard, piece))
    needed = {name for names in workers.share(list(mine)) for name in names}
    buckets = _buckets(live, folder, needed, bucket_bytes)
    sizes = [bucket[-1][1] + folder.tensors[bucket[-1][0]].nbytes for bucket in buckets]
    room = jointly(workers, lambda: staging(max(sizes, default=0), live.device))
    _clear_padding(live)
    with ExitStack() as stack:
        reading = Reader(OpenFiles(stack), host_memory(live.device))
        heard: Bucket = []

        def turn(bucket: Bucket) -> None:
            """Take in what the last broadcast brought; the reader reads for the next one."""
            _copy(heard, folder, live, mine, room)
            if workers.rank == 0:
                _read(bucket, folder, reading, room)

        for bucket, size in zip(buckets, sizes, strict=True):
            workers.together(partial(turn, bucket))
            _broadcast(room[:size], node_group)
            heard = bucket
        turn([])
    return Tally(reading.nbytes, len(buckets))


def _broadcast(data: Tensor, group: Any) -> None:
    """The bytes of the group's first rank, on all of them. Collective.

    Every rank hears the first one itself. gloo's own broadcast goes from rank to rank: one that is lost, or gives up
    because of that, would leave those after it waiting.
    """
    import torch.distributed as dist

    if data.is_cuda:  # NCCL tells nobody of a lost rank either way, and its broadcast sends every byte once
        dist.broadcast(data, group=group, group_src=0)
        return
    ranks = dist.get_process_group_ranks(group)
    if group.rank() == 0:
        sends = [dist.P2POp(dist.isend, data, rank, group) for rank in ranks[1:]]
    else:
        sends = [dist.P2POp(dist.irecv, data, ranks[0], group)]
    with noticing_loss():
        for work in dist.batch_isend_irecv(sends) if sends else ():
            work.wait()


def _buckets(live: LiveModel, folder: HfFolder, needed: set[str], bucket_bytes: int) -> list[Bucket]:
    """Tensors with their byte offsets, bucket by bucket, in the plan's order; the same on all ranks of a node."""
    buckets: list[Bucket] = []
    end = bucket_bytes + 1
    for name in live.plan.hf_tensors:
        if name not in needed:
            continue
        size = -(-folder.tensors[name].nbytes // _ALIGN) * _ALIGN
        if end + size > bucket_bytes:
            buckets.append([])
            end = 0
        buckets[-1].append((name, end))
        end += size
    return buckets


def _clear_padding(live: LiveModel) -> None:
    for shard in live.shards:
        for box in shard.pad:
            region = tuple(slice(start, start + size) for start, size in zip(box.start, box.shape, strict=True))
            live.tensor(shard).detach()[region] = 0


def _read(bucket: Bucket, folder: HfFolder, reader: Reader, data: Tensor) -> None:
    for name, at in bucket:
        stored = folder.tensors[name]
        view = View(name, 0, row_major(stored.shape))
        job = Job(stored._replace(encoded=None), ((stored, Piece(stored.shape, view, view)),))
        read_into(_part(data, at, stored), job, reader)


def _copy(
    bucket: Bucket,
    folder: HfFolder,
    live: LiveModel,
    mine: dict[str, list[tuple[Shard, Piece]]],
    data: Tensor,
) -> None:
    for name, at in bucket:
        source = _part(data, at, folder.tensors[name])
        for shard, piece in mine.get(name, ()):
            target = window(flat(live.tensor(shard)), piece.shape, piece.target)
            values = window(source, piece.shape, piece.source)
            shift = live.plan.entry(shard.entry).shift
            target.copy_(cast(values.float() + shift if shift else values, dtype_name(target), where=name))


def _part(data: Tensor, at: int, stored: Any) -> Tensor:
    return data[at : at + stored.nbytes].view(torch_dtype(stored.dtype))

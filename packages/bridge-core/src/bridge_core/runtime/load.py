"""HF weights into a live model: every rank reads its own bytes, straight into its own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.checkpoint.transfer import Job, OpenFiles, gather, together
from bridge_core.dtypes import dtype_of
from bridge_core.families import Family, Fields
from bridge_core.plan import Shard
from bridge_core.runtime.live import LiveModel, open_live
from bridge_core.runtime.tensors import dtype_name, flat, from_numpy
from bridge_core.runtime.workers import TorchWorkers


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading did on this rank: parameters filled, bytes read from HF tensors, tensors left out by name."""

    parameters: int
    bytes_read: int
    ignored: tuple[str, ...]


def load_hf_weights(
    model: Any,
    path: str | Path,
    family: Family,
    fields: Fields,
    *,
    groups: Any = None,
    group: Any = None,
    threads: int = 2,
) -> LoadReport:
    """Fill a live model from an HF folder. Collective over `group`.

    Everything is checked on all ranks before the first byte is copied: the folder against the plan, the
    model against the plan. Parameters keep their dtype; values are cast where the file's differs. Rows that
    pad the vocabulary become zero.

    Args:
        model: chunks of this rank, wrapped or not, on CPU or GPU.
        path: HF folder; all ranks must see it.
        groups: process groups of the model; by default those it was built with.
        group: all ranks of the model; by default torch's default group.
        threads: parameters read at a time.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    workers = TorchWorkers(group or default_group())
    opened: list[tuple[LiveModel, HfFolder, tuple[str, ...]]] = []

    def check() -> None:
        live = open_live(model, family, fields, groups=groups)
        folder = open_hf(path)
        opened.append((live, folder, live.plan.audit(folder.shapes).ignored))

    workers.together(check)
    live, folder, ignored = opened[0]
    workers.together(lambda: _fill(live, folder, threads))
    read = sum(
        piece.numel * dtype_of(folder.tensors[piece.source.tensor].dtype).itemsize
        for shard in live.shards
        for piece in shard.pieces
    )
    return LoadReport(parameters=len(live.shards), bytes_read=read, ignored=ignored)


def default_group() -> Any:
    """torch's default process group; it is no state of Megatron's."""
    import torch.distributed as dist

    return dist.group.WORLD


def _fill(live: LiveModel, folder: HfFolder, threads: int) -> None:
    stop = Event()
    with ExitStack() as stack:
        files = OpenFiles(stack)
        parts = [live.shards[number::threads] for number in range(threads)]
        together([lambda part=part: _fill_some(live, part, folder, files, stop) for part in parts if part], stop)


def _fill_some(live: LiveModel, shards: Sequence[Shard], folder: HfFolder, files: OpenFiles, stop: Event) -> None:
    for shard in shards:
        if stop.is_set():
            return
        target = flat(live.tensor(shard))
        parts = tuple((folder.tensors[piece.source.tensor], piece) for piece in shard.pieces)
        job = Job(Stored("", 0, dtype_name(target), shard.shape), parts)
        for first, block in gather(job, files):
            target[first : first + block.size].copy_(from_numpy(block, job.target.dtype))

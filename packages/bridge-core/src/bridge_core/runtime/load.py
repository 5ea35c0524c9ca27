"""HF weights into a live model: every rank reads its own bytes, straight into its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.copies import check_copies
from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.reading import Reader
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.checkpoint.transfer import Job, in_file_order, in_threads, place_of, share
from bridge_core.checkpoint.workers import jointly
from bridge_core.errors import ConfigError, CoverageError, check_count
from bridge_core.families import Family, Fields
from bridge_core.geometry import Shape
from bridge_core.patterns import fill as fill_name
from bridge_core.plan import Shard
from bridge_core.runtime.agreement import check_same, check_size
from bridge_core.runtime.live import LiveModel, matches, open_live
from bridge_core.runtime.node_load import Tally, fill_from_node
from bridge_core.runtime.tensors import dtype_name, flat, host_memory, read_into
from bridge_core.runtime.words import default_group
from bridge_core.runtime.workers import TorchWorkers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading did on this rank.

    Attributes:
        parameters: parameters filled.
        bytes_read: bytes that this rank asked of the weight files, counted at the reads: what its parameters are made
            from, as it is stored, of quantised ones with their scales. Headers are not in it.
        ignored: HF tensors left out, by name.
        left: parameters left as they were, because `allowed_mismatched` names them; on any rank.
        broadcasts: broadcasts within the node, where only one of its ranks reads.
    """

    parameters: int
    bytes_read: int
    ignored: tuple[str, ...]
    left: tuple[str, ...] = ()
    broadcasts: int = 0


def load_hf_weights(
    model: Any,
    path: str | Path,
    family: Family,
    fields: Fields,
    *,
    ignore: Sequence[str] = (),
    groups: Any = None,
    group: Any = None,
    threads: int = 2,
    allowed_mismatched: Collection[str] = (),
    one_reader_per_node: bool = False,
    node_group: Any = None,
    bucket_bytes: int = 256 * 1024 * 1024,
) -> LoadReport:
    """Fill a live model from an HF folder. Collective over `group`.

    Everything is checked on all ranks before the first byte is copied: the folder against the plan, the
    model against the plan. Parameters keep their dtype; values are cast where the file's differs. Rows that
    pad the vocabulary become zero.

    Args:
        model: chunks of this rank, wrapped or not, on CPU or GPU.
        path: HF folder; all ranks must see it.
        ignore: patterns (as in a shell) of HF names to leave out, which the report names.
        groups: process groups of the model; by default those it was built with.
        group: all ranks of the model; by default torch's default group.
        threads: parameters read at a time.
        allowed_mismatched: patterns of parameter names, such as `"output_layer.weight"`, that may differ between
            the model and the checkpoint or be absent from either: a changed head. They are left as they are,
            all of them, also where they would fit; the report names them. One that no rank has is refused.
        one_reader_per_node: only the first rank of `node_group` reads, and broadcasts to the others.
        node_group: ranks of this node; wanted with `one_reader_per_node`, and not read otherwise.
        bucket_bytes: bytes of a broadcast.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """

    group = group or default_group()
    check_size(model, groups, group)

    def opened(folder: HfFolder) -> LiveModel:
        return open_live(
            model,
            family,
            fields,
            groups=groups,
            excepted=allowed_mismatched,
            inventory=folder.shapes,
            ignore=ignore,
        )

    return load_live(
        opened,
        path,
        group=group,
        threads=threads,
        allowed_mismatched=allowed_mismatched,
        one_reader_per_node=one_reader_per_node,
        node_group=node_group,
        bucket_bytes=bucket_bytes,
    )


def load_live(
    opened: Callable[[HfFolder], LiveModel],
    path: str | Path,
    *,
    group: Any = None,
    threads: int = 2,
    allowed_mismatched: Collection[str] = (),
    one_reader_per_node: bool = False,
    node_group: Any = None,
    bucket_bytes: int = 256 * 1024 * 1024,
) -> LoadReport:
    """Fill whatever `opened` gives from an HF folder; what `load_hf_weights` does of a single model.

    Collective over `group`. What is not said here is as there.

    Args:
        opened: the model matched against its plan, given the folder.
    """
    group = group or default_group()
    workers = TorchWorkers(group)

    def check() -> tuple[LiveModel, HfFolder, tuple[str, ...]]:
        check_count("threads", threads)
        check_count("bucket_bytes", bucket_bytes)
        if one_reader_per_node:
            _check_node(node_group)
        folder = open_hf(path)
        live = opened(folder)
        return live, folder, live.plan.audit(_inventory(live, folder, allowed_mismatched)).ignored

    live, folder, ignored = jointly(workers, check)
    check_same(
        repr((sorted(allowed_mismatched), one_reader_per_node, bucket_bytes if one_reader_per_node else None)).encode(),
        group,
        what="ranks are about to load in different ways",
        where="load_hf_weights: allowed_mismatched, one_reader_per_node, bucket_bytes",
        fix="call it with the same options everywhere",
    )
    left = _left(live, allowed_mismatched, workers) if allowed_mismatched else ()
    workers.together(lambda: check_copies(live.plan, folder, rank=workers.rank, size=workers.size))

    def fill() -> Tally:
        if one_reader_per_node:
            return fill_from_node(live, folder, node_group, bucket_bytes)
        return _fill(live, folder, threads)

    done = jointly(workers, fill)
    return LoadReport(
        parameters=len(live.shards),
        bytes_read=done.bytes_read,
        ignored=(*ignored, *folder.beside),
        left=left,
        broadcasts=done.broadcasts,
    )


def _check_node(node_group: Any) -> None:
    if node_group is None:
        raise ConfigError(
            "one reader per node was asked for, without saying which ranks are a node",
            where="node_group",
            expected="a process group of the ranks of this node",
            got="None",
            fix="pass node_group, made with torch.distributed.new_group over the ranks of each node",
        )


def _inventory(live: LiveModel, folder: HfFolder, allowed: Collection[str]) -> dict[str, Shape]:
    """Shapes of the folder's tensors; those of excepted parameters are taken to be as the plan has them."""
    if not allowed:
        return folder.shapes
    excepted = {
        fill_name(tensor.name, *instance): tensor.shape
        for entry in live.plan.entries
        for tensor in entry.hf
        for instance in entry.instances()
        if matches(fill_name(entry.name, *instance), allowed)
    }
    return folder.shapes | excepted


def _left(live: LiveModel, allowed: Collection[str], workers: TorchWorkers) -> tuple[str, ...]:
    """Names of the excepted parameters of all ranks, once each. Collective."""
    left = tuple(sorted({name for names in workers.share(list(live.excepted)) for name in names}))
    if unused := [pattern for pattern in allowed if not any(matches(name, [pattern]) for name in left)]:
        raise CoverageError(
            "a name that may differ is no parameter of the model on any rank",
            where="allowed_mismatched",
            expected="names of parameters, such as output_layer.weight",
            got=", ".join(unused),
            fix="correct the name, or leave it out",
        )
    return left


def _fill(live: LiveModel, folder: HfFolder, threads: int) -> Tally:
    """Fill all parameters with what this rank reads itself, each thread going once through its part of the files."""
    work = sorted(((_job(live, folder, shard), flat(live.tensor(shard))) for shard in live.shards), key=_place)
    rest = iter(work)
    shares = [share([job for job, _ in work], number, threads) for number in range(threads)]
    stop = Event()
    with ExitStack() as stack:
        files = OpenFiles(stack)
        readers = [Reader(files, host_memory(live.device)) for _ in shares]
        parts = [list(islice(rest, len(jobs))) for jobs in shares]  # shares follow one another
        in_threads([partial(_fill_some, *both, stop) for both in zip(parts, readers, strict=True)], stop)
    return Tally(sum(reader.nbytes for reader in readers), 0)


def _job(live: LiveModel, folder: HfFolder, shard: Shard) -> Job:
    parts = [(folder.tensors[piece.source.tensor], piece) for piece in shard.pieces]
    target = Stored("", 0, dtype_name(live.tensor(shard)), shard.shape)
    return Job(target, in_file_order(parts), shift=live.plan.entry(shard.entry).shift)


def _place(work: tuple[Job, Tensor]) -> tuple[str, int]:
    """Where the first byte of a job lies; of one that is padding alone, nowhere."""
    return place_of(*work[0].parts[0]) if work[0].parts else ("", 0)


def _fill_some(work: Sequence[tuple[Job, Tensor]], reader: Reader, stop: Event) -> None:
    for job, target in work:
        if stop.is_set():
            return
        read_into(target, job, reader, stop)

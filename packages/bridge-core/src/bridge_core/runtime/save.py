"""A live model to an HF folder: files are laid out first, then their bytes are written in place.

No tensor is gathered anywhere. By default every owner writes its own bytes at their offsets. Where many ranks hold
the same shard they take turns, so all ranks write an equal share. Row-parallel weights would be written in runs of a
few hundred bytes; their ranks exchange columns for rows first, within the tensor-parallel group. File systems that
several nodes cannot write one file on get whole files from one rank each (`runtime.file_owners`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bridge_core.checkpoint.convert import codec_options
from bridge_core.checkpoint.files import OpenFiles, write_all
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.hf_layout import HfLayout, as_written, lay_out_files, lay_out_like
from bridge_core.checkpoint.hf_output import carried_files, copy_files, create_weight_files, finish_hf_folder
from bridge_core.checkpoint.output import check_apart, check_free, real_path, write_folder
from bridge_core.checkpoint.workers import jointly
from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError, OutputError, preview
from bridge_core.families import Family, Fields
from bridge_core.geometry import Box, Piece, View, restrict, runs
from bridge_core.plan import Shard
from bridge_core.runtime.file_owners import Sent, WholeFiles, takes_turn
from bridge_core.runtime.fp8 import agreed_scales, quantised
from bridge_core.runtime.live import LiveModel, agreed_dtypes, open_live, unwrap
from bridge_core.runtime.load import default_group
from bridge_core.runtime.tensors import cast, flat, staging
from bridge_core.runtime.workers import TorchWorkers

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What saving did on this rank.

    Attributes:
        output: the folder.
        tensors: HF tensors in it.
        bytes_written: bytes of tensors that this rank wrote to files.
        bytes_sent: bytes of tensors that it sent to other ranks.
        exchanges: exchanges between ranks that it took part in.
        files: weight files that it opened for writing.
    """

    output: Path
    tensors: int
    bytes_written: int
    bytes_sent: int
    exchanges: int
    files: tuple[str, ...]


def save_hf_pretrained(
    model: Any,
    path: str | Path,
    family: Family,
    fields: Fields,
    *,
    config: dict[str, Any] | None = None,
    ignore: Sequence[str] = (),
    source: str | Path | None = None,
    dtype: str | None = None,
    fp8: bool = False,
    max_shard_size: int = 2_000_000_000,
    overwrite: bool = False,
    durable: bool = False,
    one_writer_per_file: bool = False,
    bucket_bytes: int = 256 * 1024 * 1024,
    groups: Any = None,
    group: Any = None,
) -> SaveReport:
    """Write a live model as an HF folder. Collective over `group`; all ranks must see `path`.

    The folder gets its name last: a save that fails or is killed leaves nothing that looks finished.

    Args:
        model: chunks of this rank, wrapped or not, on CPU or GPU.
        path: output folder.
        config: config.json; by default rebuilt from `fields`.
        ignore: patterns (as in a shell) of HF names to leave out.
        source: an HF folder whose split into files is used, and whose other files are carried along.
        dtype: dtype of floating-point tensors in the files; by default that of the parameters.
        fp8: quantise what the family's fp8 checkpoints quantise (or what `source` has quantised) to fp8 with a
            scale per block.
        max_shard_size: bytes per file, where no `source` says how to split.
        overwrite: replace a folder that holds something.
        durable: wait for the disk before the folder gets its name.
        one_writer_per_file: every weight file is made and written by one rank, to which the others send their
            parts: for file systems that cannot take writes from several nodes to one file. With fewer files than
            ranks, the others only send; a smaller `max_shard_size` makes more files.
        bucket_bytes: bytes of all tensors that travel at a time with `one_writer_per_file`. A rank stages at most
            about twice that: what it sends, what it received, and the block that it writes.
        groups: process groups of the model; by default those it was built with.
        group: all ranks of the model; by default torch's default group.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    group = group or default_group()
    workers = TorchWorkers(group)
    output = real_path(Path(path))

    def check() -> tuple[LiveModel, HfFolder | None]:
        check_free(output, overwrite=overwrite)
        if fp8 and one_writer_per_file:
            raise ConfigError(
                "files that one rank writes cannot be quantised on the way",
                where="fp8, one_writer_per_file",
                expected="one of them",
                got="both",
                fix="save with one_writer_per_file, and export to fp8 offline",
            )
        if source is not None:
            check_apart(output, Path(source))
        like = open_hf(source) if source is not None else None
        held, how = like.shapes if like else None, codec_options(fp8, like)
        return open_live(model, family, fields, groups=groups, inventory=held, ignore=ignore, **how), like

    live, like = jointly(workers, check)
    dtypes = agreed_dtypes(live, dtype, group)

    layout = jointly(workers, lambda: _lay_out(live, like, dtypes, max_shard_size))
    _check_agreed(layout, group)

    def make_writer() -> SharedFiles | WholeFiles:
        if one_writer_per_file:
            return WholeFiles(live, layout, group, bucket_bytes)
        return SharedFiles(live, layout, groups or unwrap(model)[0].pg_collection, dtypes, group)

    writer = jointly(workers, make_writer)
    written = family.consistent(config, fields) if config else family.to_hf(fields)
    sent = _write(output, layout, writer, like, written, workers, overwrite=overwrite, durable=durable)
    return SaveReport(
        output=output,
        tensors=len(as_written(live.plan, dtypes)[0]),
        bytes_written=sent.written,
        bytes_sent=sent.sent,
        exchanges=sent.rounds,
        files=sent.files,
    )


def _lay_out(live: LiveModel, like: HfFolder | None, dtypes: dict[str, str], max_shard_size: int) -> HfLayout:
    if like is not None:
        return lay_out_like(like, live.plan, dtypes)
    return lay_out_files(*as_written(live.plan, dtypes), max_shard_size)


def _check_agreed(layout: HfLayout, group: Any) -> None:
    """Raise on all ranks unless they are about to write the same files. Collective."""
    import torch.distributed as dist

    said: list[Any] = [None] * group.size()
    mine = hashlib.sha256(b"".join(file.name.encode() + file.header for file in layout.files)).hexdigest()
    dist.all_gather_object(said, mine, group=group)
    if others := [rank for rank, digest in enumerate(said) if digest != said[0]]:
        raise OutputError(
            "ranks lay out the files differently",
            where="save_hf_pretrained",
            expected="the same arguments, and the same `source` to see, on every rank",
            got=f"rank 0 and ranks {preview(others)} differ",
            fix="check that all ranks see the HF folder of the bridge",
        )


def _write(
    output: Path,
    layout: HfLayout,
    writer: SharedFiles | WholeFiles,
    like: HfFolder | None,
    config: dict[str, Any],
    workers: TorchWorkers,
    *,
    overwrite: bool,
    durable: bool,
) -> Sent:
    """Write the folder: weights by `writer`, everything else by rank 0. Collective."""
    codec = writer.live.plan.codec

    def prepare(folder: Path) -> None:
        if isinstance(writer, SharedFiles):
            writer.create(folder)
        if like is not None:
            copy_files(like.path, carried_files(like), folder)

    return write_folder(
        output,
        layout.nbytes,
        workers,
        prepare,
        lambda folder, rank, size: writer.write(folder),
        lambda folder: finish_hf_folder(folder, layout, config, codec=codec, like=like),
        overwrite=overwrite,
        durable=durable,
    )


class SharedFiles:
    """The weight files of a save, each written by all ranks that hold a part of it.

    Who writes other bytes than the parameters' own (packed ones) overrides `save`, and calls `guarded` and `put`.

    Args:
        live: the model.
        layout: the files.
        groups: process groups of the model.
        dtypes: dtype of every HF tensor before it is quantised; needed where the plan has a codec, like `group`.
        group: all ranks of the model.

    Attributes:
        written: bytes of tensors that this rank wrote, by HF name.
        sent: bytes of tensors that it sent to other ranks.
        exchanges: exchanges between ranks that it took part in.
        room: bytes on the parameters' device, to receive rows in: those of the largest weight that is cut along its
            columns.
    """

    def __init__(
        self, live: LiveModel, layout: HfLayout, groups: Any, dtypes: Mapping[str, str] | None = None, group: Any = None
    ) -> None:
        self.live, self.layout, self.groups = live, layout, groups
        self.written: Counter[str] = Counter()
        self.sent = self.exchanges = 0
        self._dtypes, self._group = dict(dtypes or {}), group
        self._scales: Mapping[str, Tensor] = {}
        self._opened: set[str] = set()
        self._failure: Exception | None = None
        self.room = staging(max(map(self._received, live.shards), default=0), live.device)

    def create(self, folder: Path) -> None:
        """Make all files, at their full size. For one rank, before the others write."""
        create_weight_files(folder, self.layout)
        self._opened |= {file.name for file in self.layout.files}

    def write(self, folder: Path) -> Sent:
        """Write what this rank owns, shard by shard. Collective over each tensor-parallel group.

        An error waits for the end: the others of the group still expect exchanges.
        """
        self._places = {
            name: (folder / file.name, offset, dtype)
            for file in self.layout.files
            for name, (offset, dtype, _) in file.tensors.items()
        }
        if self.live.plan.codec is not None:
            self._scales = agreed_scales(self.live, self._dtypes, self._group)
        with ExitStack() as stack:
            self._files = OpenFiles(stack)
            for number, shard in enumerate(self.live.shards):
                if takes_turn(self.live.plan, self.live.rank, number, shard):
                    self.save(shard)
        if self._failure is not None:
            raise self._failure
        return Sent(self.written.total(), self.sent, self.exchanges, tuple(sorted(self._opened)))

    def save(self, shard: Shard) -> None:
        """Write the HF elements of one shard. Collective over the group that splits it."""
        entry = self.live.plan.entry(shard.entry)
        group = self._group_of(shard)
        tensor = flat(self.live.tensor(shard))
        if not self._received(shard):
            self.guarded(lambda: self._write(tensor, shard.pieces, entry.shift))
            return
        columns = tensor.view(shard.shape)
        received, box = exchange(columns, entry.shape, group.rank(), group.size(), group, self.room)
        self.exchanges += 1
        self.sent += tensor.nbytes - tensor.nbytes * box.shape[0] // entry.shape[0]
        whole = entry.instance(entry.pieces, shard.layer, shard.expert)
        at = (0,) * len(box.shape)
        cut = [p for piece in whole for p in restrict(piece, "target", entry.shape, box, box.shape, at)]
        self.guarded(lambda: self._write(flat(received.transpose(0, 1).reshape(box.shape)), cut, entry.shift))

    def _group_of(self, shard: Shard) -> Any:
        """The tensor-parallel group that cuts a shard's parameter."""
        return self.groups.expt_tp if self.live.plan.entry(shard.entry).is_expert else self.groups.tp

    def _received(self, shard: Shard) -> int:
        """Bytes of the rows that are received for a shard cut along its columns; 0 for any other."""
        entry, group = self.live.plan.entry(shard.entry), self._group_of(shard)
        if entry.split is None or entry.split.dim == 0 or group.size() == 1:
            return 0
        first, last = (entry.shape[0] * (group.rank() + end) // group.size() for end in (0, 1))
        return (last - first) * entry.shape[1] * self.live.tensor(shard).element_size()

    def guarded(self, step: Callable[[], T]) -> T | None:
        """What `step` returns; None if it fails, or if one failed before. The error waits for the end of `write`."""
        if self._failure is None:
            try:
                return step()
            except Exception as error:
                self._failure = error
        return None

    def _write(self, tensor: Tensor, pieces: Sequence[Piece], shift: float) -> None:
        tensor = tensor.float() - shift if shift else tensor
        held: dict[str, Tensor] = {}
        for piece in pieces:
            back = piece.inverse()
            if back.target.tensor in self._scales:
                self._write_quantised(cast(tensor, self._dtypes[back.target.tensor]), back)
                continue
            for name in self.names(back.target.tensor):
                dtype = self._places[name][2]
                if dtype not in held:
                    held[dtype] = cast(tensor, dtype).cpu()
                self.put(name, held[dtype], back)

    def _write_quantised(self, tensor: Tensor, piece: Piece) -> None:
        """The codes of what this rank owns; who owns a weight's first element writes all of its scales."""
        codec, name = self.live.plan.codec, piece.target.tensor
        assert isinstance(codec, Fp8Blocks)
        shape, scales = self.live.plan.hf_tensors[name], self._scales[name]
        codes, back = quantised(tensor, piece, shape, scales, codec)
        codes, scales = codes.cpu(), scales.contiguous().cpu().view(-1)
        row = Piece(tuple(scales.shape), View("", 0, (1,)), View("", 0, (1,)))
        for found in self.names(name):
            self.put(found, codes, back)
            if back.target.offset == 0:
                self.put(codec.scale_name(found), scales, row)

    def names(self, name: str) -> list[str]:
        """An HF tensor and those of its copies that are in the files."""
        copies = [copy for copy, of in self.live.plan.copies.items() if of.of == name]
        return [found for found in (name, *copies) if found in self._places]

    def put(self, name: str, tensor: Tensor, piece: Piece) -> None:
        """Write elements of a flat CPU tensor in the file's dtype (the piece's source) to an HF tensor (its target)."""
        path, offset, dtype = self._places[name]
        data, itemsize = _bytes(tensor), dtype_of(dtype).itemsize
        self._opened.add(path.name)
        descriptor = self._files.descriptor(str(path), write=True)
        for at_source, at_target, length in runs(piece):
            part = data[at_source * itemsize : (at_source + length) * itemsize]
            self.written[name] += write_all(descriptor, part, offset + at_target * itemsize)


def _bytes(tensor: Tensor) -> memoryview:
    """The elements of a flat CPU tensor as the bytes of a file."""
    import torch

    return tensor.view(torch.uint8).numpy().data


def exchange(
    local: Tensor, shape: tuple[int, ...], rank: int, size: int, group: Any, room: Tensor
) -> tuple[Tensor, Box]:
    """Trade columns for rows: from a shard split along dim 1 to a band of whole rows.

    Collective over `group`, whose rank `r` holds the r-th part of dim 1.

    Args:
        local: this rank's shard [R, C / size].
        shape: shape of the whole tensor, (R, C).
        room: bytes to receive in; nothing else is allocated.

    Returns:
        The parts of this rank's rows [size, R / size, C / size], a view of `room`, and where the rows lie in the
        whole tensor. Bands differ by one row where `size` does not divide R.
    """
    import torch.distributed as dist

    counts = [(shape[0] * (r + 1)) // size - (shape[0] * r) // size for r in range(size)]
    start = shape[0] * rank // size
    mine = counts[rank]
    nbytes = size * mine * local.shape[1] * local.element_size()
    received = room[:nbytes].view(local.dtype).view(size * mine, local.shape[1])
    dist.all_to_all_single(received, local, [mine] * size, counts, group=group)
    return received.view(size, mine, -1), Box((start, 0), (mine, shape[1]))

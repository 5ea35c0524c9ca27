"""A live model to an HF folder: files are laid out first, then their bytes are written in place.

No tensor is gathered anywhere. By default every owner writes its own bytes at their offsets. Where many ranks hold
the same shards, each writes an equal share of them (`runtime.shares`). Row-parallel weights would be written in runs
of a few hundred bytes; their ranks exchange columns for rows first, within the tensor-parallel group. File systems
that several nodes cannot write one file on get whole files from one rank each (`runtime.file_owners`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.convert import codec_options
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.hf_layout import HfLayout, as_written, lay_out_files, lay_out_like
from bridge_core.checkpoint.hf_output import carried_files, copy_files, finish_hf_folder
from bridge_core.checkpoint.output import check_apart, check_free, real_path, write_folder
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.checkpoint.transfer import Job, share, transfer
from bridge_core.checkpoint.workers import jointly
from bridge_core.errors import ConfigError, OutputError, check_count, preview
from bridge_core.families import Family, Fields
from bridge_core.geometry import Piece, View, row_major
from bridge_core.runtime.agreement import agreed_device, agreed_dtypes, check_same, check_size, check_whole
from bridge_core.runtime.file_owners import Sent, WholeFiles
from bridge_core.runtime.homes import unwrap
from bridge_core.runtime.live import LiveModel, open_live
from bridge_core.runtime.shared_files import GroupOf, SharedFiles, tensor_groups
from bridge_core.runtime.words import default_group
from bridge_core.runtime.workers import TorchWorkers

if TYPE_CHECKING:
    import torch


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
    dtype: str | torch.dtype | None = None,
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

    def opened(like: HfFolder | None) -> LiveModel:
        held, how = like.shapes if like else None, codec_options(fp8, like)
        return open_live(model, family, fields, groups=groups, inventory=held, ignore=ignore, **how)

    def cut_over(live: LiveModel) -> GroupOf:
        return tensor_groups(live, groups or unwrap(model)[0].pg_collection)

    group = group or default_group()
    check_size(model, groups, group)
    return save_live(
        opened,
        cut_over,
        path,
        family.consistent(config, fields) if config else family.to_hf(fields),
        source=source,
        dtype=dtype,
        fp8=fp8,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        durable=durable,
        one_writer_per_file=one_writer_per_file,
        bucket_bytes=bucket_bytes,
        group=group,
    )


def save_live(
    opened: Callable[[HfFolder | None], LiveModel],
    cut_over: Callable[[LiveModel], GroupOf],
    path: str | Path,
    config: dict[str, Any],
    *,
    source: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    fp8: bool = False,
    max_shard_size: int = 2_000_000_000,
    overwrite: bool = False,
    durable: bool = False,
    one_writer_per_file: bool = False,
    bucket_bytes: int = 256 * 1024 * 1024,
    carried: Callable[[LiveModel], Collection[str]] = lambda live: (),
    group: Any = None,
) -> SaveReport:
    """Write whatever `opened` gives as an HF folder; what `save_hf_pretrained` does of a single model.

    Collective over `group`, whose rank `r` is rank `r` of the plan. What is not said here is as there.

    Args:
        opened: the model matched against its plan, given the folder that the files are to be like.
        cut_over: of a model, the process group whose ranks hold the other parts of a shard's tensor.
        config: config.json.
        carried: of a model, HF names of tensors that it does not have, and that are copied from `source`.
    """
    group = group or default_group()
    workers = TorchWorkers(group)
    output = real_path(Path(path))

    def check() -> tuple[LiveModel, HfFolder | None]:
        check_count("max_shard_size", max_shard_size)
        check_count("bucket_bytes", bucket_bytes)
        check_free(output, overwrite=overwrite)
        if fp8 and one_writer_per_file:
            raise _quantised_on_the_way()
        if source is not None:
            check_apart(output, Path(source))
        like = open_hf(source) if source is not None else None
        return opened(like), like

    live, like = jointly(workers, check)
    check_whole(live, group)
    live = replace(live, place=agreed_device(live, group))
    workers.together(live.renew)
    dtypes = agreed_dtypes(live, dtype, group)
    others = jointly(workers, lambda: carried(live))

    layout = jointly(workers, lambda: _lay_out(live, like, dtypes, max_shard_size, others))
    _check_agreed(layout, (one_writer_per_file, bucket_bytes) if one_writer_per_file else (), group)
    if one_writer_per_file:
        _check_padding(live.plan.padded_vocab, group)

    def make_writer() -> SharedFiles | WholeFiles:
        if one_writer_per_file:
            return WholeFiles(live, layout, group, bucket_bytes, others)
        return SharedFiles(live, layout, cut_over(live), dtypes, group)

    writer = jointly(workers, make_writer)
    copies = _copies(layout, like, others)
    sent = _write(output, layout, writer, like, copies, config, workers, overwrite=overwrite, durable=durable)
    return SaveReport(
        output=output,
        tensors=len(as_written(live.plan, dtypes)[0]) + len(others),
        bytes_written=sent.written,
        bytes_sent=sent.sent,
        exchanges=sent.rounds,
        files=sent.files,
    )


def _quantised_on_the_way() -> ConfigError:
    return ConfigError(
        "files that one rank writes cannot be quantised on the way",
        where="fp8, one_writer_per_file",
        expected="one of them",
        got="both",
        fix="save with one_writer_per_file, and export to fp8 offline",
    )


def _lay_out(
    live: LiveModel, like: HfFolder | None, dtypes: dict[str, str], max_shard_size: int, carried: Collection[str]
) -> HfLayout:
    if like is not None:
        return lay_out_like(like, live.plan, dtypes, carried)
    if carried:
        raise ConfigError(
            "there is no folder to carry tensors from",
            where=preview(carried),
            expected="`source`, the HF folder that has them",
            got="none",
            fix="pass `source`, or leave these tensors out",
        )
    return lay_out_files(*as_written(live.plan, dtypes), max_shard_size)


def _copies(layout: HfLayout, like: HfFolder | None, carried: Collection[str]) -> list[Job]:
    """The copies of carried tensors, each into the file (by its name alone) that has a place for it."""
    if like is None or not carried:
        return []
    jobs: list[Job] = []
    for file in layout.files:
        for name in file.tensors.keys() & carried:
            offset, dtype, shape = file.tensors[name]
            view = View(name, 0, row_major(shape))
            jobs.append(Job(Stored(file.name, offset, dtype, shape), ((like.tensors[name], Piece(shape, view, view)),)))
    return sorted(jobs, key=lambda job: job.target)


def _check_agreed(layout: HfLayout, way: tuple[object, ...], group: Any) -> None:
    """Raise on all ranks unless they are about to write the same files, in the same way. Collective."""
    check_same(
        b"".join(file.name.encode() + file.header for file in layout.files) + repr(way).encode(),
        group,
        what="ranks lay out the files differently, or write them in different ways",
        where="save_hf_pretrained",
        fix="call it with the same options everywhere, and check that all ranks see the HF folder of the bridge",
    )


def _check_padding(padded_vocab: int | None, group: Any) -> None:
    """Raise on all ranks unless they know alike how the embedding is cut on others. Collective."""
    workers = TorchWorkers(group)
    rows = workers.share(padded_vocab)
    if len(set(rows)) > 1:
        raise OutputError(
            "ranks take the vocabulary to be padded differently",
            where="one_writer_per_file",
            expected="one number of rows of the whole embedding",
            got=", ".join(f"rank {workers.number_of(rank)}: {count}" for rank, count in enumerate(rows)),
            fix="let `vocab_size` of every pipeline stage's model say the rows that the embedding was built with",
        )


def _write(
    output: Path,
    layout: HfLayout,
    writer: SharedFiles | WholeFiles,
    like: HfFolder | None,
    copies: Sequence[Job],
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

    def fill(folder: Path, rank: int, size: int) -> Sent:
        sent = writer.write(folder)
        whole_files = isinstance(writer, WholeFiles)
        mine = [job for job in copies if job.target.path in sent.files] if whole_files else share(copies, rank, size)
        moved = transfer([job._replace(target=_inside(folder, job.target)) for job in mine])
        opened = {*sent.files, *(job.target.path for job in mine)}
        written = sent.written + moved.kernel + moved.gathered + moved.staged
        return sent._replace(written=written, files=tuple(sorted(opened)))

    return write_folder(
        output,
        layout.nbytes,
        workers,
        prepare,
        fill,
        lambda folder: finish_hf_folder(folder, layout, config, codec=codec, like=like),
        overwrite=overwrite,
        durable=durable,
    )


def _inside(folder: Path, stored: Stored) -> Stored:
    return stored._replace(path=str(folder / stored.path))

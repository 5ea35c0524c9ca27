"""A live model to an HF folder: files are laid out first, then every owner writes its own bytes.

No tensor is gathered anywhere. Where many ranks hold the same shard they take turns, so all ranks write
an equal share. Row-parallel weights would be written in runs of a few hundred bytes; their ranks exchange
columns for rows first, within the tensor-parallel group.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.files import OpenFiles, create_file, write_all
from bridge_core.checkpoint.hf_folder import CONFIG, INDEX, SINGLE, HfFolder, open_hf
from bridge_core.checkpoint.hf_layout import HfLayout, lay_out_files, lay_out_like
from bridge_core.checkpoint.hf_output import carried_files, copy_files, written_config
from bridge_core.checkpoint.output import check_apart, check_free, real_path, write_folder
from bridge_core.dtypes import dtype_of
from bridge_core.families import Family, Fields
from bridge_core.geometry import Box, Piece, restrict, runs
from bridge_core.plan import Shard
from bridge_core.runtime.live import LiveModel, agreed_dtypes, is_second_copy, open_live, unwrap
from bridge_core.runtime.load import default_group
from bridge_core.runtime.tensors import flat, torch_dtype
from bridge_core.runtime.workers import TorchWorkers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What saving did: the folder, HF tensors in it, bytes that this rank wrote, exchanges it took part in."""

    output: Path
    tensors: int
    bytes_written: int
    exchanges: int


@dataclass
class _Tally:
    written: int = 0
    exchanges: int = 0


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
    max_shard_size: int = 2_000_000_000,
    overwrite: bool = False,
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
        max_shard_size: bytes per file, where no `source` says how to split.
        overwrite: replace a folder that holds something.
        groups: process groups of the model; by default those it was built with.
        group: all ranks of the model; by default torch's default group.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    group = group or default_group()
    workers = TorchWorkers(group)
    output = real_path(Path(path))
    prepared: list[tuple[LiveModel, HfFolder | None]] = []

    def check() -> None:
        check_free(output, overwrite=overwrite)
        like = None
        if source is not None:
            check_apart(output, Path(source))
            like = open_hf(source)
        held = like.shapes if like else None
        prepared.append((open_live(model, family, fields, groups=groups, inventory=held, ignore=ignore), like))

    workers.together(check)
    live, like = prepared[0]
    dtypes = agreed_dtypes(live, dtype, group)
    laid: list[HfLayout] = []
    workers.together(lambda: laid.append(_lay_out(live, like, dtypes, max_shard_size)))
    layout = laid[0]
    tp_groups = groups or unwrap(model)[0].pg_collection
    tally = _Tally()

    def prepare(folder: Path) -> None:
        for file in layout.files:
            create_file(folder / file.name, file.nbytes, file.header)
        if like is not None:
            copy_files(like.path, carried_files(like), folder)

    def fill(folder: Path, rank: int, size: int) -> None:
        _Writer(live, layout, folder, tp_groups, tally).run()

    def finish(folder: Path) -> None:
        if [file.name for file in layout.files] != [SINGLE]:
            (folder / INDEX).write_text(layout.index(), encoding="utf-8")
        written = written_config(family.consistent(config, fields) if config else family.to_hf(fields), layout)
        (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    write_folder(output, layout.nbytes, workers, prepare, fill, finish, overwrite=overwrite)
    return SaveReport(
        output=output, tensors=len(live.plan.hf_tensors), bytes_written=tally.written, exchanges=tally.exchanges
    )


def _lay_out(live: LiveModel, like: HfFolder | None, dtypes: dict[str, str], max_shard_size: int) -> HfLayout:
    if like is not None:
        return lay_out_like(like, live.plan, dtypes)
    return lay_out_files(live.plan.hf_tensors, dtypes, max_shard_size)


class _Writer:
    """Writes what this rank owns, shard by shard; all ranks of a tensor-parallel group go through the same shards."""

    def __init__(self, live: LiveModel, layout: HfLayout, folder: Path, groups: Any, tally: _Tally) -> None:
        self._live = live
        self._groups = groups
        self._tally = tally
        places = {
            name: (str(folder / file.name), offset, dtype)
            for file in layout.files
            for name, (offset, dtype, _) in file.tensors.items()
        }
        self._places = {name: [place] for name, place in places.items()}
        for name, copy in live.plan.written_copies.items():
            self._places[copy.of].append(places[name])
        self._failure: Exception | None = None

    def run(self) -> None:
        with ExitStack() as stack:
            self._files = OpenFiles(stack)
            for number, shard in enumerate(self._live.shards):
                self._one(number, shard)
        if self._failure is not None:
            raise self._failure

    def _one(self, number: int, shard: Shard) -> None:
        if is_second_copy(self._live, shard):
            return  # the first stage writes it
        plan, coords = self._live.plan, self._live.plan.layout.coords(self._live.rank)
        entry = plan.entry(shard.entry)
        if entry.is_expert:
            turn, turns, axis, size = coords.expert_dp, plan.layout.expert_dp, coords.etp, plan.layout.etp
        else:
            turn, turns = coords.cp + plan.layout.cp * coords.dp, plan.layout.cp * plan.layout.dp
            axis, size = coords.tp, plan.layout.tp
        if entry.split is None:
            # Every tensor-parallel rank holds all of it: they take turns as well.
            turn, turns = turn * size + axis, turns * size
        if number % turns != turn:
            return
        tensor = flat(self._live.tensor(shard))
        if entry.split is None or entry.split.dim == 0 or size == 1:
            self._guarded(tensor, shard.pieces, entry.shift)
            return
        group = self._groups.expt_tp if entry.is_expert else self._groups.tp
        rows, box = exchange(tensor.view(shard.shape), entry.shape, axis, size, group)
        self._tally.exchanges += 1
        whole = entry.instance(entry.pieces, shard.layer, shard.expert)
        at = (0,) * len(box.shape)
        cut = [p for piece in whole for p in restrict(piece, "target", entry.shape, box, box.shape, at)]
        self._guarded(flat(rows), cut, entry.shift)

    def _guarded(self, tensor: Tensor, pieces: Any, shift: float) -> None:
        """Write, unless a write failed before. An error waits for the end: the others still expect exchanges."""
        if self._failure is not None:
            return
        try:
            self._write(tensor, pieces, shift)
        except Exception as error:
            self._failure = error

    def _write(self, tensor: Tensor, pieces: Sequence[Piece], shift: float) -> None:
        import torch

        if not pieces:
            return
        if shift:
            tensor = tensor.float() - shift
        # One Megatron tensor has one dtype in HF files, whichever of its HF tensors is asked.
        _, _, dtype = self._places[pieces[0].source.tensor][0]
        data = tensor.to(torch_dtype(dtype)).cpu().view(torch.uint8).numpy().data
        itemsize = dtype_of(dtype).itemsize
        for piece in pieces:
            back = piece.inverse()
            for path, offset, _ in self._places[back.target.tensor]:
                descriptor = self._files.descriptor(path, write=True)
                for at_source, at_target, length in runs(back):
                    part = data[at_source * itemsize : (at_source + length) * itemsize]
                    self._tally.written += write_all(descriptor, part, offset + at_target * itemsize)


def exchange(local: Tensor, shape: tuple[int, ...], rank: int, size: int, group: Any) -> tuple[Tensor, Box]:
    """Trade columns for rows: from a shard split along dim 1 to a band of whole rows.

    Collective over `group`, whose rank `r` holds the r-th part of dim 1.

    Args:
        local: this rank's shard [R, C / size].
        shape: shape of the whole tensor, (R, C).

    Returns:
        This rank's rows [R / size, C], contiguous, and where they lie in the whole tensor. Bands differ by
        one row where `size` does not divide R.
    """
    import torch
    import torch.distributed as dist

    counts = [(shape[0] * (r + 1)) // size - (shape[0] * r) // size for r in range(size)]
    start = shape[0] * rank // size
    mine = counts[rank]
    received = torch.empty(size * mine, local.shape[1], dtype=local.dtype, device=local.device)
    dist.all_to_all_single(received, local.contiguous(), [mine] * size, counts, group=group)
    rows = received.view(size, mine, -1).transpose(0, 1).reshape(mine, -1)
    return rows, Box((start, 0), (mine, shape[1]))

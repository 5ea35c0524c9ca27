"""The weight files of an HF folder, each written in place by all ranks that hold a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.files import OpenFiles, write_all
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.checkpoint.hf_output import create_weight_files
from bridge_core.dtypes import dtype_of
from bridge_core.geometry import Box, Piece, restrict, runs
from bridge_core.plan import Shard
from bridge_core.runtime.file_owners import Sent, takes_turn
from bridge_core.runtime.fp8 import agreed_scales, quantised
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.tensors import cast, flat, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

GroupOf = Callable[[Shard], Any]
"""Of a shard, the process group whose ranks hold the other parts of its tensor."""


class SharedFiles:
    """The weight files of a save, each written by all ranks that hold a part of it.

    Args:
        live: the model.
        layout: the files.
        cut_over: the process group whose ranks hold the other parts of a shard's tensor.
        dtypes: dtype of every HF tensor before it is quantised.
        group: all ranks of the model.
    """

    def __init__(
        self, live: LiveModel, layout: HfLayout, cut_over: GroupOf, dtypes: Mapping[str, str], group: Any
    ) -> None:
        self.live, self._layout, self._cut_over = live, layout, cut_over
        self._dtypes, self._group = dtypes, group
        self._scales: Mapping[str, Tensor] = {}
        self._written = self._sent = self._exchanges = 0
        self._opened: set[str] = set()
        self._failure: Exception | None = None

    def create(self, folder: Path) -> None:
        """Make all files, at their full size. For one rank, before the others write."""
        create_weight_files(folder, self._layout)
        self._opened |= {file.name for file in self._layout.files}

    def write(self, folder: Path) -> Sent:
        """Write what this rank owns, shard by shard. Collective over each tensor-parallel group.

        An error waits for the end: the others of the group still expect exchanges.
        """
        places = {
            name: (folder / file.name, offset, dtype)
            for file in self._layout.files
            for name, (offset, dtype, _) in file.tensors.items()
        }
        self._places = {name: [place] for name, place in places.items()}
        codec = self.live.plan.codec
        for name, copy in self.live.plan.copies.items():
            if name in places:
                self._places[copy.of].append(places[name])
            if codec is not None and codec.scale_name(name) in places:
                self._places[codec.scale_name(copy.of)].append(places[codec.scale_name(name)])
        if self.live.plan.codec is not None:
            self._scales = agreed_scales(self.live, dict(self._dtypes), self._group)
        with ExitStack() as stack:
            self._files = OpenFiles(stack)
            for number, shard in enumerate(self.live.shards):
                if takes_turn(self.live.plan, self.live.rank, number, shard):
                    self._save(shard)
        if self._failure is not None:
            raise self._failure
        return Sent(self._written, self._sent, self._exchanges, tuple(sorted(self._opened)))

    def _save(self, shard: Shard) -> None:
        entry = self.live.plan.entry(shard.entry)
        group = self._cut_over(shard)
        tensor = flat(self.live.tensor(shard))
        if entry.split is None or entry.split.dim == 0 or group.size() == 1:
            self._guarded(tensor, shard.pieces, entry.shift)
            return
        rows, box = exchange(tensor.view(shard.shape), entry.shape, group.rank(), group.size(), group)
        self._exchanges += 1
        self._sent += tensor.nbytes - tensor.nbytes * box.shape[0] // entry.shape[0]
        whole = entry.instance(entry.pieces, shard.layer, shard.expert)
        at = (0,) * len(box.shape)
        cut = [p for piece in whole for p in restrict(piece, "target", entry.shape, box, box.shape, at)]
        self._guarded(flat(rows), cut, entry.shift)

    def _guarded(self, tensor: Tensor, pieces: Sequence[Piece], shift: float) -> None:
        """Write, unless a write failed before."""
        if self._failure is not None:
            return
        try:
            self._write(tensor.float() - shift if shift else tensor, pieces)
        except Exception as error:
            self._failure = error

    def _write(self, tensor: Tensor, pieces: Sequence[Piece]) -> None:
        encoded = [piece for piece in pieces if piece.source.tensor in self._scales]
        for piece in encoded:
            self._write_quantised(cast(tensor, self._dtypes[piece.source.tensor]), piece)
        held: dict[str, memoryview] = {}
        for piece in (piece for piece in pieces if piece not in encoded):
            back = piece.inverse()
            for path, offset, dtype in self._places[back.target.tensor]:
                data, itemsize = held.get(dtype), dtype_of(dtype).itemsize
                if data is None:
                    data = held[dtype] = _bytes(tensor, dtype)
                self._opened.add(path.name)
                descriptor = self._files.descriptor(str(path), write=True)
                for at_source, at_target, length in runs(back):
                    part = data[at_source * itemsize : (at_source + length) * itemsize]
                    self._written += write_all(descriptor, part, offset + at_target * itemsize)

    def _write_quantised(self, tensor: Tensor, piece: Piece) -> None:
        """The codes of what this rank owns; who owns a weight's first element writes all of its scales."""
        codec, name = self.live.plan.codec, piece.source.tensor
        assert codec is not None
        shape, scales = self.live.plan.hf_tensors[name], self._scales[name]
        codes, back = quantised(tensor, piece.inverse(), shape, scales, codec)
        data = codes.cpu().view(torch_dtype("U8")).numpy().data
        for at_source, at_target, length in runs(back):
            self._put(name, at_target, data[at_source : at_source + length])
        if back.target.offset == 0:
            flat_scales = scales.contiguous().cpu().view(-1).view(torch_dtype("U8")).numpy().data
            self._put(codec.scale_name(name), 0, flat_scales)

    def _put(self, name: str, at: int, data: memoryview) -> None:
        """Write bytes into a tensor, everywhere in the files that it lies."""
        for path, offset, _ in self._places[name]:
            self._opened.add(path.name)
            self._written += write_all(self._files.descriptor(str(path), write=True), data, offset + at)


def _bytes(tensor: Tensor, dtype: str) -> memoryview:
    """The elements of a flat tensor as the bytes of a file."""
    import torch

    return cast(tensor, dtype).cpu().view(torch.uint8).numpy().data


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

"""The weight files of an HF folder, each written in place by all ranks that hold a part of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bridge_core.checkpoint.files import OpenFiles, write_all
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.checkpoint.hf_output import create_weight_files
from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import dtype_of
from bridge_core.geometry import Box, Piece, View, restrict, runs
from bridge_core.plan import Shard
from bridge_core.runtime.file_owners import Sent
from bridge_core.runtime.fp8 import agreed_scales, quantised
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.shares import saved_by
from bridge_core.runtime.tensors import cast, flat, staging

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

GroupOf = Callable[[Shard], Any]
"""Of a shard, the process group whose ranks hold the other parts of its tensor."""


def tensor_groups(live: LiveModel, groups: Any) -> GroupOf:
    """That of a single model: its tensor-parallel group, or that of its experts."""
    return lambda shard: groups.expt_tp if live.plan.entry(shard.entry).is_expert else groups.tp


class SharedFiles:
    """The weight files of a save, each written by all ranks that hold a part of it.

    Who writes other bytes than the parameters' own (packed ones) overrides `save` and `may_cut`, and calls `guarded`
    and `put`.

    Args:
        live: the model.
        layout: the files.
        cut_over: the process group whose ranks hold the other parts of a shard's tensor.
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
        self,
        live: LiveModel,
        layout: HfLayout,
        cut_over: GroupOf,
        dtypes: Mapping[str, str] | None = None,
        group: Any = None,
    ) -> None:
        self.live, self.layout, self.cut_over = live, layout, cut_over
        self.written: Counter[str] = Counter()
        self.sent = self.exchanges = 0
        self._dtypes, self._group = dict(dtypes or {}), group
        self._scales: Mapping[str, Tensor] = {}
        self._opened: set[str] = set()
        self._failure: Exception | None = None
        self.room = staging(max(map(self._bytes_received, live.shards), default=0), live.device)

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
            for shard in saved_by(self.live.plan, self.live.rank, self.live.shards, self.may_cut):
                self.save(shard)
        if self._failure is not None:
            raise self._failure
        return Sent(self.written.total(), self.sent, self.exchanges, tuple(sorted(self._opened)))

    def may_cut(self, shard: Shard) -> bool:
        """Whether replicas may write parts of a shard each."""
        return not self._cut_by_columns(shard)

    def save(self, shard: Shard) -> None:
        """Write the HF elements that the pieces of a shard have. Collective over the group that splits it."""
        entry = self.live.plan.entry(shard.entry)
        group = self.cut_over(shard)
        tensor = flat(self.live.tensor(shard))
        if not self._cut_by_columns(shard):
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

    def _cut_by_columns(self, shard: Shard) -> bool:
        """Whether ranks exchange columns for rows: the same on all of them, also where one of them gets no row."""
        split = self.live.plan.entry(shard.entry).split
        return split is not None and split.dim != 0 and self.cut_over(shard).size() > 1

    def _bytes_received(self, shard: Shard) -> int:
        """Bytes of the rows that this rank gets for a shard."""
        if not self._cut_by_columns(shard):
            return 0
        (rows, columns), group = self.live.plan.entry(shard.entry).shape, self.cut_over(shard)
        first, last = (rows * (group.rank() + end) // group.size() for end in (0, 1))
        return (last - first) * columns * self.live.tensor(shard).element_size()

    def guarded(self, step: Callable[[], T]) -> T | None:
        """What `step` returns; None if it fails, or if one failed before. The error waits for the end of `write`."""
        if self._failure is None:
            try:
                return step()
            except Exception as error:
                self._failure = error
        return None

    def _write(self, tensor: Tensor, pieces: Sequence[Piece], shift: float) -> None:
        tensor, pieces = _span(tensor, pieces)
        tensor = tensor.float() - shift if shift else tensor
        held: dict[str, Tensor] = {}
        for piece in pieces:
            back = piece.inverse()
            if back.target.tensor in self._scales:
                self._write_quantised(cast(tensor, self._dtypes[back.target.tensor], where=back.target.tensor), back)
                continue
            for name in self.names(back.target.tensor):
                dtype = self._places[name][2]
                if dtype not in held:
                    held[dtype] = cast(tensor, dtype, where=name).cpu()
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


def _span(tensor: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, list[Piece]]:
    """A flat tensor from the first element that pieces take to the last, and the pieces in its coordinates."""
    start = min((piece.target.offset for piece in pieces), default=0)
    stop = max((piece.target.at([extent - 1 for extent in piece.shape]) + 1 for piece in pieces), default=0)
    return tensor[start:stop], [piece._replace(target=piece.target.moved(-start)) for piece in pieces]


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

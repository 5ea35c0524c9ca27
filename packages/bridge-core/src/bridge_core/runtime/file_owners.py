"""Whole files of an HF folder, each written by one rank: for file systems that several nodes cannot write one file on.

Every rank sends what it holds of a file to the file's owner. That goes in rounds, one all-to-all each, in which all
owners get the next blocks of their files, in the files' order; so an owner writes from front to back. All blocks of
a round together have at most `bucket_bytes`, which bounds what any rank sends, and what any owner receives, whatever
the layout. Who sends what follows from the plan: nothing but weights, and a word on failures, is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge_core.checkpoint.files import OpenFiles, create_file, write_all
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.checkpoint.safetensors import Laid
from bridge_core.dtypes import dtype_of
from bridge_core.errors import LayoutError
from bridge_core.geometry import Box, Piece, Shape, restrict, slabs
from bridge_core.plan import Plan, Shard
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.shares import saved_by
from bridge_core.runtime.tensors import cast, dtype_name, flat, staging, torch_dtype, window

if TYPE_CHECKING:
    from torch import Tensor

_ALIGN = 8  # bytes; every piece in a message starts at a multiple, so that it can be viewed in its dtype
_WORD = 8  # bytes before the pieces of a message: whether its sender has failed


class Sent(NamedTuple):
    """What a rank did: bytes of tensors written to its files and sent to other ranks, rounds, names of its files."""

    written: int
    sent: int
    rounds: int
    files: tuple[str, ...]


class Block(NamedTuple):
    """A box of an HF tensor whose elements follow one another in a file."""

    file: str
    offset: int
    name: str
    dtype: str
    shape: Shape
    box: Box


class _Cut(NamedTuple):
    """The part of a piece that lies in a block: from the block (source) to the flat parameter (target)."""

    number: int  # of the block, in its round
    dtype: str
    shard: Shard
    piece: Piece


class _Round(NamedTuple):
    """One exchange, as a rank sees it: the blocks that it writes, and what it sends to and gets from each rank."""

    blocks: Sequence[Block]
    sending: list[list[_Cut]]
    coming: list[list[_Cut]]


# HF name -> the pieces of it that a rank sends, each with the parameter that it lies in.
Holdings = Mapping[str, Sequence[tuple[Shard, Piece]]]


def owners_of(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that owns each file: consecutive files, in shares as equal in bytes as whole files allow."""
    total, before, found = max(sum(sizes), 1), 0, []
    for size in sizes:
        found.append(min((before + size // 2) * ranks // total, ranks - 1))
        before += size
    return found


class WholeFiles:
    """The weight files of a save, each written by its owner alone.

    Making one communicates nothing, plans all rounds, and takes the memory of the largest.

    Args:
        live: the model; rank `r` of its layout is rank `r` of the group.
        layout: the files.
        group: all ranks of the model; exchanges tensors where the parameters are.
        bucket_bytes: bytes of tensors that travel in a round. One element makes a larger round if it has to.
        left: HF names of tensors that somebody else writes.
    """

    def __init__(
        self, live: LiveModel, layout: HfLayout, group: Any, bucket_bytes: int, left: Collection[str] = ()
    ) -> None:
        self.live, self._group = live, group
        self._rank, self._size = group.rank(), group.size()
        if (self._rank, self._size) != (live.rank, live.plan.layout.world_size):
            raise LayoutError(
                "ranks are numbered otherwise than in megatron-core's usual order",
                where="one_writer_per_file",
                expected=f"rank {live.rank} of {live.plan.layout.world_size}, as the process groups say",
                got=f"rank {self._rank} of {self._size} in the group of all ranks",
                fix="pass a group in the order tp-cp-ep-dp-pp, or save without one_writer_per_file",
            )
        owners = owners_of([file.nbytes for file in layout.files], self._size)
        self._files = {rank: [f for f, r in zip(layout.files, owners, strict=True) if r == rank] for rank in owners}
        self._rounds = self._planned(max(1, bucket_bytes // max(len(self._files), 1)), frozenset(left))
        self._device = live.device
        self._out = staging(max((sum(map(_nbytes, each.sending)) for each in self._rounds), default=0), live.device)
        self._in = staging(max((sum(map(_nbytes, each.coming)) for each in self._rounds), default=0), live.device)
        self._failure: Exception | None = None
        self._written = self._sent = 0
        self._opened: list[str] = []

    def _planned(self, limit: int, left: Collection[str]) -> list[_Round]:
        """All rounds. Those of every rank have the same number, and what one sends is what the other gets."""
        mine = holdings(self.live.plan, self._rank)
        theirs = self._of_my_files(mine)
        asked = {rank: rounds_of(files, limit, left) for rank, files in sorted(self._files.items())}
        found: list[_Round] = []
        for each in zip_longest(*asked.values(), fillvalue=()):
            blocks = dict(zip(asked, each, strict=True))
            sending = [_cuts(mine, blocks.get(rank, ())) for rank in range(self._size)]
            own = blocks.get(self._rank, ())
            coming = [_cuts(held, own) for held in theirs] or [[] for _ in range(self._size)]
            found.append(_Round(own, sending, coming))
        return found

    def _of_my_files(self, mine: Holdings) -> list[Holdings]:
        """What each rank sends of the tensors in this rank's files; nothing is planned where there are none."""
        names = {name for file in self._files.get(self._rank, ()) for name in file.tensors}
        if not names:
            return []
        return [mine if rank == self._rank else holdings(self.live.plan, rank, names) for rank in range(self._size)]

    def write(self, folder: Path) -> Sent:
        """Make and fill the files in an existing folder, where none of them exists. Collective over the group.

        If a rank fails, all stop in the next round; that rank raises, the others return.
        """
        done = 0
        with ExitStack() as stack:
            files = OpenFiles(stack)
            self._guarded(self._create, folder)
            for each in self._rounds:
                if not self._exchanged(each):
                    break
                done += 1
                self._guarded(self._write, folder, each, files)
        if self._failure is not None:
            raise self._failure
        return Sent(self._written, self._sent, done, tuple(self._opened))

    def _create(self, folder: Path) -> None:
        for file in self._files.get(self._rank, ()):
            self._opened.append(file.name)
            create_file(folder / file.name, file.nbytes, file.header)

    def _exchanged(self, each: _Round) -> bool:
        """Send every owner what this rank holds of its blocks, and take in what all ranks send this one.

        Returns:
            Whether no rank has failed.
        """
        import torch.distributed as dist

        to, of = [_nbytes(cuts) for cuts in each.sending], [_nbytes(cuts) for cuts in each.coming]
        self._guarded(self._pack, each.sending)
        self._out[_starts(each.sending)] = int(self._failure is not None)
        dist.all_to_all_single(self._in[: sum(of)], self._out[: sum(to)], of, to, group=self._group)
        return not self._in[_starts(each.coming)].any()

    def _pack(self, sending: Sequence[Sequence[_Cut]]) -> None:
        """Put this rank's pieces into the messages to all ranks."""
        for rank, (start, cuts) in enumerate(zip(_starts(sending), sending, strict=True)):
            for cut, part in _parts(self._out, start, cuts):
                source = window(flat(self.live.tensor(cut.shard)), cut.piece.shape, cut.piece.target)
                if shift := self.live.plan.entry(cut.shard.entry).shift:
                    source = source.float() - shift
                part.view(cut.piece.shape).copy_(cast(source, dtype_name(part), where=cut.piece.source.tensor))
                self._sent += part.nbytes if rank != self._rank else 0

    def _write(self, folder: Path, each: _Round, files: OpenFiles) -> None:
        """Put the pieces that came from all ranks into their blocks, and the blocks into this rank's files."""
        import torch

        for block, parts in zip(each.blocks, _by_block(each.blocks, each.coming, self._in), strict=True):
            data = torch.empty(prod(block.box.shape), dtype=torch_dtype(block.dtype), device=self._device)
            for cut, part in parts:
                window(data, cut.piece.shape, cut.piece.source).copy_(part.view(cut.piece.shape))
            descriptor = files.descriptor(str(folder / block.file), write=True)
            self._written += write_all(descriptor, data.cpu().view(torch.uint8).numpy().data, block.offset)

    def _guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step unless this rank has failed. An error waits for the next round, where the others hear of it."""
        if self._failure is not None:
            return
        try:
            step(*arguments)
        except Exception as error:
            self._failure = error


def holdings(plan: Plan, rank: int, names: set[str] | None = None) -> dict[str, list[tuple[Shard, Piece]]]:
    """What a rank sends of each HF tensor, or of those in `names`, in the plan's order."""
    wanted = names if names is None else names | {copy.of for name, copy in plan.copies.items() if name in names}
    found: dict[str, list[tuple[Shard, Piece]]] = {}
    for shard in saved_by(plan, rank, plan.iter_local_shards(rank)):
        for piece in shard.pieces:
            if wanted is None or piece.source.tensor in wanted:
                found.setdefault(piece.source.tensor, []).append((shard, piece))
    return found | {name: found[copy.of] for name, copy in plan.copies.items() if copy.of in found}


def rounds_of(files: Sequence[Laid], limit: int, left: Collection[str] = ()) -> Iterator[list[Block]]:
    """The blocks of some files in the order of their bytes, as many at a time as `limit` bytes hold (but one).

    Tensors in `left` are passed over.
    """
    held: list[Block] = []
    room = limit
    for block in _blocks(files, limit):
        if block.name in left:
            continue
        nbytes = prod(block.box.shape) * dtype_of(block.dtype).itemsize
        if held and nbytes > room:
            yield held
            held, room = [], limit
        held.append(block)
        room -= nbytes
    if held:
        yield held


def _blocks(files: Sequence[Laid], limit: int) -> Iterator[Block]:
    for file in files:
        for name, (offset, dtype, shape) in file.tensors.items():
            itemsize = dtype_of(dtype).itemsize
            for box in slabs(shape, max(1, limit // itemsize)):
                yield Block(file.name, offset, name, dtype, shape, box)
                offset += prod(box.shape) * itemsize


def _cuts(held: Holdings, blocks: Sequence[Block]) -> list[_Cut]:
    """What a rank sends of some blocks: the same list on the sender and on the owner."""
    return [
        _Cut(number, block.dtype, shard, part)
        for number, block in enumerate(blocks)
        for shard, piece in held.get(block.name, ())
        for part in restrict(piece, "source", block.shape, block.box, block.box.shape, (0,) * len(block.shape))
    ]


def _size(cut: _Cut) -> int:
    """Bytes of a cut in a message."""
    return -(-cut.piece.numel * dtype_of(cut.dtype).itemsize // _ALIGN) * _ALIGN


def _nbytes(cuts: Sequence[_Cut]) -> int:
    """Bytes of a message."""
    return _WORD + sum(map(_size, cuts))


def _starts(messages: Sequence[Sequence[_Cut]]) -> list[int]:
    """Where each of several messages begins in the buffer that holds them all."""
    starts, at = [], 0
    for cuts in messages:
        starts.append(at)
        at += _nbytes(cuts)
    return starts


def _parts(buffer: Tensor, start: int, cuts: Sequence[_Cut]) -> Iterator[tuple[_Cut, Tensor]]:
    """The cuts of one message, each with the elements that the buffer has for it, flat."""
    at = start + _WORD
    for cut in cuts:
        nbytes = cut.piece.numel * dtype_of(cut.dtype).itemsize
        yield cut, buffer[at : at + nbytes].view(torch_dtype(cut.dtype))
        at += _size(cut)


def _by_block(
    blocks: Sequence[Block], coming: Sequence[Sequence[_Cut]], received: Tensor
) -> list[list[tuple[_Cut, Tensor]]]:
    """The cuts of all messages, block by block."""
    found: list[list[tuple[_Cut, Tensor]]] = [[] for _ in blocks]
    for start, cuts in zip(_starts(coming), coming, strict=True):
        for cut, part in _parts(received, start, cuts):
            found[cut.number].append((cut, part))
    return found

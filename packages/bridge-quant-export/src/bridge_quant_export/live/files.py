"""The weight files of a quantised export: packed on the shard, written in place by the rank that packed.

What leaves a rank is packed already: row-parallel weights are packed in their columns, and then exchange packed
columns for packed rows, so that every rank writes long runs. Only a weight whose cut lies inside a block is brought
together first, on one of its tensor-parallel ranks: memory for one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.geometry import Box, Piece, Shape, whole
from bridge_core.plan import Entry, Shard
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.shared_files import SharedFiles, exchange, tensor_groups
from bridge_core.runtime.tensors import flat, torch_dtype
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats.format import COLS, ROWS, Calibration, Format, Stored, Writer
from bridge_quant_export.formats.kv_cache import pack_kv
from bridge_quant_export.formats.packing import pack
from bridge_quant_export.live.held import Held, Key
from bridge_quant_export.live.packed import Region, calibration_of, in_hf_order, into, owns, regions
from bridge_quant_export.manifest import kv_name, kv_projection, module_of
from bridge_quant_export.state import LayerState


class PackedFiles(SharedFiles):
    """The weight files of an export, each written by all ranks that hold a part of it.

    Args:
        live: the model.
        layout: the files, of packed tensors.
        groups: process groups of the model.
        held: what this rank's weights are quantised to; ranges agreed.
        writer: the checkpoint format.
        kv_at_least_one: see `pack_kv`.
    """

    def __init__(
        self, live: LiveModel, layout: HfLayout, groups: Any, held: Held, *, writer: Writer, kv_at_least_one: bool
    ) -> None:
        super().__init__(live, layout, tensor_groups(live, groups))
        self._held, self._at_least_one = held, kv_at_least_one
        self._writer: Writer = writer
        self._states: Mapping[Key, LayerState] = {w.key: w.state for w in held.weights if w.state is not None}
        self._kv = {(w.key): held.kv[w.instance] for w in held.weights if w.instance in held.kv}
        self._gathers = cache(self._gathers_first)

    def check_cuts(self) -> None:
        """Refuse what could not be packed in this layout, before anything is written.

        Raises:
            FormatError: blocks with ranges of their own are cut by the layout.
            GeometryError: a rank's part of a weight is no box of it.
        """
        for weight in self._held.weights:
            if weight.state is not None:
                self._gathers(weight.shard.entry, weight.state.format)

    def may_cut(self, shard: Shard) -> bool:
        """Not where it is packed: a band could begin inside a block."""
        return (shard.chunk, shard.param) not in self._states and super().may_cut(shard)

    def save(self, shard: Shard) -> None:
        """Write the packed tensors of one shard, or its elements if it is not quantised. Collective over its group."""
        key = shard.chunk, shard.param
        if (ranges := self._kv.get(key)) is not None:
            self.guarded(lambda: self._save_kv(shard, ranges))
        state = self._states.get(key)
        if state is None:
            super().save(shard)
            return
        entry = self.live.plan.entry(shard.entry)
        group = self.cut_over(shard)
        tensor = self.live.tensor(shard).detach()
        if self._gathers(shard.entry, state.format):
            self._save_gathered(shard, entry, tensor, state, group)
            return
        # Not guarded: whoever has failed still takes part in the exchanges of every region.
        for region in regions(shard.pieces, self.live.plan.hf_tensors):
            packed = self.guarded(lambda region=region: self._pack(region, tensor, state))
            self._save_region(region, packed, entry, state.format, tensor, group)

    def _save_kv(self, shard: Shard, ranges: Mapping[str, Tensor]) -> None:
        """KV scales, by the rank that has the first row of the projection; made where the model is, as by ModelOpt."""
        device = self.live.tensor(shard).device
        for piece in shard.pieces:
            which = kv_projection(piece.source.tensor)
            if which is not None and piece.source.offset == 0:
                name = kv_name(piece.source.tensor, which, self._writer)
                scale = pack_kv(ranges[which].to(device), at_least_one=self._at_least_one, where=name)
                self._put_all(name, scale, Box((0,), (1,)), (1,))

    def _pack(self, region: Region, parameter: Tensor, state: LayerState) -> dict[str, Tensor]:
        """The packed tensors of the part of an HF tensor that lies in a parameter."""
        known = calibration_of(state.calibration, state.format, region, tuple(parameter.shape))
        weight = in_hf_order(parameter, region)
        return pack(weight, known, format=state.format, writer=self._writer, whole=region.shape, where=region.name)

    def _save_region(
        self,
        region: Region,
        packed: Mapping[str, Tensor] | None,
        entry: Entry,
        format: Format,
        tensor: Tensor,
        group: Any,
    ) -> None:
        """Write the packed tensors of a region, after trading columns for rows where they are split. Collective."""
        by_columns = entry.split is not None and entry.split.dim == COLS and group.size() > 1
        for stored in format.stored(self._writer):
            box, shape = stored.box(region.box), stored.shape(region.shape)
            part = None if packed is None else packed[stored.suffix]
            if by_columns and {axis.dim for axis in stored.axes} >= {ROWS, COLS}:
                part, box = self._exchanged(part, box, shape, stored, tensor, group)
            elif not owns(stored, region.box):
                continue
            name = f"{module_of(region.name)}.{stored.suffix}"
            if part is not None:
                self.guarded(lambda name=name, part=part, box=box, shape=shape: self._put_all(name, part, box, shape))

    def _exchanged(
        self, part: Tensor | None, box: Box, shape: Shape, stored: Stored, tensor: Tensor, group: Any
    ) -> tuple[Tensor, Box]:
        """Packed rows for packed columns. Takes part, with nothing to say, where packing has failed."""
        dtype = tensor.dtype if stored.dtype is None else torch_dtype(stored.dtype)
        given = torch.zeros(box.shape, dtype=dtype, device=tensor.device) if part is None else part
        height = shape[0]
        flat_rows = given.reshape(height, -1).contiguous().view(torch.uint8)
        width = flat_rows.shape[1] * group.size()
        # Packed, a weight has fewer bytes than the parameter for which the room was made.
        parts, band = exchange(flat_rows, (height, width), group.rank(), group.size(), group, self.room)
        self.exchanges += 1
        self.sent += flat_rows.nbytes - flat_rows.nbytes * band.shape[0] // height
        own = Box((band.start[0], *(0 for _ in shape[1:])), (band.shape[0], *shape[1:]))
        rows = parts.transpose(0, 1).reshape(band.shape)
        return rows.view(given.dtype).reshape(own.shape), own

    def _put_all(self, name: str, part: Tensor, box: Box, shape: Shape) -> None:
        """Write a part of a packed tensor, and of those that repeat it."""
        if part.numel() == 0:
            return
        for found in self._packed_names(name):
            dtype = torch_dtype(self._places[found][2])
            data = part.to(dtype).cpu().contiguous().reshape(-1)
            self.put(found, data, into(shape, box, found))

    def _packed_names(self, name: str) -> list[str]:
        """A packed tensor, and those of its copies that are in the files."""
        module, _, suffix = name.rpartition(".")
        copies = [copy for copy, of in self.live.plan.copies.items() if of.of == f"{module}.weight"]
        return [
            name,
            *(f"{module_of(copy)}.{suffix}" for copy in copies if f"{module_of(copy)}.{suffix}" in self._places),
        ]

    # --- Weights whose cut lies inside a block --------------------------------------------------

    def _gathers_first(self, name: str, format: Format) -> bool:
        """Whether a rank's part of a weight cannot be packed on its own; the same answer on all ranks.

        Raises:
            FormatError: it cannot, and the ranges of the blocks that are cut are on no rank.
        """
        plan = self.live.plan
        entry = plan.entry(name)
        size = plan.layout.etp if entry.is_expert else plan.layout.tp
        shapes = {tensor.name: tensor.shape for tensor in entry.hf}
        if entry.split is None or size == 1:
            regions(plan.local_form(name, 0).pieces, shapes)
            return False
        try:
            for coordinate in range(size):
                for region in regions(plan.local_form(name, coordinate).pieces, shapes):
                    format.check_cut(self._writer, region.shape, region.box, where=region.name)
        except FormatError:
            if any(axis.dim == entry.split.dim and axis.per > 1 for axis in format.amax or ()):
                raise
            return True
        return False

    def _save_gathered(self, shard: Shard, entry: Entry, tensor: Tensor, state: LayerState, group: Any) -> None:
        """Bring a weight together on one of its ranks, which packs and writes all of it. Collective."""
        parts = _all_gather(tensor, group)
        ranges = state.calibration.weight
        follows = state.format.amax is not None and any(
            entry.split is not None and axis.dim == entry.split.dim for axis in state.format.amax
        )
        known = _all_gather(ranges.to(tensor.device), group) if follows and ranges is not None else None
        self.exchanges += 1
        self.sent += tensor.nbytes * (group.size() - 1)
        if group.rank() != shard.layer % group.size():
            return
        self.guarded(lambda: self._save_whole(shard, entry, parts, known, state))

    def _save_whole(
        self, shard: Shard, entry: Entry, parts: Sequence[Tensor], known: Sequence[Tensor] | None, state: LayerState
    ) -> None:
        assert entry.split is not None
        blocks = [self.live.plan.local_form(entry.name, coordinate).blocks for coordinate in range(len(parts))]
        joined = _joined(parts, blocks, entry.shape, entry.split.dim)
        calibration = state.calibration
        if known is not None:
            extents = [
                entry.shape[entry.split.dim] if dim == entry.split.dim else size
                for dim, size in enumerate(known[0].shape)
            ]
            calibration = Calibration(
                weight=_joined(known, blocks, tuple(extents), entry.split.dim),
                weight_2=calibration.weight_2,
                input=calibration.input,
                pre_quant_scale=calibration.pre_quant_scale,
            )
        pieces: list[Piece] = entry.instance(entry.pieces, shard.layer, shard.expert)
        for region in regions(pieces, self.live.plan.hf_tensors):
            packed = self._pack(region, joined, LayerState(format=state.format, calibration=calibration))
            for stored in state.format.stored(self._writer):
                name, shape = f"{module_of(region.name)}.{stored.suffix}", stored.shape(region.shape)
                self._put_all(name, packed[stored.suffix], whole(shape), shape)


def _all_gather(tensor: Tensor, group: Any) -> list[Tensor]:
    """The same-shaped tensors of all ranks of a group. Collective."""
    mine = flat(tensor.contiguous()).view(torch.uint8)
    everything = torch.empty(group.size() * mine.numel(), dtype=torch.uint8, device=mine.device)
    dist.all_gather_into_tensor(everything, mine, group=group)
    return [part.view(tensor.dtype).view(tensor.shape) for part in everything.split(mine.numel())]


def _joined(parts: Sequence[Tensor], blocks: Sequence[Sequence[tuple[Box, Shape]]], shape: Shape, dim: int) -> Tensor:
    """The whole of a tensor from its parts along a dim; the blocks say which rows (or columns) go where."""
    found = parts[0].new_empty(shape)
    for part, held in zip(parts, blocks, strict=True):
        for box, at in held:
            found.narrow(dim, box.start[dim], box.shape[dim]).copy_(part.narrow(dim, at[dim], box.shape[dim]))
    return found

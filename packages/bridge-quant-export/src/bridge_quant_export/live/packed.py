"""One weight from the parameter of a shard to packed tensors of Hugging Face's: rows first, then codes.

A Megatron parameter may hold rows of several HF tensors, interleaved (q, k, v) or one after the other (gate, up).
Ranges of channels and blocks follow the rows, so both are brought into HF's order before anything is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bridge_core.errors import GeometryError
from bridge_core.geometry import Box, Piece, Shape, View, box_of, in_source_order, restrict, row_major
from bridge_core.runtime.tensors import flat, window
from bridge_quant_export.errors import CalibrationError
from bridge_quant_export.formats.format import COLS, ROWS, Calibration, Format, Stored


class Region(NamedTuple):
    """The part of one HF tensor that a parameter holds.

    Attributes:
        name: HF name.
        shape: of the whole HF tensor.
        box: the part.
        pieces: from the part (source, in its own coordinates) to the flat parameter.
    """

    name: str
    shape: Shape
    box: Box
    pieces: tuple[Piece, ...]


def regions(pieces: Sequence[Piece], shapes: dict[str, Shape]) -> list[Region]:
    """The HF tensors that some pieces are parts of, each with the box that its pieces fill.

    Raises:
        GeometryError: the pieces of a tensor fill no box, or do not keep rows whole.
    """
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.source.tensor, []).append(piece)
    return [_region(name, shapes[name], found) for name, found in by_name.items()]


def _region(name: str, shape: Shape, pieces: list[Piece]) -> Region:
    boxes = [box_of(piece.shape, piece.source, shape) for piece in pieces]
    known = [box for box in boxes if box is not None]
    start = tuple(min(box.start[dim] for box in known) for dim in range(len(shape))) if known else ()
    stop = tuple(max(box.start[dim] + box.shape[dim] for box in known) for dim in range(len(shape))) if known else ()
    box = Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))
    if len(known) != len(boxes) or box.numel != sum(piece.numel for piece in pieces):
        raise GeometryError(
            "the part of a weight that a rank holds is no box of the Hugging Face tensor",
            where=name,
            expected="a range of rows or of columns",
            got=f"{len(pieces)} pieces of {list(shape)}",
        )
    at = (0,) * len(shape)
    own = [part for piece in pieces for part in restrict(piece, "source", shape, box, box.shape, at)]
    for part in map(in_source_order, own):
        if part.shape and part.source.strides[-1] == 1 and part.target.strides[-1] != 1:
            raise GeometryError("Megatron has the columns of a weight as rows", where=name)
    return Region(name, shape, box, tuple(own))


def in_hf_order(parameter: Tensor, region: Region) -> Tensor:
    """The elements of a region, `box.shape`, from the parameter (or whole Megatron tensor) that holds them."""
    found = torch.empty(region.box.shape, dtype=parameter.dtype, device=parameter.device)
    for piece in region.pieces:
        target = window(found.view(-1), piece.shape, piece.source)
        target.copy_(window(flat(parameter), piece.shape, piece.target))
    return found


def rows_of(region: Region, columns: int) -> Tensor:
    """For every row of a region the row of the parameter (which has so many columns) that it is. int64."""
    height, width = region.box.shape
    found = torch.full((height,), -1, dtype=torch.int64)
    first = Box((0, 0), (height, 1))
    for piece in region.pieces:
        for part in restrict(piece, "source", (height, width), first, first.shape, (0, 0)):
            at = torch.zeros(part.shape, dtype=torch.int64) + part.target.offset
            for axis, (extent, stride) in enumerate(zip(part.shape, part.target.strides, strict=True)):
                steps = torch.arange(extent) * stride
                at += steps.view(-1, *(1,) * (len(part.shape) - axis - 1))
            window(found, part.shape, part.source).copy_(at // columns)
    return found


def calibration_of(known: Calibration, format: Format, region: Region, held: Shape) -> Calibration:
    """The calibration of a region, from that of the parameter of shape `held` that it lies in.

    Raises:
        CalibrationError: blocks of the parameter are not those of the HF tensor.
    """
    if not format.amax or known.weight is None or not any(axis.dim == ROWS for axis in format.amax):
        return known
    per = next(axis.per for axis in format.amax if axis.dim == ROWS)
    rows = rows_of(region, held[COLS])
    by_row = known.weight[rows // per]
    blocks = by_row[::per]
    spread = blocks.repeat_interleave(per, dim=0)[: len(by_row)]
    aligned = bool((rows[::per] % per == 0).all()) and torch.equal(spread, by_row)
    whole_blocks = torch.equal(rows // per, (rows[::per] // per).repeat_interleave(per)[: len(rows)])
    if not (aligned and whole_blocks):
        raise CalibrationError(
            f"blocks of {format.title} lie across the tensors that a fused weight is made of",
            where=region.name,
            expected=f"parts of the fused weight that begin and end at multiples of {per} rows",
            got=f"blocks that hold rows of several tensors, or of several ranks, in a weight of {list(held)}",
            fix="leave the layer unquantised, or use a format without blocks of rows",
        )
    return Calibration(weight=blocks, weight_2=known.weight_2, input=known.input, pre_quant_scale=known.pre_quant_scale)


def owns(stored: Stored, box: Box) -> bool:
    """Whether the holder of a region writes a tensor of it: its own part, or what all parts have in common."""
    followed = {axis.dim for axis in stored.axes}
    return all(box.start[dim] == 0 for dim in (ROWS, COLS) if dim not in followed)


def into(shape: Shape, box: Box, name: str) -> Piece:
    """The copy of a contiguous tensor of a box's shape into the whole tensor."""
    strides = row_major(shape)
    offset = sum(start * stride for start, stride in zip(box.start, strides, strict=True))
    return Piece(box.shape, View("", 0, row_major(box.shape)), View(name, offset, strides))

"""Pieces: strided copies between two tensors, and the arithmetic on them. Integers only.

A **view** names a tensor, an offset and one stride per axis, all in elements of that tensor's
row-major storage. A **piece** is a shape and two views of that shape. Everything that a conversion
does (rename, fuse, split, shard, stack, pad) is a list of pieces, and everything that one may ask
about a conversion is arithmetic on that list.

One assumption keeps the arithmetic exact and small: each axis of a view moves along one tensor dim.
`dim_steps` recovers which one and how far, and refuses a view for which that is not so. Along one dim
axes are usually nested (an outer one steps over all that the inner ones reach); then a cut gives few pieces.

Words: a tensor has *dims*, a piece has *axes*. Not here: names of layers, files, ranks, dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from bridge_core.errors import GeometryError

Shape = tuple[int, ...]


class View(NamedTuple):
    """A strided window on a tensor; offset and strides in elements."""

    tensor: str
    offset: int
    strides: Shape

    def at(self, index: Sequence[int]) -> int:
        """Element offset of one index of the view."""
        return self.offset + sum(i * s for i, s in zip(index, self.strides, strict=True))

    def moved(self, elements: int, tensor: str | None = None) -> View:
        """The same window `elements` further on, in `tensor` if given: how stacking composes."""
        return View(self.tensor if tensor is None else tensor, self.offset + elements, self.strides)


class Piece(NamedTuple):
    """A strided copy from `source` to `target`. In a plan the source is HF, the target Megatron."""

    shape: Shape
    source: View
    target: View

    @property
    def numel(self) -> int:
        """Number of elements copied."""
        return prod(self.shape)

    def inverse(self) -> Piece:
        """The same copy the other way."""
        return Piece(self.shape, self.target, self.source)

    def sub(self, start: Shape, shape: Shape) -> Piece:
        """The part of the piece at `start` of its own index space, with `shape`."""
        source = View(self.source.tensor, self.source.at(start), self.source.strides)
        target = View(self.target.tensor, self.target.at(start), self.target.strides)
        return Piece(shape, source, target)


class Box(NamedTuple):
    """An axis-aligned region of a tensor, one start and one extent per dim."""

    start: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        """Number of elements inside."""
        return prod(self.shape)


class Run(NamedTuple):
    """`length` elements that lie one after the other on both sides."""

    source: int
    target: int
    length: int


def row_major(shape: Sequence[int]) -> Shape:
    """Strides of a contiguous tensor, in elements; a dim of extent 0 counts as 1, as in torch."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def whole(shape: Shape) -> Box:
    """The box that is all of a tensor."""
    return Box((0,) * len(shape), shape)


def dim_steps(view: View, shape: Shape, tensor_shape: Shape) -> list[tuple[int, int]]:
    """For every axis of `view` the tensor dim it moves along, and by how many indices of that dim.

    Axes of extent 1 do not move; they are given dim 0 and step 0.
    """
    strides = row_major(tensor_shape)
    steps: list[tuple[int, int]] = []
    for extent, stride in zip(shape, view.strides, strict=True):
        if extent == 1:
            steps.append((0, 0))
            continue
        dim = next(
            (d for d, t in enumerate(strides) if stride % t == 0 and 0 < (extent - 1) * stride // t < tensor_shape[d]),
            None,
        )
        if dim is None:
            raise GeometryError(
                "an axis of a view moves along no single dim of its tensor",
                where=f"{view.tensor}, stride {stride}",
                expected=f"a multiple of one of the strides {strides} of shape {tensor_shape}",
            )
        steps.append((dim, stride // strides[dim]))
    return steps


def coordinates(offset: int, tensor_shape: Shape) -> Shape:
    """The index, one number per dim, of an element offset in a row-major tensor."""
    index: list[int] = []
    for stride in row_major(tensor_shape):
        index.append(offset // stride)
        offset -= index[-1] * stride
    return tuple(index)


def _cut_dim(axes: list[tuple[int, int, int]], at: int, low: int, high: int) -> list[dict[int, tuple[int, int]]]:
    """Index ranges of nested `axes` (number, extent, step; widest step first) that land in [low, high).

    Each result maps an axis number to (start, extent); `at` is the coordinate of index zero.
    """
    if not axes:
        return [{}] if low <= at < high else []
    (axis, extent, step), inner = axes[0], axes[1:]
    reach = sum((n - 1) * s for _, n, s in inner)
    first = max(0, -((at - low) // step) if at < low else 0)  # first index whose start is at or after low
    last = min(extent, (high - 1 - reach - at) // step + 1)  # one past the last that ends before high
    found: list[dict[int, tuple[int, int]]] = []
    if first < last:
        found.append({axis: (first, last - first), **{a: (0, n) for a, n, _ in inner}})
    if reach:
        touched_first = max(0, -((at + reach - low) // step)) if at + reach < low else 0
        touched_last = min(extent, (high - 1 - at) // step + 1)
        for index in range(touched_first, touched_last):
            if first <= index < last:
                continue
            found += [{axis: (index, 1), **rest} for rest in _cut_dim(inner, at + index * step, low, high)]
    return found


def restrict(piece: Piece, side: str, tensor_shape: Shape, box: Box, local: Shape, at: Shape) -> list[Piece]:
    """The part of `piece` that lies in `box` of the tensor on `side`, rebased to a local tensor.

    Args:
        piece: the piece to cut.
        side: `"source"` or `"target"`: which tensor the box belongs to.
        tensor_shape: shape of that tensor.
        box: the region kept.
        local: shape of the tensor that holds the region afterwards (a rank's shard, a chunk of a file).
        at: index in the local tensor where the box begins.

    Returns:
        Pieces whose view on `side` is in coordinates of the local tensor; the other side is untouched
        but for its offset. A cut through an axis that is fused from several gives a few pieces; a piece
        outside the box gives none.
    """
    view: View = getattr(piece, side)
    steps = dim_steps(view, piece.shape, tensor_shape)
    origin = coordinates(view.offset, tensor_shape)
    per_dim: list[list[dict[int, tuple[int, int]]]] = []
    for dim, start in enumerate(origin):
        axes = [(a, piece.shape[a], s) for a, (d, s) in enumerate(steps) if s and d == dim]
        axes.sort(key=lambda axis: -axis[2])
        low = box.start[dim]
        per_dim.append(_cut_dim(axes, start, low, low + box.shape[dim]))
    local_strides = row_major(local)
    new_strides = tuple(s * local_strides[d] if s else 0 for d, s in steps)
    pieces: list[Piece] = []
    for choice in product(*per_dim):
        ranges: dict[int, tuple[int, int]] = {}
        for part in choice:
            ranges.update(part)
        begin = tuple(ranges.get(a, (0, 1))[0] for a in range(len(piece.shape)))
        extent = tuple(ranges.get(a, (0, 1))[1] for a in range(len(piece.shape)))
        part = piece.sub(begin, extent)
        index = coordinates(getattr(part, side).offset, tensor_shape)
        offset = sum((i - b + p) * t for i, b, p, t in zip(index, box.start, at, local_strides, strict=True))
        rebased = View(view.tensor, offset, new_strides)
        pieces.append(part._replace(**{side: rebased}))
    return pieces


def coalesce(piece: Piece) -> Piece:
    """The same copy with as few axes as possible, target-contiguous axes last."""
    axes = [
        (t, s, n) for n, s, t in zip(piece.shape, piece.source.strides, piece.target.strides, strict=True) if n != 1
    ]
    axes.sort(reverse=True)
    merged: list[tuple[int, int, int]] = []
    for t, s, n in axes:
        if merged and merged[-1][0] == t * n and merged[-1][1] == s * n:
            merged[-1] = (t, s, merged[-1][2] * n)
        else:
            merged.append((t, s, n))
    return Piece(
        tuple(n for _, _, n in merged),
        View(piece.source.tensor, piece.source.offset, tuple(s for _, s, _ in merged)),
        View(piece.target.tensor, piece.target.offset, tuple(t for t, _, _ in merged)),
    )


def run_length(piece: Piece) -> int:
    """Elements that can be copied at once because they are contiguous on both sides."""
    piece = coalesce(piece)
    if piece.shape and piece.source.strides[-1] == piece.target.strides[-1] == 1:
        return piece.shape[-1]
    return 1


def runs(piece: Piece) -> Iterator[Run]:
    """The copy as contiguous runs, in the order of the target."""
    for first, count, source_step, target_step in series(piece):
        source, target, length = first
        for _ in range(count):
            yield Run(source, target, length)
            source += source_step
            target += target_step


def series(piece: Piece) -> Iterator[tuple[Run, int, int, int]]:
    """Runs in the order of the target, those at even distances as one: the first, how many, and the steps between
    them on the source and on the target. There may be many thousand runs, but few series."""
    piece = coalesce(piece)
    length = run_length(piece)
    outer = piece.shape[:-1] if length > 1 else piece.shape
    source, target = piece.source.strides, piece.target.strides
    *outer, count = outer or (1,)
    steps = (source[len(outer)], target[len(outer)]) if source else (0, 0)
    for index in product(*map(range, outer)):
        first = Run(
            piece.source.offset + sum(i * s for i, s in zip(index, source, strict=False)),
            piece.target.offset + sum(i * t for i, t in zip(index, target, strict=False)),
            length,
        )
        yield first, count, steps[0], steps[1]


def in_source_order(piece: Piece) -> Piece:
    """The same copy with its axes in the row-major order of the source; axes of extent 1 are dropped."""
    axes = [axis for axis in zip(piece.shape, piece.source.strides, piece.target.strides, strict=True) if axis[0] != 1]
    axes.sort(key=lambda axis: -axis[1])
    shape, source, target = (tuple(axis[which] for axis in axes) for which in range(3))
    return Piece(shape, piece.source._replace(strides=source), piece.target._replace(strides=target))


def slabs(shape: Shape, most: int) -> Iterator[Box]:
    """A tensor as boxes of at most `most` elements (but at least one) whose elements follow one another, in order."""
    if prod(shape) <= most:
        yield whole(shape)
        return
    dim = next(dim for dim in range(len(shape)) if dim == len(shape) - 1 or prod(shape[dim + 1 :]) <= most)
    inner = shape[dim + 1 :]
    step = max(1, most // prod(inner))
    for leading in product(*map(range, shape[:dim])):
        for start in range(0, shape[dim], step):
            extent = min(step, shape[dim] - start)
            yield Box((*leading, start, *(0 for _ in inner)), (*(1 for _ in leading), extent, *inner))

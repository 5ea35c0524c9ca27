"""What views and boxes cover, and whether they cover a tensor exactly once. Two kinds, each by its own arithmetic.

Views of a plan may be strided, and they are few: what one reaches is a product of one index set per dim, kept as
bit masks. Chunks of a checkpoint are boxes, and they may be 20,000 in a tensor of any size: what counts are their
corners, and no work depends on extents that a file claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from bridge_core.geometry.pieces import Box, Shape, View, coordinates, dim_steps

Corners = tuple[Shape, Shape]
"""A box as start and extent of each dim; `Box` is one."""


def _repeat(mask: int, step: int, count: int) -> int:
    """`mask` OR-ed with itself `count` times, each time shifted by `step` more bits."""
    if count == 1:
        return mask
    half = _repeat(mask, step, count // 2)
    both = half | half << (step * (count // 2))
    return both if count % 2 == 0 else both | mask << (step * (count - 1))


def _image(shape: Shape, view: View, tensor_shape: Shape) -> tuple[int, ...]:
    """The set of indices that a view reaches, one bit mask per dim: the image is their product."""
    masks = [1 << c for c in coordinates(view.offset, tensor_shape)]
    for extent, (dim, step) in zip(shape, dim_steps(view, shape, tensor_shape), strict=True):
        if extent > 1:
            masks[dim] = _repeat(masks[dim], step, extent)
    return tuple(masks)


def tiling_error(tensor_shape: Shape, views: Sequence[tuple[Shape, View]]) -> str | None:
    """Why `views` do not cover every element of a tensor exactly once; None if they do.

    Exact for any list of views that `dim_steps` understands: images are products of index sets, so
    two of them overlap only if their sets overlap in every dim.
    """
    images: list[tuple[int, ...]] = []
    covered = 0
    for shape, view in views:
        if len(shape) != len(view.strides):
            return f"a view of shape {shape} has {len(view.strides)} strides"
        image = _image(shape, view, tensor_shape)
        if prod(mask.bit_count() for mask in image) != prod(shape):
            return f"a view of shape {shape} reaches an element twice"
        outside = [d for d, mask in enumerate(image) if mask.bit_length() > tensor_shape[d]]
        if outside:
            return f"a view of shape {shape} leaves the tensor of shape {tensor_shape} in dim {outside[0]}"
        for other in images:
            if all(mine & theirs for mine, theirs in zip(image, other, strict=True)):
                where = tuple((m & t).bit_length() - 1 for m, t in zip(image, other, strict=True))
                return f"element {where} is covered more than once"
        images.append(image)
        covered += prod(shape)
    if covered != prod(tensor_shape):
        return f"{covered} of {prod(tensor_shape)} elements are covered"
    return None


def box_of(shape: Shape, view: View, tensor_shape: Shape) -> Box | None:
    """The region of the tensor that a view covers, if it is a box; None for a view with gaps."""
    start: list[int] = []
    extent: list[int] = []
    for mask in _image(shape, view, tensor_shape):
        first, count = (mask & -mask).bit_length() - 1, mask.bit_count()
        if mask.bit_length() - first != count:
            return None
        start.append(first)
        extent.append(count)
    return Box(tuple(start), tuple(extent))


def box_tiling_error(tensor_shape: Shape, boxes: Sequence[Corners]) -> str | None:
    """Why `boxes` do not cover every element of a tensor exactly once; None if they do. Empty boxes cover nothing.

    Boxes that lie inside and whose volumes add up to the tensor's cover it once exactly if no two overlap. Boxes that
    are apart along some dim do not, so they are split along one dim after the other until a group is one box;
    only groups that no dim splits (interlocked boxes) are compared in pairs.
    """
    if len(boxes) == 1 and boxes[0] == ((0,) * len(tensor_shape), tensor_shape):
        return None
    covered = 0
    for start, shape in boxes:
        if len(start) != len(tensor_shape) or len(shape) != len(tensor_shape):
            return f"the box at {start} of shape {shape} has another number of dims"
        if any(at < 0 or n < 0 or at + n > whole for at, n, whole in zip(start, shape, tensor_shape, strict=True)):
            return f"the box at {start} of shape {shape} leaves the tensor"
        covered += prod(shape)
    full = [box for box in boxes if 0 not in box[1]]
    if clash := _overlap(full, len(tensor_shape)):
        return f"the boxes {tuple(clash[0])} and {tuple(clash[1])} (start, shape) overlap"
    if covered != prod(tensor_shape):
        return f"{covered} of {prod(tensor_shape)} elements are covered"
    return None


def _overlap(boxes: list[Corners], dims: int) -> tuple[Corners, Corners] | None:
    pending: list[tuple[list[Corners], int, int]] = [(boxes, 0, 0)]  # group, dim to try next, dims that failed in a row
    while pending:
        group, dim, failed = pending.pop()
        if len(group) < 2:
            continue
        if failed == dims:
            if clash := _overlapping_pair(group):
                return clash
            continue
        groups = _split(group, dim)
        failed = failed + 1 if len(groups) == 1 else 0
        pending += [(part, (dim + 1) % dims, failed) for part in groups]
    return None


def _split(boxes: list[Corners], dim: int) -> list[list[Corners]]:
    """Groups whose extents along `dim` are apart from each other."""
    groups: list[list[Corners]] = []
    reached = -1
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        start = box[0][dim]
        if start >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, start + box[1][dim])
    return groups


def _overlapping_pair(boxes: list[Corners]) -> tuple[Corners, Corners] | None:
    for index, (start, shape) in enumerate(boxes):
        for other in boxes[:index]:
            if all(a < c + d and c < a + b for a, b, c, d in zip(start, shape, *other, strict=True)):
                return other, (start, shape)
    return None

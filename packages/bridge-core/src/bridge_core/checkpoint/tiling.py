"""Whether boxes cover a tensor exactly once.

If every box lies inside and their volumes add up to the tensor's, then covering it exactly once is the same as
not overlapping. Boxes that are apart along some axis cannot overlap, so they are split along one axis after the
other until a group is one box; only groups that no axis splits (interlocked boxes) are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from bridge_core.errors import CheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one per axis."""


def check_tiling(shape: tuple[int, ...], boxes: Sequence[Box], *, where: object) -> None:
    """Raise unless `boxes` cover a tensor of `shape` exactly once. Empty boxes cover nothing and are ignored.

    Raises:
        CheckpointError: a box has another rank or leaves the tensor, boxes overlap, or elements are missing.
    """
    if len(boxes) == 1 and boxes[0] == ((0,) * len(shape), shape):
        return
    covered = 0
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise CheckpointError(
                "a chunk has another number of axes than its tensor", where=where, expected=shape, got=sizes
            )
        for low, size, whole in zip(offsets, sizes, shape, strict=True):
            if low < 0 or size < 0 or low + size > whole:
                raise CheckpointError(
                    "a chunk leaves its tensor",
                    where=where,
                    expected=f"inside {shape}",
                    got=f"offsets {offsets}, sizes {sizes}",
                )
        covered += prod(sizes)
    full = [box for box in boxes if 0 not in box[1]]
    if clash := _overlap(full, len(shape)):
        raise CheckpointError(
            "two chunks of a tensor overlap", where=where, got=f"{clash[0]} and {clash[1]} (offsets, sizes)"
        )
    if covered != prod(shape):
        raise CheckpointError(
            "the chunks of a tensor do not cover it",
            where=where,
            expected=f"{prod(shape)} elements",
            got=f"{covered} elements",
        )


def _overlap(boxes: list[Box], rank: int) -> tuple[Box, Box] | None:
    pending: list[tuple[list[Box], int, int]] = [(boxes, 0, 0)]  # group, axis to try next, axes that failed in a row
    while pending:
        group, axis, failed = pending.pop()
        if len(group) < 2:
            continue
        if failed == rank:
            if clash := _overlapping_pair(group):
                return clash
            continue
        groups = _split(group, axis)
        failed = failed + 1 if len(groups) == 1 else 0
        pending += [(part, (axis + 1) % rank, failed) for part in groups]
    return None


def _split(boxes: list[Box], axis: int) -> list[list[Box]]:
    """Groups whose extents along `axis` are apart from each other."""
    groups: list[list[Box]] = []
    reached = -1
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        start = box[0][axis]
        if start >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, start + box[1][axis])
    return groups


def _overlapping_pair(boxes: list[Box]) -> tuple[Box, Box] | None:
    for index, (offsets, sizes) in enumerate(boxes):
        for other in boxes[:index]:
            if all(a < c + d and c < a + b for a, b, c, d in zip(offsets, sizes, *other, strict=True)):
                return other, (offsets, sizes)
    return None

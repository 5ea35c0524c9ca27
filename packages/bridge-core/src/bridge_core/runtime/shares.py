"""Who saves what of the shards that several ranks hold. Arithmetic: every rank finds the same, without a word."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from heapq import heapreplace
from math import prod

from bridge_core.geometry import Box, restrict, slabs, whole
from bridge_core.plan import Plan, Shard

_PARTS = 4
"""A shard of more than a rank's share divided by this is cut. So nobody saves more than that beyond a share, and cuts
are few."""

LEAST = 64 * 1024
"""Elements below which nothing is cut, however small the shares: norms are few, and many ranks."""


def saved_by(
    plan: Plan, rank: int, shards: Iterable[Shard], may_cut: Callable[[Shard], bool] = lambda shard: True
) -> list[Shard]:
    """What a rank saves of the shards that it holds, in their order: its share of what other ranks hold too.

    Large shards are cut into bands of rows. Then the largest go first, each to the rank that has least so far. A later
    stage's copy of the embedding is saved by nobody.

    Args:
        plan: of the model.
        rank: its number in the layout.
        shards: all that it holds, in the plan's order.
        may_cut: whether a shard may be cut; the same on all ranks that hold it, and on those that hold the other parts
            of its tensor, which take part in its exchange.

    Returns:
        The shards. One that was cut is there once for every band, with the pieces that lie in it.
    """
    held = [shard for shard in shards if not plan.is_second_copy(rank, shard)]
    alike: dict[Hashable, list[int]] = {}  # numbers of the shards that have their copies on the same ranks
    for number, shard in enumerate(held):
        alike.setdefault(plan.holders(shard), []).append(number)
    mine: list[tuple[int, Box]] = []
    for numbers in alike.values():
        turn, turns = plan.copy_of(rank, held[numbers[0]])
        elements = sum(prod(held[number].shape) for number in numbers)
        parts: list[tuple[int, Box]] = []
        for number in numbers:
            shape, cut = held[number].shape, turns > 1 and may_cut(held[number])
            boxes = slabs(shape, max(LEAST, elements // (turns * _PARTS))) if cut else [whole(shape)]
            parts += [(number, box) for box in boxes]
        owners = dealt([box.numel for _, box in parts], turns)
        mine += [part for part, owner in zip(parts, owners, strict=True) if owner == turn]
    return [_within(held[number], box) for number, box in sorted(mine)]


def dealt(sizes: Sequence[int], ways: int) -> list[int]:
    """Who of so many gets each of some things: the largest first, each to the one that has least so far."""
    loads = [(0, number) for number in range(ways)]  # a heap
    owners = [0] * len(sizes)
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        load, owners[at] = loads[0]
        heapreplace(loads, (load + sizes[at], owners[at]))
    return owners


def _within(shard: Shard, box: Box) -> Shard:
    """A shard with only the pieces that lie in a box of it, still in coordinates of the whole shard."""
    if box.shape == shard.shape:
        return shard
    parts = (restrict(piece, "target", shard.shape, box, shard.shape, box.start) for piece in shard.pieces)
    return shard._replace(pieces=tuple(piece for found in parts for piece in found))

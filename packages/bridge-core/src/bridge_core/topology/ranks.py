"""Ranks as a mixed-radix number: which index a rank has on each mesh axis, and which ranks form a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bridge_core.errors import LayoutError

# The names that both supported Megatron versions know. 0.19 adds `gtp_remat`, which 0.16 refuses.
AXES = ("tp", "pp", "dp", "ep", "cp")


@dataclass(frozen=True, slots=True)
class RankGrid:
    """One numbering of ranks over mesh axes; the index on the first axis changes fastest.

    Same numbers as `RankGenerator` of megatron-core 0.16.1 and 0.19.2 (`parallel_state.py`).

    Args:
        sizes: ranks along each axis, fastest axis first.
    """

    sizes: tuple[tuple[str, int], ...]
    _steps: dict[str, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steps: dict[str, tuple[int, int]] = {}
        stride = 1
        for axis, size in self.sizes:
            steps[axis] = (stride, size)
            stride *= size
        object.__setattr__(self, "_steps", steps)

    @classmethod
    def from_order(cls, order: str, sizes: Mapping[str, int]) -> RankGrid:
        """The grid of axes joined by hyphens (`"tp-cp-ep-dp-pp"`), fastest first.

        An axis of size 1 may be left out of `order`. Megatron takes any case, so this does.

        Raises:
            LayoutError: an axis is unknown, named twice, or left out although its size is not 1.
        """
        named = order.lower().split("-")
        wrong = [axis for axis in named if axis not in sizes]
        doubled = sorted({axis for axis in named if named.count(axis) > 1})
        missing = [axis for axis, size in sizes.items() if axis not in named and size != 1]
        if wrong or doubled or missing:
            problems = (("unknown", wrong), ("named twice", doubled), ("left out with size > 1", missing))
            raise LayoutError(
                f"the rank order {order!r} does not name the mesh axes",
                expected=f"each of {', '.join(sizes)} once, joined by '-'; those of size 1 may be left out",
                got="; ".join(f"{label}: {', '.join(map(repr, axes))}" for label, axes in problems if axes),
                fix="use Megatron's default, 'tp-cp-ep-dp-pp', or the order that the run was started with",
            )
        named += [axis for axis in sizes if axis not in named]
        return cls(tuple((axis, sizes[axis]) for axis in named))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(size for _, size in self.sizes)

    def stride(self, axis: str) -> int:
        """How many ranks apart two neighbours on `axis` are."""
        return self._step(axis)[0]

    def index(self, axis: str, rank: int) -> int:
        """The index of `rank` on `axis`. `rank` is not checked against the size of the grid."""
        stride, size = self._steps[axis]
        return rank // stride % size

    def rank(self, indices: Mapping[str, int]) -> int:
        """The rank at `indices` (axes that are not named: 0); the inverse of `index`.

        Raises:
            LayoutError: an axis is unknown, or an index lies outside of it.
        """
        rank = 0
        for axis, index in indices.items():
            stride, size = self._step(axis)
            if not 0 <= index < size:
                raise LayoutError(
                    f"index {index} does not exist on axis {axis!r}",
                    expected=f"0 <= index < {size}",
                    got=index,
                )
            rank += index * stride
        return rank

    def groups(self, axes: str) -> list[list[int]]:
        """All groups of ranks that differ only in their indices on `axes` (`"dp"`, `"tp-pp"`).

        Groups, and ranks within a group, come in the order of `RankGenerator.get_ranks`; how the names
        in `axes` are ordered makes no difference.
        """
        inside = axes.lower().split("-")
        for axis in inside:
            self._step(axis)
        offsets = self._ranks_along(axis for axis, _ in self.sizes if axis in inside)
        starts = self._ranks_along(axis for axis, _ in self.sizes if axis not in inside)
        return [[start + offset for offset in offsets] for start in starts]

    def _ranks_along(self, axes: Iterable[str]) -> list[int]:
        ranks = [0]
        for axis in axes:
            stride, size = self._steps[axis]
            ranks = [index * stride + rank for index in range(size) for rank in ranks]
        return ranks

    def _step(self, axis: str) -> tuple[int, int]:
        step = self._steps.get(axis)
        if step is None:
            raise LayoutError(f"there is no mesh axis {axis!r}", expected=", ".join(self._steps), got=axis)
        return step

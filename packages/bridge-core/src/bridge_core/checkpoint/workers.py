"""Processes that share a conversion: what is asked of them, and the one process that needs nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Workers(Protocol):
    """Processes that share a conversion. `size` 1 needs no communication at all."""

    rank: int
    size: int

    def together(self, step: Callable[[], None]) -> None:
        """Run `step` here; return when all workers did, raise if one of them failed. Collective."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def together(self, step: Callable[[], None]) -> None:
        """Run `step`."""
        step()


def jointly(workers: Workers, step: Callable[[], T]) -> T:
    """What `step` returns here, once it has returned everywhere; raises if a worker failed. Collective."""
    found: list[T] = []
    workers.together(lambda: found.append(step()))
    return found[0]

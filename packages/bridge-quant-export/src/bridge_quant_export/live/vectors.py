"""Vectors, on the CPU, that ranks reduce together where they exchange words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bridge_core.runtime.agreement import combine
from bridge_core.runtime.words import words_device, words_group


def reduced(vector: Tensor, group: Any) -> Tensor:
    """The largest of every element over a group, on the CPU. Collective.

    Raises:
        LostWorkerError: a rank is gone.
    """
    return _combined(vector, group, lambda parts: parts.amax(0))


def summed(vector: Tensor, group: Any) -> Tensor:
    """The sum of every element over a group, on the CPU. Collective.

    Raises:
        LostWorkerError: a rank is gone.
    """
    return _combined(vector, group, lambda parts: parts.sum(0))


def _combined(vector: Tensor, group: Any, reduction: Callable[[Tensor], Tensor]) -> Tensor:
    if group.size() == 1 or vector.numel() == 0:
        return vector.cpu()
    among = words_group(group)
    found = vector.to(words_device(among), copy=True)
    combine(found, among, reduction)
    return found.cpu()

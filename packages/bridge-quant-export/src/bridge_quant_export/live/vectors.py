"""Vectors of fp32 that ranks reduce together, on whatever device their group communicates."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from bridge_core.runtime.words import words_device


def reduced(vector: Tensor, group: Any) -> Tensor:
    """The largest of every element over a group, on the CPU. Collective."""
    if group.size() == 1 or vector.numel() == 0:
        return vector.cpu()
    found = vector.to(words_device(group), copy=True)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.cpu()


def summed(vector: Tensor, group: Any) -> Tensor:
    """The sum of every element over a group, on the CPU. Collective."""
    if group.size() == 1 or vector.numel() == 0:
        return vector.cpu()
    found = vector.to(words_device(group), copy=True)
    dist.all_reduce(found, group=group)
    return found.cpu()

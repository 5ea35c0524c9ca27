"""HF tensors that repeat others: nothing is made from them, so they have to hold the same bytes."""

from __future__ import annotations

import os
from contextlib import ExitStack

from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.errors import CheckpointError
from bridge_core.plan import Plan

_BLOCK = 8 * 1024 * 1024


def check_copies(plan: Plan, folder: HfFolder, *, rank: int = 0, size: int = 1) -> None:
    """Raise unless every copy that a folder has equals its original, to the bit.

    Args:
        plan: says which tensors are copies.
        folder: the HF folder.
        rank, size: which share of the bytes to compare, where several workers do.

    Raises:
        CheckpointError: names the copy and its original.
    """
    for name, copy in plan.copies.items():
        if name in folder.tensors:
            repeated, original = folder.tensors[name], folder.tensors[copy.of]
            if repeated.dtype != original.dtype or not _equal(repeated, original, rank, size):
                raise CheckpointError(
                    "a tensor of the HF checkpoint is not the copy that it has to be",
                    where=name,
                    expected=f"the {original.dtype} values of {copy.of}, of which Megatron keeps one",
                    got=f"{repeated.dtype} values that differ",
                    fix="train or merge the model so that both are equal, or name the copy in `ignore` to lose it",
                )


def _equal(a: Stored, b: Stored, rank: int, size: int) -> bool:
    begin, end = a.nbytes * rank // size, a.nbytes * (rank + 1) // size
    with ExitStack() as stack:
        files = [os.open(stored.path, os.O_RDONLY) for stored in (a, b)]
        for descriptor in files:
            stack.callback(os.close, descriptor)
        for at in range(begin, end, _BLOCK):
            count = min(_BLOCK, end - at)
            blocks = [os.pread(fd, count, s.offset + at) for fd, s in zip(files, (a, b), strict=True)]
            if blocks[0] != blocks[1]:
                return False
    return True

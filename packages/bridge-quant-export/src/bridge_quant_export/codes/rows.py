"""A weight in runs of rows that stay in the processor's cache, as fp32."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch
from torch import Tensor

from bridge_quant_export.errors import FormatError

# About a dozen passes are made over a run. On a CPU it should not leave the second-level cache between them; on a
# GPU the cost of a launch decides.
_ELEMENTS = {"cpu": 1 << 16}
_ELEMENTS_ELSEWHERE = 1 << 24


def row_runs(weight: Tensor, *, step: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight, a multiple of `step` at a time (fewer at the end), as fp32.

    The values may be the weight's own memory: write to a result of theirs, not to them.

    Raises:
        FormatError: a value is not finite.
    """
    count, width = weight.shape
    budget = _ELEMENTS.get(weight.device.type, _ELEMENTS_ELSEWHERE)
    height = max(1, budget // (width * step)) * step
    for start in range(0, count, height):
        run = weight[start : start + height].float().contiguous()
        # A sum is the cheapest pass that any NaN or infinity survives. It may overflow on its own, though.
        if not isfinite(run.sum()) and not torch.isfinite(run).all():
            raise FormatError(
                "the weight holds values that are not finite",
                expected="finite numbers",
                got=f"NaN or infinity in rows {start} to {start + len(run) - 1}",
                fix="look for the training step or conversion that broke the layer",
            )
        yield slice(start, start + len(run)), run


def block_amax(run: Tensor, size: int) -> Tensor:
    """Largest absolute value of every `size` elements along the rows: fp32 `[n, cols]` to `[n, cols / size]`."""
    # Numbers that are not negative are in the order of their bits, and integers are compared faster: no NaN to mind.
    bits = run.abs().view(torch.int32).view(-1, size).amax(-1)
    return bits.view(torch.float32).view(run.shape[0], -1)

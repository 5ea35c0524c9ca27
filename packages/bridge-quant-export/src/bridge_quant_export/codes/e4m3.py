"""E4M3 without infinities (`float8_e4m3fn`): OCP 8-bit floating point, revision 1.0."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX = 448.0
TINY = 2.0**-9
"""The smallest number above zero."""


@cache
def _cast_clips(device: torch.device) -> bool:
    """Whether torch's own cast clips: some versions make NaN of anything beyond 464."""
    # As many as its vectorised loops take at a time, and one more for the loop over the rest.
    beyond = torch.tensor([1e4, -1e4, 500.0] * 43, device=device).to(torch.float8_e4m3fn).float()
    return bool((beyond.abs() == MAX).all())


def encode(values: Tensor) -> Tensor:
    """The nearest codes (ties to even) of fp32 values; what is out of range becomes the largest number."""
    if not _cast_clips(values.device):
        values = values.clamp(-MAX, MAX)
    return values.to(torch.float8_e4m3fn)

"""E4M3 without infinities (`float8_e4m3fn`): OCP 8-bit floating point, revision 1.0."""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 448.0
TINY = 2.0**-9
"""The smallest number above zero."""


def encode(values: Tensor) -> Tensor:
    """The nearest codes (ties to even) of fp32 values; what is out of range becomes the largest number.

    Clipped here: some versions of torch make NaN of anything beyond 464 when they cast, others clip.
    """
    return values.clamp(-MAX, MAX).to(torch.float8_e4m3fn)

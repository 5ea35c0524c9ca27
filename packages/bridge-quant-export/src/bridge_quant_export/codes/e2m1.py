"""E2M1, four bits: a sign (bit 3) and an index into 0, 0.5, 1, 1.5, 2, 3, 4, 6. OCP microscaling formats, 1.0.

Two codes to a byte, that of the even column in the low half.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(values: Tensor) -> Tensor:
    """The nearest codes (ties to even) of fp32 values in pairs: `[n, cols]` to uint8 `[n, cols / 2]`.

    `values` is used as working memory. Values beyond 6 become 6, zero is always positive.
    """
    # Adding zero makes -0 a +0; then the highest bit is the sign of what is below zero.
    signs = (values.add_(0.0).view(torch.int32) >> 28) & 8
    size = values.abs_().clamp_(max=MAX)
    # Three evenly spaced stretches (steps of 1/2, 1 and 2), each rounded as if it were the only one and numbered so
    # that it continues the one below. Outside its own stretch each gives too much, so the least is right; and each
    # has even numbers where the code is even, so that ties go to even codes.
    index = (size * 2).round_()
    torch.minimum(index, size.round().add_(2), out=index)
    torch.minimum(index, size.mul_(0.5).round_().add_(4), out=index)
    return pair((index.int() | signs).to(torch.uint8))


def pair(nibbles: Tensor) -> Tensor:
    """Bytes below 16 in pairs, the first in the low half: uint8 `[n, cols]` to uint8 `[n, cols / 2]`."""
    both = nibbles.contiguous().view(torch.int16)  # low byte first: safetensors and every platform of torch
    return (both | (both >> 4)).to(torch.uint8)


def unpair(packed: Tensor) -> Tensor:
    """The inverse of `pair`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


@cache
def _pairs() -> Tensor:
    codes = torch.tensor([*_MAGNITUDES, *(-size for size in _MAGNITUDES)])
    byte = torch.arange(256)
    return torch.stack((codes[byte & 0xF], codes[byte >> 4]), dim=-1)


def decode(packed: Tensor) -> Tensor:
    """fp32 values of paired codes: uint8 `[n, cols / 2]` to `[n, cols]`."""
    return _pairs().to(packed.device)[packed.int()].flatten(-2)

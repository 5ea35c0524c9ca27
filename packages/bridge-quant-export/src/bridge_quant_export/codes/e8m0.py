"""E8M0: a power of two as its exponent plus 127, in a byte; 255 is NaN. OCP microscaling formats, 1.0."""

from __future__ import annotations

import torch
from torch import Tensor

_BIAS, _NAN = 127, 255
_FRACTION_BITS = 23


def encode_range(amax: Tensor, largest: float) -> Tensor:
    """The least powers of two that bring ranges down to `largest`, as codes (uint8). Zero gives the least power.

    Exact: exponents are compared, nothing is divided and no logarithm is taken.
    """
    limit = int(torch.tensor(largest, dtype=torch.float32).view(torch.int32))
    bits = amax.float().view(torch.int32)
    exponent = (bits >> _FRACTION_BITS) - (limit >> _FRACTION_BITS)
    mask = (1 << _FRACTION_BITS) - 1
    exponent += (bits & mask) > (limit & mask)
    return (exponent + _BIAS).clamp_(0, _NAN - 1).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """The powers of two, as fp32."""
    bits = codes.int()
    values = bits << _FRACTION_BITS
    values[bits == 0] = 1 << (_FRACTION_BITS - 1)  # 2**-127 is below fp32's normal numbers
    values[bits == _NAN] = 0x7FC00000
    return values.view(torch.float32)

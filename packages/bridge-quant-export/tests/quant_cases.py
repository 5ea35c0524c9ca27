"""Weights and calibrations for tests: every value distinct, ranges found by plain reductions."""

import torch

from bridge_quant_export.formats import FORMATS
from bridge_quant_export.formats.format import Calibration

PAIRS = [(name, writer) for name, found in FORMATS.items() for writer in found.stores]


def weights(rows, cols, *, dtype=torch.bfloat16, seed=0):
    """A matrix like a trained one: normal, with a few outliers, no zero."""
    generator = torch.Generator().manual_seed(1000 * rows + cols + seed)
    values = torch.randn(rows, cols, generator=generator) * 0.02
    values[torch.rand(rows, cols, generator=generator) < 0.002] *= 12
    return values.to(dtype)


def reduced(weight, axes):
    """Largest absolute values of a weight's blocks, in the shape that a format's `amax` gives."""
    found = weight.float().abs()
    for axis in axes:
        if axis.dim is None:
            continue
        pad = -found.shape[axis.dim] % axis.per
        found = torch.nn.functional.pad(found, (0, pad) if axis.dim == 1 else (0, 0, 0, pad))
        found = found.unflatten(axis.dim, (-1, axis.per)).amax(axis.dim + 1)
    followed = {axis.dim for axis in axes}
    for dim in (1, 0):
        if dim not in followed:
            found = found.amax(dim)
    return found


def calibration(format, weight):
    """What quantisers would know of a weight, with an input range and scales of their own."""
    known = {}
    if format.amax is not None:
        known["weight"] = reduced(weight, format.amax)
    if "weight_2" in format.needs:
        known["weight_2"] = weight.float().abs().amax() * 0.97
    if "input" in format.needs:
        known["input"] = torch.tensor(3.71)
    if "pre_quant_scale" in format.needs:
        generator = torch.Generator().manual_seed(weight.shape[1])
        known["pre_quant_scale"] = 0.5 + torch.rand(weight.shape[1], generator=generator)
    return Calibration(**known)


def same_bytes(a, b):
    """Whether two tensors agree in dtype, shape and every byte."""
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)

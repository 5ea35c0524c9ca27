"""Weights to fp8 in blocks, on their way into files.

Formula: DeepSeek-V3, inference/kernel.py (`act_quant`, whose scale is per block here): the scale is the block's
largest absolute value over 448, in float32; a value over its scale is rounded to float8_e4m3fn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import numpy_dtype
from bridge_core.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np


def encode(values: np.ndarray, codec: Fp8Blocks, *, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise whole rows of blocks of a matrix.

    A block of zeros, or of values so small that their scale would be zero, has the scale 1.

    Args:
        values: [R, C] in any floating-point dtype; R is a multiple of a block's rows but at the end of a matrix.
        codec: the format.
        where: what an error names.

    Returns:
        The codes [R, C] as float8_e4m3fn, and the scales in float32.

    Raises:
        CheckpointError: a value is not finite.
    """
    import numpy as np

    down, across = codec.scale_shape((values.shape[0], values.shape[1]))
    codes = np.empty(values.shape, numpy_dtype(codec.dtype))
    scales = np.empty((down, across), np.float32)
    starts = np.arange(0, values.shape[1], codec.cols)
    for number in range(down):
        rows = slice(number * codec.rows, (number + 1) * codec.rows)
        band = values[rows].astype(np.float32)
        largest = np.maximum.reduceat(np.abs(band).max(axis=0), starts)
        if not np.isfinite(largest).all():
            raise not_finite(where)
        scale = largest / np.float32(codec.largest)
        scale[scale == 0] = 1
        scales[number] = scale
        codes[rows] = (band / np.repeat(scale, codec.cols)[: values.shape[1]]).astype(codes.dtype)
    return codes, scales


def not_finite(where: str) -> CheckpointError:
    """What to raise for a weight that cannot be quantised."""
    return CheckpointError(
        "a weight with infinite or undefined values cannot be quantised",
        where=where,
        expected="finite values",
        got="inf or nan",
        fix="export without fp8, and look at the training run",
    )

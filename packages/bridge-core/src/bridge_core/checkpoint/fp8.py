"""fp8 weights in blocks, in files: weights paired with their scales, read by region, written block by block.

A quantised weight and its scales are one `Stored` tensor, which presents itself in the dtype that reading gives.
Only the rows and columns that a piece needs are read, with the scales of their blocks.

Formula: DeepSeek-V3, inference/kernel.py. Reading (`weight_dequant`): the stored value to float32, times the scale of
its block, rounded to bfloat16. Writing (`act_quant`, whose scale is per block here): the scale is the block's largest
absolute value over 448, in float32; a value over its scale is rounded to float8_e4m3fn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bridge_core.checkpoint.safetensors import Encoded, Stored
from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import dtype_of, numpy_dtype
from bridge_core.errors import CheckpointError, preview
from bridge_core.geometry import Box, Piece, Shape, View

if TYPE_CHECKING:
    import numpy as np


def present(tensors: Mapping[str, Stored], codec: Fp8Blocks, *, where: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint with every quantised weight as one tensor; scales have no name of their own.

    Raises:
        CheckpointError: a weight lacks its scales, scales lack their weight or have another shape or dtype, or
            nothing is quantised although config.json says so. Names the first.
    """
    scales = {weight: name for name in tensors if (weight := codec.weight_name(name)) is not None}
    quantised = [name for name, tensor in tensors.items() if tensor.dtype == codec.dtype]
    _check_pairs(tensors, codec, scales, quantised, where)
    found: dict[str, Stored] = {}
    held = set(scales.values())
    for name, tensor in tensors.items():
        if name in scales:
            encoded = Encoded(codec, tensors[scales[name]])
            found[name] = tensor._replace(dtype=codec.presented, encoded=encoded)
        elif name not in held:
            found[name] = tensor
    return found


def _check_pairs(
    tensors: Mapping[str, Stored], codec: Fp8Blocks, scales: Mapping[str, str], quantised: list[str], where: Path
) -> None:
    again = "download the checkpoint again, completely"
    if not quantised:
        raise CheckpointError(
            "config.json says that weights are quantised, and none is",
            where=where,
            expected=f"weights in {codec.dtype}: {codec}",
            got="none",
            fix="remove quantization_config from config.json, if the weights were dequantised",
        )
    if bare := [name for name in quantised if name not in scales]:
        raise CheckpointError(
            "quantised weights have no scales",
            where=preview(bare),
            expected=f"{codec.scale_name(bare[0])} beside {bare[0]}",
            got="nothing",
            fix=again,
        )
    known = set(quantised)
    if orphans := [scale for weight, scale in scales.items() if weight not in known]:
        weight = codec.weight_name(orphans[0]) or ""
        raise CheckpointError(
            "scales belong to no quantised weight",
            where=preview(orphans),
            expected=f"{weight} in {codec.dtype}",
            got=tensors[weight].dtype if weight in tensors else "no such tensor",
            fix=again,
        )
    for name in quantised:
        shape, scale = tensors[name].shape, tensors[scales[name]]
        expected = codec.scale_shape(shape) if len(shape) == 2 else ()
        if scale.dtype != codec.scale_dtype or scale.shape != expected:
            raise CheckpointError(
                "the scales of a quantised weight do not fit it",
                where=scales[name],
                expected=f"{codec.scale_dtype} {list(expected)}, one for each block of {name} {list(shape)}",
                got=f"{scale.dtype} {list(scale.shape)}",
                fix=f"check weight_block_size in config.json; else {again}",
            )


# --- Reading --------------------------------------------------------------------------------------


def region(shape: Shape, extents: Shape, view: View) -> tuple[Box, View]:
    """The rows and columns of a matrix that a view touches, and the view in a matrix of only those.

    Args:
        shape: of the matrix.
        extents: of the view's axes.
        view: offset and strides in elements of the matrix; strides are not negative.
    """
    width = shape[1]
    first, left = divmod(view.offset, width)
    reach = [(n - 1) * stride for n, stride in zip(extents, view.strides, strict=True)]
    across = sum(step for step, stride in zip(reach, view.strides, strict=True) if stride % width)
    if left + across >= width:  # axes that run on from row to row: whole rows
        last = (view.offset + sum(reach)) // width
        box = Box((first, 0), (last + 1 - first, width))
        return box, view._replace(offset=view.offset - first * width)
    down = sum(step for step, stride in zip(reach, view.strides, strict=True) if stride % width == 0) // width
    box = Box((first, left), (down + 1, across + 1))
    strides = tuple(s if s % width else s // width * (across + 1) for s in view.strides)
    return box, view._replace(offset=0, strides=strides)


def read_bytes(stored: Stored, piece: Piece) -> int:
    """Bytes of a file that a piece of a stored tensor is made from; of a quantised one with its scales."""
    if stored.encoded is None or not piece.numel:
        return piece.numel * dtype_of(stored.dtype).itemsize
    codec = stored.encoded.codec
    box, _ = region(stored.shape, piece.shape, piece.source)
    blocks = _blocks(box.start[0], box.shape[0], codec.rows) * _blocks(box.start[1], box.shape[1], codec.cols)
    return piece.numel + blocks * dtype_of(codec.scale_dtype).itemsize


def _blocks(start: int, count: int, size: int) -> int:
    return (start + count - 1) // size - start // size + 1


def decode(codes: np.ndarray, scales: np.ndarray, stored: Stored, box: Box) -> np.ndarray:
    """A region of a quantised weight in the dtype that it presents, flat.

    Args:
        codes, scales: the whole weight and its whole scales as they lie in files, flat; only what is needed is read.
        stored: the weight.
        box: rows and columns.
    """
    import numpy as np

    assert stored.encoded is not None
    codec, (top, left), (height, width) = stored.encoded.codec, *box
    matrix = codes.view(np.uint8).reshape(stored.shape)
    grid = scales.reshape(codec.scale_shape(stored.shape))
    columns = np.arange(left, left + width) // codec.cols
    found = np.empty((height, width), numpy_dtype(stored.dtype))
    for row in range(top - top % codec.rows, top + height, codec.rows):
        begin, end = max(row, top), min(row + codec.rows, top + height)
        values = _float32_of_codes()[matrix[begin:end, left : left + width]]
        with np.errstate(over="ignore"):
            values *= grid[row // codec.rows, columns]
            found[begin - top : end - top] = values
    return found.reshape(-1)


@cache
def _float32_of_codes() -> np.ndarray:
    """The value of each of the 256 codes: looking up is several times faster than casting."""
    import numpy as np

    return np.arange(256, dtype=np.uint8).view(numpy_dtype(Fp8Blocks.dtype)).astype(np.float32)


# --- Writing --------------------------------------------------------------------------------------


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

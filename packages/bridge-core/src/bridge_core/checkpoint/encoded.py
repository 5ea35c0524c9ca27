"""Quantised weights in files: each with the tensors that store it, read by region.

A quantised weight and its parts are one `Stored` tensor, which presents itself in the dtype that reading gives.
Only the rows and columns that a piece needs are read, with what their codes need besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bridge_core.checkpoint.safetensors import Encoded, Stored
from bridge_core.codecs import Codec, Header
from bridge_core.geometry import Box, Shape, View

if TYPE_CHECKING:
    import numpy as np


def present(tensors: Mapping[str, Stored], codec: Codec, *, where: object) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a checkpoint with every quantised weight as one tensor; its parts have no name of their own.

    Returns:
        the tensors, a weight in the place of the first of its parts; and what is not read, with the reasons.

    Raises:
        CheckpointError: the parts of a weight are incomplete or do not fit one another.
    """
    weights, beside = codec.find({name: Header(t.dtype, t.shape) for name, t in tensors.items()}, where=where)
    weight_of = {part: name for name, shape in weights.items() for part in codec.parts(name, shape)}
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        weight = weight_of.get(name)
        if weight is None:
            if name not in beside:
                found[name] = tensor
        elif weight not in found:
            shape = weights[weight]
            parts = tuple(tensors[part] for part in codec.parts(weight, shape))
            place = parts[0]._replace(dtype=codec.presented, shape=shape)
            found[weight] = place._replace(encoded=Encoded(codec, weight, parts))
    return found, beside


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


def decode(stored: Stored, box: Box, read: Callable[[Stored, Box], np.ndarray]) -> np.ndarray:
    """A region of a quantised weight in the dtype that it presents, flat.

    Args:
        stored: the weight.
        box: rows and columns.
        read: gives a box of a part, as it lies in a file.
    """
    encoded = stored.encoded
    assert encoded is not None
    boxes = encoded.codec.regions(encoded.weight, stored.shape, box)
    arrays = [read(part, cut) for part, cut in zip(encoded.parts, boxes, strict=True)]
    return encoded.codec.decode(encoded.weight, stored.shape, box, arrays).reshape(-1)

"""Strided copies and what they cover: integers only, no names of layers, files, ranks or dtypes.

`pieces` is the arithmetic of strided copies; `tiling` is the proof that views or boxes cover a tensor exactly once.
"""

from bridge_core.geometry.pieces import (
    Box,
    Piece,
    Run,
    Shape,
    View,
    coalesce,
    coordinates,
    dim_steps,
    in_source_order,
    restrict,
    row_major,
    run_length,
    runs,
    series,
    slabs,
    whole,
)
from bridge_core.geometry.tiling import box_of, box_tiling_error, tiling_error

__all__ = [
    "Box",
    "Piece",
    "Run",
    "Shape",
    "View",
    "box_of",
    "box_tiling_error",
    "coalesce",
    "coordinates",
    "dim_steps",
    "in_source_order",
    "restrict",
    "row_major",
    "run_length",
    "runs",
    "series",
    "slabs",
    "tiling_error",
    "whole",
]

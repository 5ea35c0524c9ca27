"""The one table of element types, and their names in safetensors, torch and numpy.

Names inside this package are those of safetensors (`"BF16"`). numpy has no bfloat16 and no fp8;
`ml_dtypes` brings them, with exact round-to-nearest-even casts. It is imported when first needed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from bridge_core.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np


class DType(NamedTuple):
    """One element type.

    Attributes:
        name: safetensors' name.
        torch: name in the `torch` module.
        storage: torch's legacy storage class, as it stands in the pickles of `torch.save`.
        numpy: name in numpy, or in ml_dtypes.
        itemsize: bytes of one element.
    """

    name: str
    torch: str
    storage: str
    numpy: str
    itemsize: int


_TABLE = (
    DType("F64", "float64", "DoubleStorage", "float64", 8),
    DType("F32", "float32", "FloatStorage", "float32", 4),
    DType("F16", "float16", "HalfStorage", "float16", 2),
    DType("BF16", "bfloat16", "BFloat16Storage", "bfloat16", 2),
    DType("F8_E4M3", "float8_e4m3fn", "UntypedStorage", "float8_e4m3fn", 1),
    DType("F8_E5M2", "float8_e5m2", "UntypedStorage", "float8_e5m2", 1),
    DType("I64", "int64", "LongStorage", "int64", 8),
    DType("I32", "int32", "IntStorage", "int32", 4),
    DType("I16", "int16", "ShortStorage", "int16", 2),
    DType("I8", "int8", "CharStorage", "int8", 1),
    DType("U8", "uint8", "ByteStorage", "uint8", 1),
    DType("BOOL", "bool", "BoolStorage", "bool", 1),
)
_BY_NAME = {dtype.name: dtype for dtype in _TABLE}
_BY_TORCH = {dtype.torch: dtype for dtype in _TABLE}
_SHORT = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "half": "F16", "float": "F32", "double": "F64"}


@cache
def dtype_of(name: object, *, where: object = None) -> DType:
    """The element type with a given name, in any of the usual spellings (`BF16`, `bfloat16`), or torch's own.

    Raises:
        CheckpointError: there is none; `where` says what the name was found in.
    """
    plain = str(name).removeprefix("torch.")
    found = _BY_NAME.get(plain) or _BY_TORCH.get(plain) or _BY_NAME.get(_SHORT.get(plain.lower(), plain.upper()))
    if found is None:
        raise CheckpointError(
            "an element type is not supported",
            where=where,
            expected=", ".join(_BY_NAME),
            got=name,
            fix="convert the tensor to one of these, or add a line to bridge_core/dtypes.py",
        )
    return found


@cache
def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of an element type, from ml_dtypes where numpy has none."""
    import numpy as np

    dtype = dtype_of(name)
    if dtype.numpy in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype.numpy))
    return np.dtype(dtype.numpy)

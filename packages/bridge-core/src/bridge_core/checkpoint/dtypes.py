"""The one table of element types: what safetensors, torch and numpy call the same bits.

Sources: the dtype list of the safetensors format; `_dtype_to_storage_type_map` and `_new_dtypes` of
torch 2.13 `torch/storage.py` for the storage class that `torch.save` names.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge_core.errors import CheckpointError, preview

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One element type under all its names.

    `storage` is the class that `torch.save` names for a storage of this type: `torch.<storage>`. It is None for
    types younger than typed storages; those are saved as raw bytes (`torch.storage.UntypedStorage`) and the
    type is named beside them. `numpy` with a dot lives in `ml_dtypes`.
    """

    name: str
    torch: str
    storage: str | None
    itemsize: int
    numpy: str


_ROWS = (
    DType("F64", "float64", "DoubleStorage", 8, "float64"),
    DType("F32", "float32", "FloatStorage", 4, "float32"),
    DType("F16", "float16", "HalfStorage", 2, "float16"),
    DType("BF16", "bfloat16", "BFloat16Storage", 2, "ml_dtypes.bfloat16"),
    DType("F8_E4M3", "float8_e4m3fn", None, 1, "ml_dtypes.float8_e4m3fn"),
    DType("F8_E5M2", "float8_e5m2", None, 1, "ml_dtypes.float8_e5m2"),
    DType("F8_E8M0", "float8_e8m0fnu", None, 1, "ml_dtypes.float8_e8m0fnu"),
    DType("I64", "int64", "LongStorage", 8, "int64"),
    DType("I32", "int32", "IntStorage", 4, "int32"),
    DType("I16", "int16", "ShortStorage", 2, "int16"),
    DType("I8", "int8", "CharStorage", 1, "int8"),
    DType("U64", "uint64", None, 8, "uint64"),
    DType("U32", "uint32", None, 4, "uint32"),
    DType("U16", "uint16", None, 2, "uint16"),
    DType("U8", "uint8", "ByteStorage", 1, "uint8"),
    DType("BOOL", "bool", "BoolStorage", 1, "bool"),
)

DTYPES: dict[str, DType] = {row.name: row for row in _ROWS}
"""Every supported element type by its safetensors name."""

_BY_TORCH = {f"torch.{row.torch}": row for row in _ROWS}
_BY_STORAGE = {f"torch.{row.storage}": row for row in _ROWS if row.storage}

UNTYPED_STORAGES = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
# Named so that a checkpoint that holds one is told apart from a hostile one.
_QUANTISED = ("qint8", "qint32", "quint8", "quint4x2", "quint2x4")
_UNSUPPORTED = (
    *("complex32", "complex64", "complex128", "float4_e2m1fn_x2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "ComplexFloatStorage", "ComplexDoubleStorage"),
    *(*_QUANTISED, "QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"),
)
TORCH_NAMES = (*_BY_TORCH, *_BY_STORAGE, *UNTYPED_STORAGES, *(f"torch.{name}" for name in _UNSUPPORTED))
"""Every global of torch that names an element type or a storage of one, with its module."""


def dtype(name: str) -> DType:
    """The row of a safetensors dtype name such as `"BF16"`.

    Raises:
        CheckpointError: there is no such row.
    """
    if (row := DTYPES.get(name)) is None:
        raise CheckpointError("unknown element type", expected=preview(DTYPES, limit=len(DTYPES)), got=name)
    return row


def dtype_of_torch(global_name: str | None, *, where: object = None) -> DType:
    """The row of a torch dtype (`"torch.bfloat16"`) or typed storage class (`"torch.BFloat16Storage"`).

    Raises:
        CheckpointError: it has no safetensors counterpart, or names no element type.
    """
    row = _BY_TORCH.get(global_name or "") or _BY_STORAGE.get(global_name or "")
    if row is None:
        raise CheckpointError("element type without a safetensors counterpart", where=where, got=global_name)
    return row


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a safetensors dtype name; bf16 and fp8 come from `ml_dtypes`, imported on first use."""
    module, _, attribute = dtype(name).numpy.rpartition(".")
    numpy = importlib.import_module("numpy")
    return numpy.dtype(getattr(importlib.import_module(module), attribute) if module else attribute)

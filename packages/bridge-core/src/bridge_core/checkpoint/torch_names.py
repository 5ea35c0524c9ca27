"""How torch's pickles name the element types of `bridge_core.dtypes`.

`torch.save` names a storage's class (`torch.BFloat16Storage`) for the types that have one; younger types are saved as
an untyped storage and named beside it (`torch.float8_e4m3fn`). Source: `_dtype_to_storage_type_map` and `_new_dtypes`
of torch 2.13 `torch/storage.py`.
"""

from __future__ import annotations

from bridge_core.dtypes import DType, dtype_of
from bridge_core.errors import CheckpointError

UNTYPED = "UntypedStorage"
UNTYPED_STORAGES = (f"torch.storage.{UNTYPED}", f"torch.{UNTYPED}")

_NAMES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
_ROWS = tuple(dtype_of(name) for name in _NAMES)
_BY_GLOBAL = {f"torch.{row.torch}": row for row in _ROWS} | {
    f"torch.{row.storage}": row for row in _ROWS if row.storage != UNTYPED
}

# Named so that a checkpoint that holds one of these is told apart from a hostile one.
_UNSUPPORTED = (
    *("complex32", "complex64", "complex128", "ComplexFloatStorage", "ComplexDoubleStorage"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    *("QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"),
    *("uint16", "uint32", "uint64", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
)
TORCH_NAMES = (*_BY_GLOBAL, *UNTYPED_STORAGES, *(f"torch.{name}" for name in _UNSUPPORTED))
"""Every global of torch that names an element type or a storage of one, with its module."""


def dtype_of_global(name: str | None, *, where: object) -> DType:
    """The element type of a torch dtype (`"torch.bfloat16"`) or typed storage class (`"torch.BFloat16Storage"`).

    Raises:
        CheckpointError: it is not supported, or names no element type.
    """
    if (row := _BY_GLOBAL.get(name or "")) is None:
        raise CheckpointError(
            "an element type of torch that is not supported", where=where, expected=", ".join(_NAMES), got=name
        )
    return row

"""The items of a torch_dist checkpoint: `torch.save` archives of one tensor or one object, without torch.

`tensor_item` gives the bytes around a contiguous tensor's data; `locate_tensor` finds the data in an item that
anyone wrote; `save_object` and `load_object` do the same for Python objects. Records of an archive and the pickle
of a tensor: torch 2.13 `torch/serialization.py` (`_save`) and `torch/_utils.py` (`_rebuild_tensor_v2`, `_v3`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from bridge_core.checkpoint import pickles as p
from bridge_core.checkpoint.torch_names import TORCH_NAMES, UNTYPED, UNTYPED_STORAGES, dtype_of_global
from bridge_core.checkpoint.zips import ALIGNMENT, Archive, ReadAt, build_archive
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError
from bridge_core.geometry import row_major

_FOLDER = "archive/"  # what torch.save calls it when it writes to a stream, as DCP does


@dataclass(frozen=True, slots=True)
class TensorItem:
    """The bytes of an item around the data of one tensor.

    Attributes:
        head: what precedes the data; equal to what torch 2.13 writes, to the byte.
        tail: what follows it.
        data_offset: where the data starts, from the item's start: a multiple of 64.
        nbytes: size of the data.
        length: size of the whole item.
    """

    head: bytes
    tail: bytes
    data_offset: int
    nbytes: int
    length: int


@lru_cache(maxsize=4096)
def tensor_item(dtype: str, shape: tuple[int, ...]) -> TensorItem:
    """The item of one contiguous, row-major tensor on the CPU, with a gap for its little-endian data.

    The data's crc is 0 (unknown when the item is laid out), which torch's reader does not check.

    Args:
        dtype: safetensors name, for example `"BF16"`.

    Raises:
        CheckpointError: the dtype is not known.
    """
    nbytes = prod(shape) * dtype_of(dtype).itemsize
    parts = build_archive([*_first_records(_tensor_pickle(dtype, shape)), (_FOLDER + "data/0", nbytes), _VERSION])
    # `data/0` is the only record given as a size, hence the only int.
    gap = next(index for index, part in enumerate(parts) if isinstance(part, int))
    head, tail = (b"".join(map(bytes, side)) for side in (parts[:gap], parts[gap + 1 :]))  # pyright: ignore
    return TensorItem(head, tail, len(head), nbytes, len(head) + nbytes + len(tail))


_VERSION = (_FOLDER + "version", b"3\n")


def _first_records(data_pickle: bytes) -> list[tuple[str, bytes]]:
    return [
        (_FOLDER + "data.pkl", data_pickle),
        (_FOLDER + ".format_version", b"1"),
        (_FOLDER + ".storage_alignment", str(ALIGNMENT).encode()),
        (_FOLDER + "byteorder", b"little"),
    ]


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What `torch.save` writes for a contiguous tensor, memo instructions included.

    Typed storages count elements; types without a typed storage are saved as bytes and named at the end.
    """
    row = dtype_of(dtype)
    slot = 0

    def kept(instructions: bytes) -> bytes:
        nonlocal slot
        slot += 1
        return instructions + p.remember(slot - 1)

    def kept_ints(values: Sequence[int]) -> bytes:
        return kept(p.put_ints(values)) if values else p.EMPTY_TUPLE

    typed = row.storage != UNTYPED
    numel = prod(shape)
    rebuild = kept(p.put_global("torch._utils._rebuild_tensor_v2" if typed else "torch._utils._rebuild_tensor_v3"))
    storage = (
        b"("
        + kept(p.put_str("storage"))
        + kept(p.put_global(f"torch.{row.storage}" if typed else UNTYPED_STORAGES[0]))
        + kept(p.put_str("0"))
        + kept(p.put_str("cpu"))
        + p.put_int(numel if typed else numel * row.itemsize)
    )
    storage = kept(storage + b"t") + b"Q"
    view = p.put_int(0) + kept_ints(shape) + kept_ints(row_major(shape)) + p.FALSE
    hooks = kept(kept(p.put_global("collections.OrderedDict")) + p.EMPTY_TUPLE + p.REDUCE)
    element = b"" if typed else kept(p.put_global(f"torch.{row.torch}"))
    arguments = kept(b"(" + storage + view + hooks + element + b"t")
    return p.PROTOCOL_2 + rebuild + kept(arguments + p.REDUCE) + p.STOP


# ---------------------------------------------------------------- objects


def object_item(data_pickle: bytes) -> bytes:
    """The item of an object without tensors, from its pickle (protocol 2, as `dump_plain` makes)."""
    parts = build_archive([*_first_records(data_pickle), _VERSION])
    return b"".join(part for part in parts if isinstance(part, bytes))


def save_object(value: Any, *, where: object = None) -> bytes:
    """What `torch.save(value)` writes for plain values; `torch.load(weights_only=True)` reads it.

    Raises:
        CheckpointError: there is more than dict, list, tuple, str, int, float, bool and None in it.
    """
    return object_item(p.dump_plain(value, where=where))


def load_object(data: bytes, *, where: object) -> Any:
    """The object in an item, or in a file such as `common.pt`, with `Inert` in place of all that is not plain data.

    No code of the pickle runs. Tensors come out as inert calls of `torch._utils._rebuild_tensor_v2`.

    Raises:
        CheckpointError: the bytes are not a `torch.save` archive, or its pickle is malformed.
    """
    archive = Archive(lambda offset, nbytes: data[offset : offset + nbytes], 0, len(data), where=where)
    return p.load_inert(archive.read("data.pkl"), where=where)


# ---------------------------------------------------------------- tensors that someone wrote


@dataclass(frozen=True, slots=True)
class TensorInItem:
    """A tensor as it lies in an item.

    Attributes:
        dtype: safetensors name.
        strides: in elements; not row-major for a view that was saved as it was.
        data_offset: where the first element lies, from the item's start.
        nbytes: number of elements times their size: what lies at `data_offset` if the tensor is contiguous.
        storage_offset: elements of the saved storage that precede the first one.
        storage_nbytes: size of the saved storage, which a view may use in part only.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    data_offset: int
    nbytes: int
    storage_offset: int
    storage_nbytes: int

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in row-major order without holes, so that the data is one run of bytes."""
        wanted = row_major(self.shape)
        return 0 in self.shape or all(
            n == 1 or has == want for n, has, want in zip(self.shape, self.strides, wanted, strict=True)
        )


KnownHeads = dict[int, list[tuple[bytes, TensorInItem]]]
"""Heads that were parsed before, by item length: see `locate_tensor`."""

_REBUILD_V2 = "torch._utils._rebuild_tensor_v2"
_REBUILD_V3 = "torch._utils._rebuild_tensor_v3"
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_FROM_TYPE = ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type")
_TENSOR_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
_TENSOR_GLOBALS = p.known_globals((_REBUILD_V2, _REBUILD_V3, *_PARAMETER, *_FROM_TYPE, *_TENSOR_TYPES, *TORCH_NAMES))


def locate_tensor(
    read_at: ReadAt, offset: int, length: int, *, where: object, known: KnownHeads | None = None
) -> TensorInItem:
    """Find a tensor's data in an item, whatever version of torch from 1.6 on wrote it, without reading the data.

    Args:
        read_at: reads bytes of the file, for example `lambda offset, nbytes: os.pread(fd, nbytes, offset)`.
        offset, length: where the item lies in the file.
        where: the file's name, for messages.
        known: pass one dict for many items: an item that has the length and the head of an earlier one costs one read
            and a comparison. Its tail is then not looked at; nothing in it could change where the data is.

    Raises:
        CheckpointError: corrupt, truncated, not a tensor, big-endian, conjugated, or out of its storage's bounds.
        UnsafeCheckpointError: its pickle names a global that a tensor does not need.
    """
    head = read_at(offset, min(length, Archive.PROBE))
    for earlier, found in known.get(length, ()) if known else ():
        if head.startswith(earlier):
            return found
    here = f"{where}, item at byte {offset}"
    archive = Archive(read_at, offset, length, where=where, head=head)
    if "byteorder" in archive.records and archive.read("byteorder") != b"little":
        raise CheckpointError("a big-endian tensor", where=here, expected="little-endian data")
    pickled = archive.read("data.pkl")
    storage, arguments = _unwrap(p.load_strict(pickled, _TENSOR_GLOBALS, where=here), here)
    record = f"data/{storage.key}"
    start = archive.data_offset(record)
    found = _checked(storage, arguments, start, archive.records[record].nbytes, here)
    # Comparing heads is sound only if the head holds the pickle and all of the header in front of the data.
    if known is not None and archive.data_offset("data.pkl") + len(pickled) <= start <= len(head):
        known.setdefault(length, []).append((head[:start], found))
    return found


def _unwrap(value: Any, here: str) -> tuple[p.StorageRef, tuple[Any, ...]]:
    """Storage and (dtype, storage offset, shape, strides) of a pickled tensor or parameter."""
    for _ in range(3):
        if p.is_call(value, *_PARAMETER) and value.args:
            value = value.args[0]
        elif p.is_call(value, *_FROM_TYPE) and len(value.args) == 4:
            function, _kind, arguments, _state = value.args
            value = function(*arguments) if p.global_name(function) and isinstance(arguments, tuple) else None
    if not (p.is_call(value, _REBUILD_V2, _REBUILD_V3) and len(value.args) >= 6):
        raise CheckpointError(
            "an item that should hold a tensor holds something else", where=here, got=p.describe(value)
        )
    storage, storage_offset, shape, strides = value.args[:4]
    young = value.NAME == _REBUILD_V3
    extras = value.args[7:] if young else value.args[6:]
    if not isinstance(storage, p.StorageRef) or any(extras):
        raise CheckpointError(
            "a tensor with conjugate or negative bit, or without storage", where=here, got=p.describe(value)
        )
    dtype_name = p.global_name(value.args[6]) if young and len(value.args) > 6 else storage.kind
    return storage, (dtype_name, storage_offset, shape, strides)


def _checked(
    storage: p.StorageRef, arguments: tuple[Any, ...], start: int, record_nbytes: int, here: str
) -> TensorInItem:
    dtype_name, storage_offset, shape, strides = arguments
    row = dtype_of_global(dtype_name, where=here)
    unit = 1 if storage.kind in UNTYPED_STORAGES else dtype_of_global(storage.kind, where=here).itemsize
    numbers = (storage_offset, storage.numel, *shape, *strides) if _are_tuples(shape, strides) else (-1,)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(
            "a tensor's geometry is not made of natural numbers", where=here, got=p.describe(arguments)
        )
    storage_nbytes = storage.numel * unit
    last = storage_offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    needed = 0 if 0 in shape else (last + 1) * row.itemsize
    if needed > storage_nbytes or storage_nbytes != record_nbytes:
        raise CheckpointError(
            "a tensor does not fit into its saved storage",
            where=here,
            expected=f"{storage_nbytes} bytes of storage, at least {needed}",
            got=f"{record_nbytes} bytes",
        )
    first = start + storage_offset * row.itemsize
    nbytes = prod(shape) * row.itemsize
    return TensorInItem(row.name, shape, strides, first, nbytes, storage_offset, storage_nbytes)


def _are_tuples(shape: object, strides: object) -> bool:
    return isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)

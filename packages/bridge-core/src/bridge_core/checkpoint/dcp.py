"""What lies where in a torch.distributed.checkpoint folder, from its `.metadata` alone; no tensor data is read.

`.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata` (torch 2.6 to 2.15, same module): what
tensors there are, in which chunks, and for each chunk or object the file, offset and length of its item
(`filesystem._StorageInfo`). megatron-core 0.16 and 0.19 add their save plans (`all_local_plans`), which are not needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from bridge_core.checkpoint import pickles as p
from bridge_core.checkpoint.torch_names import TORCH_NAMES, dtype_of_global
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, UnsafeCheckpointError, preview
from bridge_core.geometry import box_tiling_error

METADATA_FILE = ".metadata"


ChunkBox = tuple[tuple[int, ...], tuple[int, ...]]
"""The region of a tensor that a chunk holds: offsets and sizes, one per dim."""


class DcpChunk(NamedTuple):
    """One chunk of a tensor, and where its item lies: `length` bytes of `file` from byte `offset` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


class DcpObject(NamedTuple):
    """One pickled object, and where its item lies: `length` bytes of `file` from byte `offset` on."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """One tensor: its safetensors dtype, its shape, and the chunks that tile it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[DcpChunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class DcpFolder:
    """A checked folder: every item that is named here lies inside its file."""

    path: Path
    tensors: dict[str, DcpTensor]
    objects: dict[str, DcpObject]

    def read_object_bytes(self, key: str) -> bytes:
        """The bytes of one object's item, for `items.load_object`.

        Raises:
            CheckpointError: there is no such object, or its file has become shorter.
        """
        if (found := self.objects.get(key)) is None:
            raise CheckpointError("no such object in the checkpoint", where=self.path, got=key)
        with open(self.path / found.file, "rb") as file:
            file.seek(found.offset)
            data = file.read(found.length)
        if len(data) != found.length:
            raise CheckpointError(
                "a file has become shorter", where=self.path / found.file, expected=found.length, got=len(data)
            )
        return data


_DCP = "torch.distributed.checkpoint."
# torch up to 2.2 pickled the properties under the name of the sharded tensor's own class.
_OLD_PROPERTIES = "torch.distributed._shard.sharded_tensor.metadata."
_MCORE = "megatron.core.dist_checkpointing.strategies.torch."  # class names of mcore 0.14 and 0.15
_GLOBALS = p.known_globals(
    (
        *(f"{_DCP}metadata.{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
        *(f"{_DCP}metadata.{name}" for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
        *(f"{_DCP}metadata.{name}" for name in ("MetadataIndex", "StorageMeta")),
        *(f"{_DCP}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        _DCP + "filesystem._StorageInfo",
        _DCP + "filesystem._StoragePrefix",
        *(_OLD_PROPERTIES + name for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
        *(_MCORE + name for name in ("MCoreMetadata", "MCoreSavePlan")),
        "torch.serialization._get_layout",
        "builtins.getattr",  # how Python 3.11 pickles a member of an enum; here it is a stand-in like any other
        # The folder's name when it was saved; Python 3.13 moved the classes.
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
        *TORCH_NAMES,
    )
)
_TENSOR, _BYTES = _GLOBALS[_DCP + "metadata.TensorStorageMetadata"], _GLOBALS[_DCP + "metadata.BytesStorageMetadata"]
_CHUNK, _INDEX = _GLOBALS[_DCP + "metadata.ChunkStorageMetadata"], _GLOBALS[_DCP + "metadata.MetadataIndex"]
_STORED = _GLOBALS[_DCP + "filesystem._StorageInfo"]

_Places = dict[tuple[str, tuple[int, ...] | None], DcpObject]


def read_dcp(folder: str | os.PathLike[str]) -> DcpFolder:
    """Read and check the table of contents of a torch_dist folder (`iter_0000000/` of a Megatron checkpoint).

    Raises:
        UnsafeCheckpointError: `.metadata` names foreign code, or a file outside the folder.
        CheckpointError: `.metadata` is missing or malformed, items were transformed (compressed) on saving, a file is
            missing or too short, an item has no entry or an entry no item, or chunks do not tile their tensor.
    """
    root = Path(folder)
    where = root / METADATA_FILE
    entries, stored = _table_of_contents(where)
    places = _places(stored, where)
    tensors: dict[str, DcpTensor] = {}
    objects: dict[str, DcpObject] = {}
    for key, entry in entries.items():
        if not isinstance(key, str):
            raise _malformed(where, key)
        if type(entry) is _TENSOR:
            tensors[key] = _tensor(key, entry, places, where)
        elif type(entry) is _BYTES:
            objects[key] = _take(places, key, None, where)
        else:
            raise _malformed(f"{where}, {key}", entry)
    if places:
        raise CheckpointError(
            "items without an entry in the table of contents",
            where=where,
            got=preview(f"{key} {at}" for key, at in places),
        )
    found = DcpFolder(root, tensors, objects)
    _check_files(found)
    return found


def _table_of_contents(where: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What tensors and objects there are, and where their items lie; as pickled, not checked yet."""
    try:
        raw = where.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            "not a torch_dist checkpoint, or one whose writing did not finish",
            where=where,
            expected=f"a folder with {METADATA_FILE}, *.distcp and metadata.json",
            fix="name the folder iter_XXXXXXX inside the checkpoint",
        ) from error
    metadata = p.load_strict(raw, _GLOBALS, where=where)
    fields = metadata.fields if p.is_call(metadata, _DCP + "metadata.Metadata", _MCORE + "MCoreMetadata") else {}
    entries, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not (isinstance(entries, dict) and isinstance(stored, dict)):
        raise CheckpointError("no table of contents in it", where=where, got=p.describe(metadata))
    return entries, stored


def _places(stored: Mapping[Any, Any], where: Path) -> _Places:
    places: _Places = {}
    checked: set[str] = set()
    for index, info in stored.items():
        at, place = _attributes(index, _INDEX, where), _attributes(info, _STORED, where)
        key, offset = at.get("fqn"), at.get("offset")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not (isinstance(key, str) and isinstance(file, str) and (offset is None or _naturals(offset))):
            raise _malformed(where, (at, place))
        if not (type(start) is int and type(length) is int and start >= 0 and length >= 0):
            raise _malformed(f"{where}, {key}", place)
        if place.get("transform_descriptors"):
            raise CheckpointError(
                "items were transformed when they were written",
                where=f"{where}, {key}",
                got=place["transform_descriptors"],
                fix="save the checkpoint without DCP storage extensions (compression, encryption)",
            )
        if file not in checked:
            _check_inside(file, where)
            checked.add(file)
        if (key, offset) in places:
            raise CheckpointError("two items for the same chunk", where=where, got=f"{key} at {offset}")
        places[key, offset] = DcpObject(file, start, length)
    return places


def _tensor(key: str, entry: p.Inert, places: _Places, where: Path) -> DcpTensor:
    here = f"{where}, {key}"
    fields = _attributes(entry, _TENSOR, here)
    properties, shape, chunks = fields.get("properties"), fields.get("size"), fields.get("chunks")
    if not (isinstance(properties, p.Inert) and _naturals(shape) and isinstance(chunks, list)):
        raise _malformed(here, entry)
    # The state is a tuple (torch's `TensorProperties.__getstate__`): dtype, layout, requires_grad, memory format,
    # pin_memory and, since 2.15, strides. Only the dtype matters: each item tells its own strides.
    state = properties.state
    name = p.global_name(state[0]) if isinstance(state, tuple) and state else None
    located = []
    for chunk in chunks:
        box = _attributes(chunk, _CHUNK, here)
        offsets, sizes = box.get("offsets"), box.get("sizes")
        if not (_naturals(offsets) and _naturals(sizes)):
            raise _malformed(here, chunk)
        located.append(DcpChunk(offsets, sizes, *_take(places, key, offsets, where)))
    check_tiling(shape, [chunk[:2] for chunk in located], where=here)
    return DcpTensor(dtype_of_global(name, where=here).name, shape, tuple(located))


def check_tiling(shape: tuple[int, ...], boxes: Sequence[ChunkBox], *, where: object) -> None:
    """Raise unless the chunks of a tensor cover it exactly once.

    Raises:
        CheckpointError: a chunk has another number of dims or leaves the tensor, two overlap, or elements are missing.
    """
    if error := box_tiling_error(shape, boxes):
        raise CheckpointError(
            "the chunks of a tensor do not tile it",
            where=where,
            expected=f"every element of {shape} in one chunk",
            got=error,
            fix="save the checkpoint again",
        )


def _take(places: _Places, key: str, offsets: tuple[int, ...] | None, where: Path) -> DcpObject:
    if (place := places.pop((key, offsets), None)) is None:
        raise CheckpointError("an entry without an item", where=f"{where}, {key}", expected=f"an item at {offsets}")
    return place


def _attributes(value: Any, kind: type, where: object) -> dict[str, Any]:
    """The attributes of an instance of one of the dataclasses, as its default pickling has them."""
    if type(value) is kind and type(value.state) is dict:
        return value.state
    raise _malformed(where, value)


def _naturals(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and (not value or (set(map(type, value)) == {int} and min(value) >= 0))


def _malformed(where: object, got: object) -> CheckpointError:
    return CheckpointError("a part of the table of contents has an unknown form", where=where, got=p.describe(got))


def _check_inside(file: str, where: Path) -> None:
    # Both notations, because the folder may have been written on another system.
    parts = file.replace("\\", "/").split("/")
    if not file or file.startswith(("/", "\\")) or ":" in parts[0] or ".." in parts or "\0" in file:
        raise UnsafeCheckpointError(
            "an item is said to lie outside the checkpoint's folder", where=where, got=repr(file)
        )


def _check_files(folder: DcpFolder) -> None:
    ends: dict[str, tuple[int, str]] = {}
    chunks = ((key, chunk[2:]) for key, tensor in folder.tensors.items() for chunk in tensor.chunks)
    for key, (file, offset, length) in (*chunks, *folder.objects.items()):
        end = offset + length
        if end > ends.get(file, (-1, ""))[0]:
            ends[file] = (end, key)
    for file, (end, key) in ends.items():
        path = folder.path / file
        if not path.is_file():
            raise CheckpointError(
                "a file of the checkpoint is missing",
                where=path,
                expected=f"at least {end} bytes, for {key}",
                got="nothing",
                fix="copy the file again from where it was written",
            )
        if (size := path.stat().st_size) < end:
            raise CheckpointError(
                "a file of the checkpoint is cut short",
                where=path,
                expected=f"at least {end} bytes, for {key}",
                got=f"{size} bytes",
                fix="copy the file again from where it was written",
            )

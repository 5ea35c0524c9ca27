"""A torch_dist folder laid out by arithmetic before a byte is written, and everything in it but tensor data.

The size of an item depends on its dtype and shape only, so file, offset and length of all items are known from the
plan. Several processes compute the same layout and write their own parts of it, in any order; `.metadata` comes last,
and makes the folder a checkpoint. Its structure is that of `torch/distributed/checkpoint/metadata.py`, in the form
that torch 2.6 to 2.15 read (2.15 accepts tensor properties without its new field `strides`).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from bridge_core.checkpoint import pickles as p
from bridge_core.checkpoint.dcp import METADATA_FILE, DcpChunk, DcpObject, DcpTensor, check_tiling
from bridge_core.checkpoint.dcp import ChunkBox as Box
from bridge_core.checkpoint.items import TensorItem, tensor_item
from bridge_core.checkpoint.zips import ALIGNMENT
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, OutputError

TensorSpec = tuple[str, tuple[int, ...], Sequence[Box]]
"""Safetensors dtype, shape, and the boxes (offsets, sizes) of the chunks."""


class PlacedChunk(NamedTuple):
    """Where one chunk goes: its data fills `nbytes` bytes of `file` from byte `data_offset` on, row-major."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    data_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DcpLayout:
    """All of a folder but its tensor data.

    Attributes:
        files: name and size in bytes of each `.distcp` file.
        tensors, objects: as `read_dcp` will find them.
        payloads: the item of each object.
    """

    files: dict[str, int]
    tensors: dict[str, DcpTensor]
    objects: dict[str, DcpObject]
    payloads: dict[str, bytes]

    def placed(self) -> Iterator[PlacedChunk]:
        """Every chunk with the place of its data, tensor by tensor."""
        for key, tensor in self.tensors.items():
            for offsets, sizes, file, offset, _ in tensor.chunks:
                item = tensor_item(tensor.dtype, sizes)
                yield PlacedChunk(key, offsets, sizes, file, offset + item.data_offset, item.nbytes)

    def frames(self, files: Collection[str] | None = None) -> dict[str, list[tuple[int, bytes]]]:
        """What is to be written besides tensor data, by file: positions and bytes. All files by default."""
        frames: dict[str, list[tuple[int, bytes]]] = {name: [] for name in (self.files if files is None else files)}
        for tensor in self.tensors.values():
            for _, sizes, file, offset, _ in tensor.chunks:
                if file in frames:
                    frames[file] += item_frame(offset, tensor_item(tensor.dtype, sizes))
        for key, place in self.objects.items():
            if place.file in frames:
                frames[place.file].append((place.offset, self.payloads[key]))
        return frames


def item_frame(offset: int, item: TensorItem) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """Position and bytes of an item's head and tail, for an item that starts at byte `offset` of its file."""
    return (offset, item.head), (offset + item.data_offset + item.nbytes, item.tail)


Assign = Callable[[str, int], int]
"""Which file gets which item: `assign(key, chunk number)`; objects have chunk number -1."""


def plan_dcp(
    tensors: Mapping[str, TensorSpec],
    objects: Mapping[str, bytes],
    *,
    files: int = 1,
    assign: Assign | None = None,
) -> DcpLayout:
    """Lay out a folder: file, offset and length of every item, equal wherever it is computed from equal arguments.

    Args:
        tensors: by checkpoint key, in the order in which they will lie in the files.
        objects: items by unique key (`save_object`); they go to the first file unless assigned.
        files: number of files. Without `assign`, each gets a consecutive part of the chunks with about equal bytes.
        assign: number of the file, 0 to `files` - 1, of each item, for example the rank that writes it. File n is
            called `__n_0.distcp`, as DCP names the first file of rank n. A file that gets no item does not exist.

    Raises:
        CheckpointError: boxes do not tile their tensor, a key is used twice, a dtype is unknown, or `assign`
            returns a number outside of the range.
    """
    if twice := tensors.keys() & objects.keys():
        raise CheckpointError("a key names both a tensor and an object", got=min(twice))
    for key, (_, shape, boxes) in tensors.items():
        check_tiling(shape, boxes, where=key)
    choose = assign or _equal_parts(tensors, files)
    ends = [0] * files

    def place(key: str, number: int, length: int) -> tuple[str, int, int]:
        index = choose(key, number)
        if not 0 <= index < files:
            raise CheckpointError(
                "an item is assigned to a file that is not there", where=key, expected=f"0 to {files - 1}", got=index
            )
        # Items start at multiples of 64 bytes so that data is aligned in the file too; readers accept gaps.
        start = -(-ends[index] // ALIGNMENT) * ALIGNMENT
        ends[index] = start + length
        return f"__{index}_0.distcp", start, length

    laid_out = {
        key: DcpTensor(
            dtype,
            shape,
            tuple(
                DcpChunk(*box, *place(key, number, tensor_item(dtype, box[1]).length))
                for number, box in enumerate(boxes)
            ),
        )
        for key, (dtype, shape, boxes) in tensors.items()
    }
    # Equal objects are one item with several entries: a large MoE model has 10,000 empty extra states.
    items: dict[tuple[int, bytes], DcpObject] = {}
    placed_objects: dict[str, DcpObject] = {}
    for key, payload in objects.items():
        file = choose(key, -1)
        if (file, payload) not in items:
            items[file, payload] = DcpObject(*place(key, -1, len(payload)))
        placed_objects[key] = items[file, payload]
    sizes = {f"__{index}_0.distcp": end for index, end in enumerate(ends) if end}
    return DcpLayout(sizes, laid_out, placed_objects, dict(objects))


def _equal_parts(tensors: Mapping[str, TensorSpec], files: int) -> Assign:
    """Consecutive chunks to consecutive files; objects to the first."""
    names = [(key, number) for key, (_, _, boxes) in tensors.items() for number in range(len(boxes))]
    lengths = [tensor_item(dtype, sizes).length for dtype, _, boxes in tensors.values() for _, sizes in boxes]
    before = [0, *accumulate(lengths)]
    cuts = [before[-1] * (index + 1) / files for index in range(files - 1)]
    # The middle of a chunk decides, so that a large chunk does not push all that follow into the last file.
    chosen = {
        name: bisect_right(cuts, start + length / 2)
        for name, start, length in zip(names, before, lengths, strict=False)
    }
    return lambda key, number: chosen.get((key, number), 0)


def write_frames(folder: str | os.PathLike[str], layout: DcpLayout, *, files: Collection[str] | None = None) -> None:
    """Create files of the layout at their full size, with everything but tensor data; the gaps are sparse.

    Args:
        files: names of the files to create; all by default. An existing file keeps the data it has.

    Raises:
        OutputError: the disk refuses.
    """
    for name, parts in layout.frames(files).items():
        _write_file(Path(folder) / name, layout.files[name], parts)


def _write_file(path: Path, size: int, parts: list[tuple[int, bytes]]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, size)
            for offset, part in parts:
                _pwrite_all(fd, part, offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise OutputError("cannot write a checkpoint file", where=path, expected=f"{size} bytes", got=error) from error


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def write_metadata(folder: str | os.PathLike[str], layout: DcpLayout) -> None:
    """Write `.metadata`, replacing any former one in one step: call it when all data is in place.

    Raises:
        OutputError: the disk refuses.
    """
    path = Path(folder) / METADATA_FILE
    partial = path.with_name(METADATA_FILE + ".tmp")
    try:
        partial.write_bytes(metadata_bytes(layout))
        partial.replace(path)
    except OSError as error:
        raise OutputError("cannot write a checkpoint's table of contents", where=path, got=error) from error


# ---------------------------------------------------------------- .metadata

_M = "torch.distributed.checkpoint.metadata."
_REMEMBERED = {
    **{name: p.put_global(_M + name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")},
    **{name: p.put_global(_M + name) for name in ("ChunkStorageMetadata", "TensorProperties", "MetadataIndex")},
    "_StorageInfo": p.put_global("torch.distributed.checkpoint.filesystem._StorageInfo"),
    "torch.Size": p.put_global("torch.Size"),
    "strided": p.put_global("torch.serialization._get_layout") + p.put_tuple([p.put_str("torch.strided")]) + p.REDUCE,
    "contiguous_format": p.put_global(_M + "_MEM_FORMAT_ENCODING") + p.put_ints([0]) + p.REDUCE,
    **{name: p.put_str(name) for name in ("properties", "size", "chunks", "offsets", "sizes")},
    **{name: p.put_str(name) for name in ("fqn", "index", "offset", "relative_path", "length")},
}
_SLOTS = {name: slot for slot, name in enumerate(_REMEMBERED)}
_PROLOGUE = b"".join(value + p.remember(_SLOTS[name]) + p.POP for name, value in _REMEMBERED.items())
_RECALL = {name: p.recall(slot) for name, slot in _SLOTS.items()}


def _instance(cls: str, *flat: bytes) -> bytes:
    """A dataclass instance as protocol 2 has it: made by `__new__`, then given its attributes."""
    return _RECALL[cls] + p.EMPTY_TUPLE + p.NEWOBJ + p.put_dict(flat) + p.BUILD


def metadata_bytes(layout: DcpLayout) -> bytes:
    """The content of `.metadata`.

    `planner_data` is None as in what megatron-core writes: it maps keys to paths in a nested state dict, and the keys
    of a Megatron checkpoint are the state dict. Object entries have no offset, chunks of a tensor carry their number.
    """
    sizes: dict[tuple[int, ...], bytes] = {}

    def put_size(values: tuple[int, ...]) -> bytes:
        if (made := sizes.get(values)) is None:
            made = sizes[values] = _RECALL["torch.Size"] + p.put_tuple([p.put_ints(values)]) + p.REDUCE
        return made

    entries: list[bytes] = []
    stored: list[bytes] = []
    files = {name: p.put_str(name) for name in layout.files}
    properties = {tensor.dtype: _properties(tensor.dtype) for tensor in layout.tensors.values()}
    r = _RECALL
    for key, tensor in layout.tensors.items():
        name = p.put_str(key)
        chunks: list[bytes] = []
        for number, chunk in enumerate(tensor.chunks):
            at = put_size(chunk.offsets)
            chunks.append(_instance("ChunkStorageMetadata", r["offsets"], at, r["sizes"], put_size(chunk.sizes)))
            stored += (_index(name, number, at), _storage_info(files, chunk.file, chunk.offset, chunk.length))
        body = (
            r["properties"],
            properties[tensor.dtype],
            r["size"],
            put_size(tensor.shape),
            r["chunks"],
            p.put_list(chunks),
        )
        entries += (name, _instance("TensorStorageMetadata", *body))
    for key, place in layout.objects.items():
        name = p.put_str(key)
        entries += (name, _RECALL["BytesStorageMetadata"] + p.EMPTY_TUPLE + p.NEWOBJ)
        stored += (_index(name, None, None), _storage_info(files, *place))
    top = _instance(
        "Metadata",
        *(p.put_str("state_dict_metadata"), p.put_dict(entries)),
        *(p.put_str("planner_data"), p.NONE),
        *(p.put_str("storage_data"), p.put_dict(stored)),
        *(p.put_str("storage_meta"), p.NONE),
        *(p.put_str("version"), p.put_str("1.0.0")),  # CURRENT_DCP_VERSION of torch 2.13 to 2.15
    )
    return p.PROTOCOL_2 + _PROLOGUE + top + p.STOP


def _properties(dtype: str) -> bytes:
    state = (
        p.put_global(f"torch.{dtype_of(dtype).torch}"),
        _RECALL["strided"],
        p.FALSE,
        _RECALL["contiguous_format"],
        p.FALSE,
    )
    return _RECALL["TensorProperties"] + p.EMPTY_TUPLE + p.NEWOBJ + p.put_tuple(state) + p.BUILD


def _index(name: bytes, number: int | None, offsets: bytes | None) -> bytes:
    flat = [_RECALL["fqn"], name, _RECALL["index"], p.NONE if number is None else p.put_int(number)]
    if offsets is not None:
        flat += (_RECALL["offset"], offsets)
    return _instance("MetadataIndex", *flat)


def _storage_info(files: Mapping[str, bytes], file: str, offset: int, length: int) -> bytes:
    place = (_RECALL["offset"], p.put_int(offset), _RECALL["length"], p.put_int(length))
    return _instance("_StorageInfo", _RECALL["relative_path"], files[file], *place)

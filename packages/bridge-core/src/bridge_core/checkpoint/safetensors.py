"""safetensors files as names, shapes and byte ranges: headers read and laid out, data left alone.

Format: safetensors 0.8, README "Format": 8 bytes little-endian header length, a JSON header, then the
tensors' bytes one after the other without gaps. Names, shapes and offsets are all that a conversion
needs, so a file is never loaded here; whoever moves the bytes does it by offset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from bridge_core.codecs import Codec
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Shape

# The format's own limit (safetensors 0.8, safetensors/src/tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER = 100_000_000


class Stored(NamedTuple):
    """A contiguous row-major tensor inside a file; `offset` in bytes from the start of the file.

    One with `encoded` is stored quantised: `dtype` is then the one that it is read in, or written from.
    """

    path: str
    offset: int
    dtype: str
    shape: Shape
    encoded: Encoded | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in `dtype`."""
        return prod(self.shape) * dtype_of(self.dtype).itemsize

    @property
    def disk_bytes(self) -> int:
        """Bytes that the tensor takes in files, with its scales."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The tensors as they lie in files: itself, or codes, scales and so on."""
        return (self,) if self.encoded is None else self.encoded.parts


class Encoded(NamedTuple):
    """How a quantised tensor is stored: its codec, its name, and where its parts lie, the codes first."""

    codec: Codec
    weight: str
    parts: tuple[Stored, ...]


class Laid(NamedTuple):
    """A safetensors file that is still to be written: its header and where each tensor goes."""

    name: str
    header: bytes
    tensors: dict[str, tuple[int, str, Shape]]
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str], bytes]:
    """The tensors of one file in the order of their bytes, its `__metadata__`, and its header's bytes.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file; says which and where.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise _corrupt(path, f"a header of at most {min(max(size - 8, 0), MAX_HEADER)} bytes", f"{length}")
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(
            "a checkpoint file is missing",
            where=path,
            expected="a safetensors file",
            got="nothing",
            fix="download the checkpoint again, completely",
        ) from None
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(
            path, "a JSON header of dtypes, shapes and offsets", f"{type(error).__name__}: {error}"
        ) from None
    # An empty tensor shares its offset with the next one, and comes first.
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_tiling(path, ordered, header, start=8 + length, size=size)
    return ordered, metadata, prefix + text


def _stored(path: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    numbers = (begin, end, *entry["shape"])
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{entry!r:.200} has numbers that are none of a tensor")
    dtype = dtype_of(entry["dtype"], where=path).name
    return Stored(str(path), start + begin, dtype, tuple(entry["shape"]))


def _check_tiling(
    path: Path, tensors: Mapping[str, Stored], header: Mapping[str, Any], *, start: int, size: int
) -> None:
    """The format asks that tensors follow one another without gaps and end where the file ends."""
    at = start
    for name, tensor in tensors.items():
        begin, end = (start + offset for offset in header[name]["data_offsets"])
        if begin != at or end - begin != tensor.nbytes:
            raise _corrupt(
                path,
                f"{name} at byte {at}, {tensor.nbytes} bytes of {tensor.dtype}{list(tensor.shape)}",
                f"bytes {begin} to {end}",
            )
        at = end
    if at != size:
        raise CheckpointError(
            "a safetensors file is truncated" if at > size else "a safetensors file has bytes after its last tensor",
            where=path,
            expected=f"{at} bytes, as its header says",
            got=f"{size} bytes",
            fix="download or copy the file again",
        )


def _corrupt(path: Path, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        "a file is not a valid safetensors file",
        where=path,
        expected=expected,
        got=got,
        fix="download or copy the file again",
    )


def lay_out(name: str, tensors: Iterable[tuple[str, str, Shape]], *, metadata: Mapping[str, str] | None = None) -> Laid:
    """Place tensors in a file, byte for byte where safetensors' own writer would put them.

    Tensors are ordered by falling alignment of their dtype, then by name, and the header is padded with
    spaces to a multiple of 8 (safetensors 0.8, safetensors/src/tensor.rs, `prepare`).

    Args:
        name: file name.
        tensors: name, safetensors dtype and shape of each.
        metadata: the file's `__metadata__`; transformers writes and expects `{"format": "pt"}`.
    """
    rank = {dtype: number for number, dtype in enumerate(_WRITE_ORDER)}
    ordered = sorted(tensors, key=lambda tensor: (rank[tensor[1]], tensor[0]))
    return place(name, ordered, metadata=metadata)


def place(name: str, ordered: Iterable[tuple[str, str, Shape]], *, metadata: Mapping[str, str] | None = None) -> Laid:
    """`lay_out` in a given order: how a file is written exactly as its source was."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: dict[str, tuple[int, str, Shape]] = {}
    at = 0
    for tensor, dtype, shape in ordered:
        end = at + prod(shape) * dtype_of(dtype).itemsize
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        relative[tensor] = (at, dtype, shape)
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    placed = {tensor: (len(head) + at, dtype, shape) for tensor, (at, dtype, shape) in relative.items()}
    return Laid(name, head, placed, len(head) + at)


# safetensors sorts by falling order of its `Dtype` enum (0.8, safetensors/src/tensor.rs); only relative order matters.
_WRITE_ORDER = ("F64", "I64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")

"""The zip archives that `torch.save` writes: built with a gap where tensor data goes, and parsed by position.

Records are stored, not compressed, and the data of each starts at a multiple of 64 bytes from the archive's start; an
extra field "FB" in the local header makes the space. Sizes and crc follow the data (flag bit 3). A zip64 end record is
always there, zip64 fields elsewhere only where a 32-bit one would overflow. Sources: PKWARE's APPNOTE 4.3 to 4.5; torch
2.13 `caffe2/serialize/inline_container.cc` (`getPadding`, `PyTorchStreamWriter`) and its miniz 3.0.2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bridge_core.errors import CheckpointError

ALIGNMENT = 64
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch/serialization.py, MAGIC_NUMBER

_MAX32 = 0xFFFFFFFF
_UTF8_NAMES = 0x0800
_SIZES_FOLLOW = 0x0008
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_MADE_BY = 0x031E  # what miniz puts there: Unix, version 3.0
_NEEDS_ZIP64 = 45

ReadAt = Callable[[int, int], bytes]
"""`read_at(offset, nbytes)` returns that many bytes, fewer only at the end of the file."""


def build_archive(records: Iterable[tuple[str, bytes | int]]) -> list[bytes | int]:
    """The bytes of an archive in order; an int stands for a gap of that many bytes.

    A record given as int has a gap in place of its data and a crc of 0. torch's reader does not check crc
    (`torch.serialization.set_crc32_options(False)` writes 0 for all of them), Python's `zipfile` does when it reads
    that record's data.
    """
    parts: list[bytes | int] = []
    central: list[bytes] = []
    position = 0
    for name, payload in records:
        encoded = name.encode()
        size = payload if isinstance(payload, int) else len(payload)
        crc = 0 if isinstance(payload, int) else zlib.crc32(payload)
        wide = size >= _MAX32 or position >= _MAX32
        header = _local_header(encoded, size, position)
        # The data descriptor has 8-byte sizes exactly when the local header has a zip64 field (APPNOTE 4.3.9).
        # An empty record has none (miniz clears the flag).
        descriptor = struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\x07\x08", crc, size, size) if size else b""
        central.append(_central_header(encoded, size, position, crc))
        parts += (header, payload, descriptor)
        position += len(header) + size + len(descriptor)
    directory = b"".join(central)
    parts.append(directory + _end_records(len(central), len(directory), position))
    return parts


def _local_header(name: bytes, size: int, position: int) -> bytes:
    # The stored size is not known yet as far as a local header is concerned: miniz leaves it 0.
    fields = _zip64_fields(sizes=(size, 0) if size >= _MAX32 else (), position=position)
    start = position + _LOCAL.size + len(name) + len(fields) + 4
    padding = -start % ALIGNMENT
    extra = fields + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return _LOCAL.pack(b"PK\x03\x04", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _zip64_fields(*, sizes: tuple[int, ...], position: int) -> bytes:
    values = (*sizes, *((position,) if position >= _MAX32 else ()))
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _central_header(name: bytes, size: int, position: int, crc: int) -> bytes:
    extra = _zip64_fields(sizes=(size, size) if size >= _MAX32 else (), position=position)
    size32, position32 = min(size, _MAX32), min(position, _MAX32)
    lengths = (size32, size32, len(name), len(extra))
    return (
        _CENTRAL.pack(b"PK\x01\x02", 0, 0, _flags(size), 0, 0, 0, crc, *lengths, 0, 0, 0, 0, position32) + name + extra
    )


def _flags(size: int) -> int:
    return _UTF8_NAMES | (_SIZES_FOLLOW if size else 0)


def _end_records(count: int, directory_size: int, directory_position: int) -> bytes:
    end64_position = directory_position + directory_size
    return (
        _END64.pack(
            *(b"PK\x06\x06", _END64.size - 12, _MADE_BY, _NEEDS_ZIP64, 0, 0),
            *(count, count, directory_size, directory_position),
        )
        + _LOCATOR64.pack(b"PK\x06\x07", 0, end64_position, 1)
        + _END.pack(b"PK\x05\x06", 0, 0, count, count, directory_size, min(directory_position, _MAX32), 0)
    )


class Record(NamedTuple):
    """One stored record: where its local header starts and how many bytes of data follow it."""

    header_offset: int
    nbytes: int


class Archive:
    """An archive inside a file, by name of record without the leading folder (`"data.pkl"`, `"data/0"`).

    Offsets are relative to the archive's start. Reads its first and last bytes once and data never, unless asked to.

    Raises:
        CheckpointError: not an uncompressed zip, cut short, or in torch's format from before 1.6.
    """

    PROBE = 1024
    _TAIL = 4096
    _LARGEST = 1 << 28  # more than any pickle or directory; a corrupt size must not make us read tensor data

    def __init__(self, read_at: ReadAt, offset: int, nbytes: int, *, where: object, head: bytes | None = None) -> None:
        self._read_at, self._offset, self._nbytes, self._where = read_at, offset, nbytes, where
        self._head = read_at(offset, min(nbytes, self.PROBE)) if head is None else head
        if not self._head.startswith(b"PK\x03\x04"):
            raise self._not_an_archive()
        self._tail_offset = max(0, nbytes - self._TAIL)
        self._tail = read_at(offset + self._tail_offset, nbytes - self._tail_offset)
        self.records = self._directory()

    def read(self, name: str) -> bytes:
        """The data of one record."""
        return self._slice(self.data_offset(name), self.records[name].nbytes)

    def data_offset(self, name: str) -> int:
        """Where the data of one record starts, from its local header (whose length the directory does not tell)."""
        if (record := self.records.get(name)) is None:
            raise self._corrupt(f"no record {name!r}")
        fields = self._unpack(_LOCAL, record.header_offset, b"PK\x03\x04")
        start = record.header_offset + _LOCAL.size + fields[-2] + fields[-1]
        if start + record.nbytes > self._nbytes:
            raise self._corrupt(f"record {name!r} ends after the archive")
        return start

    def _directory(self) -> dict[str, Record]:
        end = self._unpack(_END, self._nbytes - _END.size, b"PK\x05\x06")
        count, size, position = end[4], end[5], end[6]
        locator_offset = self._nbytes - _END.size - _LOCATOR64.size
        if self._slice(max(0, locator_offset), 4) == b"PK\x06\x07":
            locator = self._unpack(_LOCATOR64, locator_offset, b"PK\x06\x07")
            end64 = self._unpack(_END64, locator[2], b"PK\x06\x06")
            count, size, position = end64[7], end64[8], end64[9]
        directory = self._slice(position, size)
        records: dict[str, Record] = {}
        cursor = 0
        for _ in range(count):
            if len(directory) - cursor < _CENTRAL.size:
                raise self._corrupt("its directory is cut short")
            name, record, cursor = self._entry(directory, cursor)
            if name in records:
                raise self._corrupt(f"two records {name!r}")
            records[name] = record
        return records

    def _entry(self, directory: bytes, cursor: int) -> tuple[str, Record, int]:
        fields = _CENTRAL.unpack_from(directory, cursor)
        name_length, extra_length, comment_length = fields[10:13]
        name_start = cursor + _CENTRAL.size
        extra_start = name_start + name_length
        stop = extra_start + extra_length + comment_length
        name = directory[name_start:extra_start].decode("utf-8", "replace").partition("/")[2]
        if fields[0] != b"PK\x01\x02" or stop > len(directory) or not name:
            raise self._corrupt("its directory has an unreadable entry")
        if fields[4] != 0 or fields[3] & 1:
            raise self._corrupt(f"record {name!r} is compressed or encrypted")
        extra = directory[extra_start : extra_start + extra_length]
        nbytes, stored, position = self._wide(extra, (fields[9], fields[8], fields[16]))
        if nbytes != stored:
            raise self._corrupt(f"record {name!r} has two sizes: {nbytes} and {stored}")
        return name, Record(position, nbytes), stop

    def _wide(self, extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
        """Replace the values that did not fit in 32 bits by those of the zip64 extra field, in its fixed order."""
        if _MAX32 not in values:
            return values
        cursor = 0
        while cursor + 4 <= len(extra):
            tag, length = struct.unpack_from("<HH", extra, cursor)
            if tag == 1:
                body = extra[cursor + 4 : cursor + 4 + length]
                wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
                uncompressed, stored, position = (next(wide, v) if v == _MAX32 else v for v in values)
                return uncompressed, stored, position
            cursor += 4 + length
        return values

    def _unpack(self, fmt: struct.Struct, start: int, signature: bytes) -> tuple:
        raw = self._slice(start, fmt.size)
        if raw[:4] != signature:
            raise self._corrupt(f"no {signature!r} at byte {start} of it")
        return fmt.unpack(raw)

    def _slice(self, start: int, nbytes: int) -> bytes:
        if start < 0 or nbytes < 0 or start + nbytes > self._nbytes or nbytes > self._LARGEST:
            raise self._corrupt(f"bytes {start} to {start + nbytes} of {self._nbytes} are asked for")
        if start + nbytes <= len(self._head):
            return self._head[start : start + nbytes]
        if start >= self._tail_offset:
            raw = self._tail[start - self._tail_offset :][:nbytes]
        else:
            raw = self._read_at(self._offset + start, nbytes)
        if len(raw) != nbytes:
            raise self._corrupt("the file ends inside it")
        return raw

    def _corrupt(self, got: str) -> CheckpointError:
        return CheckpointError(
            "corrupt or truncated torch.save archive",
            where=f"{self._where}, archive at byte {self._offset}, {self._nbytes} bytes",
            expected="a zip archive with all of its records",
            got=got,
            fix="copy the file again from where it was written, and compare sizes",
        )

    def _not_an_archive(self) -> CheckpointError:
        if not self._head.startswith(LEGACY_MAGIC):
            return self._corrupt(f"it starts with {self._head[:8]!r}")
        return CheckpointError(
            "torch.save's format from before torch 1.6 is not read",
            where=f"{self._where}, byte {self._offset}",
            fix="load it with torch and save it again",
        )

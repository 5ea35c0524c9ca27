"""The weight files of a quantised export, each written by one rank: for file systems that several nodes cannot share.

Every rank packs what it holds, as always, and keeps the packed bytes in a temporary file of its own. Then they go to
the ranks that own the files, in rounds of one all-to-all each, whose size is bounded whatever the layout.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bridge_core.checkpoint.files import OpenFiles, create_file, write_all
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.dtypes import dtype_of
from bridge_core.geometry import Piece, runs
from bridge_core.runtime.file_owners import Sent, owners_of
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.words import words_device
from bridge_core.runtime.workers import noticing_loss
from bridge_quant_export.formats.format import Writer
from bridge_quant_export.live.files import PackedFiles
from bridge_quant_export.live.held import Held

_FIELDS = 3
"""Of a run in a message: number of the file, offset in it, length; int64 each."""


class OwnedFiles(PackedFiles):
    """As `PackedFiles`, with one writer for each file.

    Args:
        group: all ranks of the model.
        bucket_bytes: bytes that a rank sends in a round, and at most about those that it receives.
    """

    def __init__(
        self,
        live: LiveModel,
        layout: HfLayout,
        groups: Any,
        held: Held,
        *,
        writer: Writer,
        kv_at_least_one: bool,
        group: Any,
        bucket_bytes: int,
    ) -> None:
        super().__init__(live, layout, groups, held, writer=writer, kv_at_least_one=kv_at_least_one)
        self._group, self._rank = group, group.rank()
        self._owners = owners_of([file.nbytes for file in layout.files], group.size())
        self._numbers = {file.name: number for number, file in enumerate(layout.files)}
        self._limit = max(1, bucket_bytes // group.size())
        self._runs = [array("q") for _ in range(group.size())]  # for each owner: file, offset, length, place in spool
        self._spool: IO[bytes]

    def create(self, folder: Path) -> None:
        """Nothing: the owners make their files themselves."""

    def write(self, folder: Path) -> Sent:
        """Pack what this rank holds, and write the files that it owns. Collective over the group.

        If a rank fails, all stop before anything is sent, or in the next round; that rank raises, the others return.
        """
        with tempfile.TemporaryFile() as spool, ExitStack() as stack:
            self._spool = spool
            files = OpenFiles(stack)
            self.guarded(lambda: self._create(folder))
            try:
                super().write(folder)
            except Exception as error:
                self._failure = error
            rounds, written = self._deliver(folder, files)
        if self._failure is not None:
            raise self._failure
        return Sent(written, self.sent, self.exchanges + rounds, tuple(sorted(self._opened)))

    def put(self, name: str, tensor: Tensor, piece: Piece) -> None:
        """Keep elements of a flat CPU tensor (see `SharedFiles.put`) for the owner of the file."""
        path, offset, dtype = self._places[name]
        data, itemsize = tensor.view(torch.uint8).numpy().data, dtype_of(dtype).itemsize
        number = self._numbers[path.name]
        kept = self._runs[self._owners[number]]
        for at_source, at_target, length in runs(piece):
            part = data[at_source * itemsize : (at_source + length) * itemsize]
            kept.extend((number, offset + at_target * itemsize, len(part), self._spool.tell()))
            self._spool.write(part)
            self.written[name] += len(part)

    def _create(self, folder: Path) -> None:
        self._opened.clear()
        for file, owner in zip(self.layout.files, self._owners, strict=True):
            if owner == self._rank:
                self._opened.add(file.name)
                create_file(folder / file.name, file.nbytes, file.header)

    def _deliver(self, folder: Path, files: OpenFiles) -> tuple[int, int]:
        """Send everything to its owners, and write what comes; rounds, and bytes written. Collective."""
        size, rounds, written = self._group.size(), 0, 0
        device = words_device(self._group)
        at = [0] * size  # of each owner's runs, the next
        left = [0] * size  # of that run, the bytes that have gone
        while True:
            messages = self.guarded(lambda: [self._message(owner, at, left) for owner in range(size)])
            messages = messages or [torch.empty(0, dtype=torch.uint8)] * size
            sizes = [len(message) for message in messages]
            # To each owner: the bytes for it, whether this rank has failed, and whether it has anything to send.
            said = [(nbytes, int(self._failure is not None), int(any(sizes))) for nbytes in sizes]
            told = torch.empty(size, 3, dtype=torch.int64, device=device)
            with noticing_loss():
                dist.all_to_all_single(told, torch.tensor(said, device=device), group=self._group)
                if told[:, 1].any() or not told[:, 2].any():
                    return rounds, written
                coming = told[:, 0].tolist()
                received = torch.empty(sum(coming), dtype=torch.uint8, device=device)
                dist.all_to_all_single(received, torch.cat(messages).to(device), coming, sizes, group=self._group)
            rounds += 1
            self.sent += sum(sizes) - sizes[self._rank]
            parts = received.cpu().split(coming)
            written += self.guarded(lambda parts=parts: self._write_runs(parts, folder, files)) or 0

    def _message(self, owner: int, at: list[int], left: list[int]) -> Tensor:
        """The next runs for an owner, at most about `limit` bytes of them: how many, where each goes, their bytes."""
        kept, heads, bodies, room = self._runs[owner], array("q"), [], self._limit
        while at[owner] < len(kept) and room > 0:
            number, offset, length, place = kept[at[owner] : at[owner] + 4]
            count = min(length - left[owner], room)
            self._spool.seek(place + left[owner])
            bodies.append(self._spool.read(count))
            heads.extend((number, offset + left[owner], count))
            left[owner] += count
            room -= count
            if left[owner] == length:
                at[owner], left[owner] = at[owner] + 4, 0
        if not bodies:
            return torch.empty(0, dtype=torch.uint8)
        data = array("q", [len(bodies)]).tobytes() + heads.tobytes() + b"".join(bodies)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _write_runs(self, messages: Sequence[Tensor], folder: Path, files: OpenFiles) -> int:
        """Write the runs of all messages to this rank's files; bytes written."""
        written = 0
        for message in messages:
            if not len(message):
                continue
            data = message.numpy().data
            (count,) = data[:8].cast("q")
            heads, at = data[8 : 8 * (1 + _FIELDS * count)].cast("q").tolist(), 8 * (1 + _FIELDS * count)
            for number, offset, length in zip(*(heads[field::_FIELDS] for field in range(_FIELDS)), strict=True):
                descriptor = files.descriptor(str(folder / self.layout.files[number].name), write=True)
                written += write_all(descriptor, data[at : at + length], offset)
                at += length
        return written

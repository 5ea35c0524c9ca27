"""Tensors of a checkpoint folder as torch tensors, read when asked for."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.checkpoint.reading import Reader
from bridge_core.geometry import Piece, View, row_major
from bridge_core.runtime.tensors import from_numpy
from bridge_quant_export.folders.open import QuantizedFolder
from bridge_quant_export.formats.packing import unpack


class Values:
    """The tensors of some folders; a context manager that keeps their files open.

    Tensors are copies: the files may go while they stay.
    """

    def __enter__(self) -> Values:
        self._stack = ExitStack()
        self._files = OpenFiles(self._stack)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tensor(self, folder: HfFolder, name: str) -> Tensor:
        """One tensor of an `HfFolder`; a packed weight, where the folder was opened with its codec, dequantised."""
        stored = folder.tensors[name]
        view = View(name, 0, row_major(stored.shape))
        # A reader of its own, whose memory nobody uses again.
        found = Reader(self._files).values(stored, Piece(stored.shape, view, view))
        return from_numpy(found.reshape(-1), stored.dtype).reshape(stored.shape)

    def packed(self, found: QuantizedFolder, module: str) -> dict[str, Tensor]:
        """The tensors of a quantised module, by suffix."""
        return {spec.suffix: self.tensor(found.folder, f"{module}.{spec.suffix}") for spec in found.stored_of(module)}

    def weight(self, found: QuantizedFolder, module: str) -> Tensor:
        """The fp32 values that a quantised module computes with, for inputs that are not scaled first."""
        packed = self.packed(found, module)
        format = found.layers.quantized[module]
        values = unpack(packed, format=format, writer=found.writer, dtype=torch.float32, where=module)
        scale = packed.get("pre_quant_scale")
        return values if scale is None else values * scale.float()

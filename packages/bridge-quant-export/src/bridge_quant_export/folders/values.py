"""Tensors of a checkpoint folder as torch tensors, read when asked for."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from bridge_core.checkpoint.encoded import decode
from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.geometry import whole
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
        if stored.encoded is None:
            found = self._files.array(stored).copy()
        else:
            found = decode(stored, whole(stored.shape), self._files.array)
        return from_numpy(found, stored.dtype).reshape(stored.shape)

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

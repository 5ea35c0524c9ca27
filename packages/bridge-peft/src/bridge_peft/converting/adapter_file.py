"""Writing an adapter folder: the file laid out from names and shapes alone, then filled layer by layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bridge_core.checkpoint.files import create_file, write_all
from bridge_core.checkpoint.safetensors import Laid, lay_out
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError
from bridge_core.runtime.tensors import dtype_name, torch_dtype
from bridge_peft.converting import peft_config
from bridge_peft.converting.bases import Base, Bases
from bridge_peft.converting.hf_adapter import FILE
from bridge_peft.converting.layouts import Module, Target, modules_of, same_module, written
from bridge_peft.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """An adapted Megatron layer: which, the settings of its adapter, and shape and dtype of each whole factor."""

    base: Base
    number: int
    settings: AdapterSettings
    factors: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def name(self) -> str:
        """Its Megatron name."""
        return self.base.named(self.number)

    def meta(self) -> dict[str, Tensor]:
        """Its factors without values."""
        return {
            name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
            for name, (shape, dtype) in self.factors.items()
        }


class AdapterFile:
    """What an export writes: known as a whole before the first factor is.

    Args:
        layers: adapted layers, in the order in which they will be written.
        bases: all layers of the model.
        target: who is to read it.
        dtype: of the tensors; by default each has that of its factors.
        base_model: name or path of the HF model, for the configuration.

    Raises:
        ConfigError: the target cannot hold such an adapter.
    """

    def __init__(
        self, layers: Sequence[Layer], bases: Bases, target: Target, *, dtype: str | None, base_model: str | None
    ) -> None:
        self.layers = list(layers)
        self.target: Target = target
        self._dtype = None if dtype is None else dtype_of(dtype).name
        beside: dict[int, list[Base]] = {}
        for layer in self.layers:
            beside.setdefault(layer.number, []).append(layer.base)
        self._beside = {
            (base.name, number): members
            for number, found in beside.items()
            for members in same_module(found).values()
            for base in members
        }
        modules: list[Module] = []
        self.names: list[tuple[str, str, tuple[int, ...]]] = []
        for layer in self.layers:
            made = self._written(layer, layer.meta())
            modules += made.modules
            self.names += [
                (name, self._dtype or dtype_name(tensor), tuple(tensor.shape)) for name, tensor in made.tensors.items()
            ]
        self.config = peft_config.build(
            modules,
            [layer.settings for layer in self.layers],
            modules_of(bases.all.values()),
            target,
            base_model=base_model,
        )
        self.laid: Laid = lay_out(FILE, self.names, metadata={"format": "pt"})

    def _written(self, layer: Layer, factors: Mapping[str, Tensor]) -> Any:
        siblings = self._beside.get((layer.base.name, layer.number), ())
        return written(layer.base, layer.number, layer.settings, factors, self.target, siblings)

    def tensors(self, layer: Layer, factors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The HF tensors of one layer, contiguous, in the order of `names`.

        Raises:
            CheckpointError: a finite value has none in the dtype asked for.
        """
        for name, tensor in self._written(layer, factors).tensors.items():
            cast = tensor if self._dtype is None else tensor.to(torch_dtype(self._dtype))
            if cast.dtype != tensor.dtype and bool((tensor.isfinite() & ~cast.isfinite()).any()):
                raise CheckpointError(
                    "a finite value would become infinite",
                    where=name,
                    expected=f"values within {self._dtype}",
                    got=f"{float(tensor.abs().max()):g}",
                    fix="choose dtype bf16 or fp32",
                )
            yield name, cast.contiguous()

    def create(self, folder: Path) -> None:
        """Make the file at its full size, with its header."""
        create_file(folder / FILE, self.laid.nbytes, self.laid.header)

    def write(self, folder: Path, layers: Iterable[tuple[Layer, Mapping[str, Tensor]]]) -> int:
        """Fill the file; returns bytes of tensors written."""
        descriptor = os.open(folder / FILE, os.O_RDWR)
        total = 0
        try:
            for layer, factors in layers:
                for name, tensor in self.tensors(layer, factors):
                    data = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
                    total += write_all(descriptor, data, self.laid.tensors[name][0])
        finally:
            os.close(descriptor)
        return total

    def finish(self, folder: Path) -> None:
        """Write the configuration, which makes the folder an adapter."""
        text = json.dumps(self.config, indent=2) + "\n"
        (folder / peft_config.CONFIG).write_text(text, encoding="utf-8")

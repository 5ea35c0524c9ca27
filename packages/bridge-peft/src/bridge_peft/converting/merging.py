"""An adapter folded into the HF model it belongs to, folder to folder: one weight in memory at a time.

The sum is taken in float32, whatever the dtypes: W + scaling * B A, and with DoRA that, each row brought to its
magnitude (Liu et al. 2024, eq. 5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bridge_core.bridge import AutoBridge
from bridge_core.checkpoint.files import write_all
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.checkpoint.hf_output import carried_files, copy_files, create_weight_files, finish_hf_folder
from bridge_core.checkpoint.output import check_apart, check_free, real_path, write_folder
from bridge_core.checkpoint.safetensors import Stored, place
from bridge_core.checkpoint.workers import Alone
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CoverageError
from bridge_core.patterns import fill
from bridge_core.runtime.tensors import torch_dtype
from bridge_peft.converting.bases import Base, Bases, bases_for
from bridge_peft.converting.checkpoint import AdapterCheckpoint, find_checkpoint
from bridge_peft.converting.exclude import warn_changed_base
from bridge_peft.converting.fuse import Pair, take_apart
from bridge_peft.converting.hf_adapter import open_adapter
from bridge_peft.converting.peft_config import CONFIG
from bridge_peft.converting.reading import read_stored
from bridge_peft.converting.report import AdapterReport
from bridge_peft.converting.run_config import NOTHING, ByHand, read_settings
from bridge_peft.dtypes import lora_dtype_name
from bridge_peft.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("F64", "F32", "F16", "BF16")
Adapted = Iterator[tuple[Base, int, AdapterSettings, Mapping[str, "Tensor"]]]


def merge_hf(
    hf_model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    adapter_name: str | None = None,
    dtype: str | None = None,
    by_hand: ByHand = NOTHING,
    overwrite: bool = False,
    durable: bool = False,
) -> AdapterReport:
    """Write an HF model with an adapter folded in.

    Args:
        hf_model: folder of the base, with weights.
        adapter: folder that PEFT saved, or a Megatron adapter checkpoint.
        output: output folder, with the base's files, configuration and tokenizer.
        adapter_name, by_hand: for a Megatron checkpoint, as for `export_adapter_ckpt`.
        dtype: of floating-point tensors; by default each keeps its own.
        overwrite: replace a folder that holds something.
        durable: wait for the disk before the folder gets its name.

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished).
    """
    to = real_path(Path(output))
    check_free(to, overwrite=overwrite)
    for source in (hf_model, adapter):
        check_apart(to, Path(source))
    lora_dtype_name(dtype, where="dtype")
    folder = open_hf(hf_model)
    bases = bases_for(AutoBridge.from_hf_pretrained(hf_model))
    names, updates = _updates(Path(adapter), bases, adapter_name, by_hand)
    if missing := sorted(name for name in names if name not in folder.tensors):
        raise CoverageError(
            "the base lacks weights that the adapter changes",
            where=folder.path,
            expected=missing[0],
            got=f"{len(missing)} missing",
            fix="check that the adapter belongs to this model; one on a tied output layer cannot be merged",
        )
    layout = _layout(folder, None if dtype is None else dtype_of(dtype).name)
    merged = 0

    def write(partial: Path, rank: int, size: int) -> None:
        nonlocal merged
        with _Folder(folder, layout, partial) as files:
            merged = files.merge(updates)
            files.copy(name for name in folder.tensors if name not in names)

    def prepare(partial: Path) -> None:
        create_weight_files(partial, layout)
        copy_files(folder.path, carried_files(folder), partial)

    write_folder(
        to,
        layout.nbytes,
        Alone(),
        prepare,
        write,
        lambda partial: finish_hf_folder(partial, layout, folder.config),
        overwrite=overwrite,
        durable=durable,
    )
    return AdapterReport(
        output=to, layers=merged, tensors=len(folder.tensors), nbytes=layout.tensor_nbytes, read=folder.nbytes
    )


def _updates(path: Path, bases: Bases, name: str | None, by_hand: ByHand) -> tuple[set[str], Adapted]:
    """HF weights that an adapter changes, and its layers one after the other."""
    if (path / CONFIG).is_file():
        adapter = open_adapter(path, bases)
        keys = list(adapter.layers)
        read = ((adapter.layers[key][0], key[1], *adapter.read(*key)) for key in keys)
        return _weights((adapter.layers[key][0], key[1]) for key in keys), read
    folder = find_checkpoint(path)
    checkpoint = AdapterCheckpoint(folder, bases, read_settings(folder, by_hand), name=name)
    if any(layer.settings.changes_base for layer in checkpoint.layers):
        warn_changed_base()
    read = ((layer.base, layer.number, layer.settings, factors) for layer, factors in checkpoint.read())
    return _weights((layer.base, layer.number) for layer in checkpoint.layers), read


def _weights(layers: Iterable[tuple[Base, int]]) -> set[str]:
    return {
        fill(part.name, layer, expert)
        for base, layer in layers
        for part in base.parts
        for expert in range(base.linear.experts if "{expert}" in part.name else 1)
    }


def _layout(folder: HfFolder, dtype: str | None) -> HfLayout:
    """The base's files, with the same tensors in the same order."""
    files = []
    for name, tensors in folder.files.items():
        kept = [folder.tensors[tensor] for tensor in tensors]
        dtypes = [dtype if dtype and stored.dtype in _FLOATS else stored.dtype for stored in kept]
        ordered = [(tensor, kind, stored.shape) for tensor, kind, stored in zip(tensors, dtypes, kept, strict=True)]
        files.append(place(name, ordered, metadata=folder.metadata[name] or None))
    return HfLayout(tuple(files))


class _Folder:
    """The base's weights to read from, and the output's files to write to."""

    def __init__(self, source: HfFolder, layout: HfLayout, output: Path) -> None:
        self._source, self._output = source, output
        self._places = {name: (file.name, *at) for file in layout.files for name, at in file.tensors.items()}
        self._open: dict[tuple[str, int], int] = {}

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *args: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def _descriptor(self, path: str, flags: int) -> int:
        if (path, flags) not in self._open:
            self._open[path, flags] = os.open(path, flags)
        return self._open[path, flags]

    def _read(self, stored: Stored) -> Tensor:
        return read_stored(self._descriptor(stored.path, os.O_RDONLY), stored)

    def _write(self, name: str, tensor: Tensor) -> None:
        file, offset, dtype, _ = self._places[name]
        data = tensor.to(torch_dtype(dtype)).contiguous().view(-1).view(torch.uint8).numpy().data
        write_all(self._descriptor(str(self._output / file), os.O_WRONLY), data, offset)

    def copy(self, names: Iterable[str]) -> None:
        """Weights that stay as they are, but for their dtype."""
        for name in names:
            self._write(name, self._read(self._source.tensors[name]))

    def merge(self, updates: Adapted) -> int:
        """Weights with the adapter folded in; returns how many Megatron layers it has."""
        count = 0
        for base, layer, settings, factors in updates:
            count += 1
            pairs = take_apart(base, settings, factors)
            for number, part in enumerate(base.parts):
                pair = pairs.get(number)
                for expert in range(base.linear.experts if "{expert}" in part.name else 1):
                    name = fill(part.name, layer, expert)
                    weight = self._read(self._source.tensors[name])
                    if pair is not None:
                        chosen = expert if "{expert}" in part.name else None
                        weight = merged_weight(weight, pair, settings, expert=chosen, transposed=part.transposed)
                    self._write(name, weight)
        return count


def merged_weight(
    weight: Tensor, pair: Pair, settings: AdapterSettings, *, expert: int | None = None, transposed: bool = False
) -> Tensor:
    """One HF weight with its adapter folded in, in float32.

    Args:
        weight: as HF stores it: [rows, in], [in, rows], or with all experts in front.
        pair: its factors.
        settings: of the Megatron layer; its scaling counts, whatever rank its parts were joined to.
        expert: whose weight it is, where experts are stored one by one.
        transposed: whether it is stored [in, rows].
    """
    a, b, magnitude = pair.a.float(), pair.b.float(), pair.magnitude
    if expert is not None:
        a, b = a[expert if a.shape[0] > 1 else 0], b[expert if b.shape[0] > 1 else 0]
        magnitude = None if magnitude is None else magnitude[expert]
    whole = weight.float()
    whole = whole.transpose(-1, -2) if transposed else whole
    whole = whole + settings.scaling * (b @ a)
    if magnitude is not None:
        whole = whole * (magnitude.float() / whole.norm(dim=-1)).unsqueeze(-1)
    return whole.transpose(-1, -2) if transposed else whole

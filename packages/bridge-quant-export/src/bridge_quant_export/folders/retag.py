"""From one checkpoint format to the other: names, scales and configuration change, codes stay what they are."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge_core.checkpoint.files import OpenFiles, write_all
from bridge_core.checkpoint.hf_layout import HfLayout, lay_out_files
from bridge_core.checkpoint.hf_output import carried_files, copy_files, create_weight_files, finish_hf_folder
from bridge_core.checkpoint.output import check_apart, write_folder
from bridge_core.checkpoint.workers import Alone
from bridge_core.errors import CheckpointError, preview
from bridge_core.geometry import Shape
from bridge_core.runtime.tensors import dtype_name
from bridge_quant_export.configs import compressed_tensors, modelopt
from bridge_quant_export.folders.open import QuantizedFolder, open_quantized
from bridge_quant_export.folders.values import Values
from bridge_quant_export.formats.format import Writer
from bridge_quant_export.formats.kv_cache import kv_tensor
from bridge_quant_export.formats.packing import recode

_VERSION = "0.47.0"


@dataclass(frozen=True)
class Retagged:
    """What was written: the folder, its format, layers that changed their names or scales, tensors in all."""

    output: Path
    writer: Writer
    layers: int
    tensors: int


def retag(
    path: str | Path,
    output: str | Path,
    *,
    writer: Writer,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> Retagged:
    """Write a quantised checkpoint in the other format. One layer at a time in memory.

    Args:
        path: the folder, which must not contradict itself.
        output: output folder.
        writer: the format to write.
        max_shard_size: bytes per file.
        overwrite: replace a folder that holds something.

    Raises:
        FormatError: no reader takes a format of the checkpoint from this writer.
        CheckpointError: the checkpoint contradicts itself.
    """
    found = open_quantized(path)
    check_apart(Path(output), found.folder.path)
    if found.wrong:
        raise CheckpointError(
            "the checkpoint contradicts itself",
            where=path,
            got=preview(found.wrong),
            fix="export it again; `bridge-quant-export verify` tells all that is wrong",
        )
    quantization, beside = _configurations(found, writer)
    shapes, dtypes = _tensors(found, writer)
    layout = lay_out_files(shapes, dtypes, max_shard_size)

    def prepare(folder: Path) -> None:
        create_weight_files(folder, layout)
        carried = [file for file in carried_files(found.folder) if file.name != modelopt.HF_QUANT_CONFIG]
        copy_files(found.folder.path, carried, folder)

    def finish(folder: Path) -> None:
        if beside is not None:
            text = json.dumps(beside, indent=4) + "\n"
            (folder / modelopt.HF_QUANT_CONFIG).write_text(text, encoding="utf-8")
        finish_hf_folder(folder, layout, found.folder.config, dtype=found.dtype, quantization=quantization)

    write_folder(
        Path(output),
        layout.nbytes,
        Alone(),
        prepare,
        lambda folder, rank, size: _fill(folder, layout, found, writer),
        finish,
        overwrite=overwrite,
    )
    return Retagged(Path(output), writer, len(found.layers.quantized), len(shapes))


def _configurations(found: QuantizedFolder, writer: Writer) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if writer == "compressed-tensors":
        return compressed_tensors.compose(found.layers), None
    producer = (found.folder.config["quantization_config"].get("producer") or {}).get("version", _VERSION)
    return modelopt.compose(found.layers, producer_version=producer)


def _tensors(found: QuantizedFolder, writer: Writer) -> tuple[dict[str, Shape], dict[str, str]]:
    """Names, shapes and dtypes of what will be written, in the order of the source."""
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    done: set[str] = set()
    for name, stored in found.folder.tensors.items():
        module = name.rpartition(".")[0]
        if name in found.kv_scales:
            name, shape = _kv_name(name, writer), (1,)
            shapes[name], dtypes[name] = shape, stored.dtype
        elif module in found.layers.quantized and not name.endswith(".bias"):
            if module not in done:
                done.add(module)
                for spec in found.layers.quantized[module].tensors(writer, found.shapes[module], found.dtype):
                    shapes[f"{module}.{spec.suffix}"], dtypes[f"{module}.{spec.suffix}"] = spec.shape, spec.dtype
        else:
            shapes[name], dtypes[name] = stored.shape, stored.dtype
    return shapes, dtypes


def _kv_name(name: str, writer: Writer) -> str:
    """The name of a KV scale as a writer has it."""
    which = "k" if name.endswith(".k_scale") else "v"
    attention = name.removesuffix(f".{which}_scale").removesuffix(f".{which}_proj")
    return f"{attention}.{kv_tensor(which, writer).suffix}"


def _fill(folder: Path, layout: HfLayout, found: QuantizedFolder, writer: Writer) -> None:
    places = {name: (folder / file.name, at) for file in layout.files for name, at in file.tensors.items()}
    with Values() as values, ExitStack() as stack:
        files = OpenFiles(stack)

        def put(name: str, tensor: Tensor) -> None:
            path, (offset, dtype, shape) = places.pop(name)
            assert (dtype_name(tensor), tuple(tensor.shape)) == (dtype, shape), name
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            write_all(files.descriptor(str(path), write=True), data, offset)

        for module, format in found.layers.quantized.items():
            made = recode(values.packed(found, module), format=format, source=found.writer, target=writer)
            for suffix, tensor in made.items():
                put(f"{module}.{suffix}", tensor)
        for name in found.kv_scales:
            put(_kv_name(name, writer), values.tensor(found.folder, name).reshape(1))
        for name in list(places):
            put(name, values.tensor(found.folder, name))

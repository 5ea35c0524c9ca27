"""Adapters between folders: no model is built, no base weight is read, no GPU is asked for.

Time and memory are the adapter's: of a checkpoint, the table of contents and the adapter's tensors are read, one
layer in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bridge_core.bridge import AutoBridge
from bridge_core.checkpoint.convert import ITERATION
from bridge_core.checkpoint.dcp_layout import DcpLayout, TensorSpec, plan_dcp, write_frames, write_metadata
from bridge_core.checkpoint.files import write_all
from bridge_core.checkpoint.keys import Form, places, written_forms
from bridge_core.checkpoint.megatron_files import megatron_side_files
from bridge_core.checkpoint.megatron_folder import LATEST
from bridge_core.checkpoint.output import check_apart, check_free, real_path, write_folder
from bridge_core.checkpoint.run_config import RUN_CONFIG
from bridge_core.checkpoint.workers import Alone, Workers, jointly
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError
from bridge_core.runtime.tensors import dtype_name, torch_dtype
from bridge_peft.converting import peft_config
from bridge_peft.converting.adapter_file import AdapterFile, Layer
from bridge_peft.converting.bases import Bases, bases_for
from bridge_peft.converting.checkpoint import AdapterCheckpoint, find_checkpoint
from bridge_peft.converting.exclude import warn_changed_base, warn_unused
from bridge_peft.converting.hf_adapter import HfAdapter, open_adapter
from bridge_peft.converting.layouts import check_target
from bridge_peft.converting.report import AdapterReport
from bridge_peft.converting.run_config import NOTHING, ByHand, read_settings, write_settings
from bridge_peft.dtypes import lora_dtype_name
from bridge_peft.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor

ALONE = Alone()


def export_adapter_ckpt(
    adapter_ckpt: str | Path,
    hf_dir: str | Path,
    hf_model: AutoBridge | str | Path | None = None,
    *,
    adapter_name: str | None = None,
    dtype: str | None = None,
    target: str = "peft",
    by_hand: ByHand = NOTHING,
    base_model: str | None = None,
    exclude_adapter_base_prefix: Sequence[str] = (),
    padded_vocab: int | None = None,
    overwrite: bool = False,
    durable: bool = False,
    workers: Workers = ALONE,
) -> AdapterReport:
    """Convert a Megatron adapter checkpoint to an HF adapter folder, offline.

    Args:
        adapter_ckpt: folder of a run (its latest iteration is taken) or of one iteration, written by this library or
            by Megatron-Bridge, at any layout.
        hf_dir: output folder; gets `adapter_model.safetensors` and `adapter_config.json`.
        hf_model: bridge, folder or config.json of the base; may be left out where the checkpoint knows.
        adapter_name: which adapter; may be left out where there is only one.
        dtype: `"fp32"`, `"fp16"`, `"bf16"`; by default factors keep theirs.
        target: who is to read it: `"peft"`, `"peft-target-parameters"`, `"vllm"`, `"sglang"`; see `layouts`.
        by_hand: settings of the adapter, where the checkpoint does not say them or says them wrong.
        base_model: name or path of the base, for the configuration; by default that of `hf_model`.
        exclude_adapter_base_prefix: beginnings of Megatron names to leave out, such as `"mtp."`, before they are
            looked up in the model.
        padded_vocab: rows of Megatron's vocabulary, for an adapter on the output layer.
        overwrite: replace a folder that holds something.
        durable: wait for the disk before the folder gets its name.
        workers: processes that share the work; each does an equal part of the layers.

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished).
    """

    def look() -> tuple[Path, AdapterCheckpoint, AdapterFile]:
        output = _free(Path(hf_dir), overwrite=overwrite)
        layout = check_target(target)
        lora_dtype_name(dtype, where="dtype")
        folder = find_checkpoint(adapter_ckpt)
        check_apart(output, Path(adapter_ckpt))
        said = read_settings(folder, by_hand)
        bridge = bridge_of(hf_model, said.hf_config, where=folder)
        bases = bases_for(bridge, padded_vocab=padded_vocab)
        checkpoint = AdapterCheckpoint(folder, bases, said, name=adapter_name, exclude=exclude_adapter_base_prefix)
        name = base_model or name_of(bridge)
        return output, checkpoint, AdapterFile(checkpoint.layers, bases, layout, dtype=dtype, base_model=name)

    output, checkpoint, file = jointly(workers, look)
    if workers.rank == 0:
        warn_unused(exclude_adapter_base_prefix, checkpoint.excluded)
        if any(layer.settings.changes_base for layer in checkpoint.layers):
            warn_changed_base()
    write_folder(
        output,
        file.laid.nbytes,
        workers,
        file.create,
        lambda folder, rank, size: file.write(folder, checkpoint.read(checkpoint.layers[rank::size])),
        file.finish,
        overwrite=overwrite,
        durable=durable,
    )
    return AdapterReport(
        output=output,
        layers=len(checkpoint.layers),
        tensors=len(file.names),
        nbytes=file.laid.nbytes - len(file.laid.header),
        read=checkpoint.read_nbytes,
        left_out=tuple(sorted(checkpoint.excluded)),
    )


def import_adapter_ckpt(
    hf_adapter: str | Path,
    megatron_dir: str | Path,
    hf_model: AutoBridge | str | Path | None = None,
    *,
    adapter_name: str = "default",
    dtype: str | None = None,
    canonical: bool = False,
    padded_vocab: int | None = None,
    overwrite: bool = False,
    durable: bool = False,
    workers: Workers = ALONE,
) -> AdapterReport:
    """Convert an HF adapter folder to a Megatron adapter checkpoint, offline; it loads at any layout.

    Where q, k, v (or gate, up) have different A factors, the fused layer gets their ranks side by side, which is
    exact, or one pair for each with `canonical`.

    Args:
        hf_adapter: folder that PEFT saved.
        megatron_dir: output; gets `iter_0000000/` and `latest_checkpointed_iteration.txt`.
        hf_model: bridge, folder or config.json of the base; by default the folder that the adapter names.
        adapter_name: what it is called in the checkpoint.
        dtype: of the factors; by default that of the file.
        canonical: keep the parts of fused layers apart.
        padded_vocab: rows of Megatron's vocabulary, for an adapter on the output layer.
        overwrite: replace a folder that holds something.
        durable: wait for the disk before the folder gets its name.
        workers: processes that share the work; each does an equal part of the layers.

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished).
    """

    def look() -> _Import:
        output = _free(Path(megatron_dir), overwrite=overwrite)
        check_apart(output, Path(hf_adapter))
        lora_dtype_name(dtype, where="dtype")
        bridge = bridge_of(hf_model, None, where=hf_adapter, named_by=hf_adapter)
        bases = bases_for(bridge, padded_vocab=padded_vocab)
        adapter = open_adapter(hf_adapter, bases)
        return _Import(output, bridge, adapter, bases, adapter_name, canonical=canonical, dtype=dtype)

    found = jointly(workers, look)
    write_folder(
        found.output,
        sum(found.laid.files.values()),
        workers,
        found.prepare,
        found.write,
        found.finish,
        overwrite=overwrite,
        durable=durable,
    )
    return AdapterReport(
        output=found.output,
        layers=len(found.layers),
        tensors=len(found.laid.tensors),
        nbytes=sum(chunk.nbytes for chunk in found.laid.placed()),
        read=sum(stored.nbytes for stored in found.adapter.stored.values()),
    )


class _Import:
    """What an import writes, known as a whole before a file is made.

    Which ranks a fused layer gets is known only from values: every layer is looked at before any is written.
    """

    def __init__(
        self,
        output: Path,
        bridge: AutoBridge,
        adapter: HfAdapter,
        bases: Bases,
        name: str,
        *,
        canonical: bool,
        dtype: str | None,
    ) -> None:
        self.output, self.adapter = output, adapter
        self._bridge, self._name, self._canonical = bridge, name, canonical
        self.layers = [_layer(adapter, key, canonical, dtype) for key in adapter.layers]
        self._keys = {layer.name: _keys(layer, bases, name) for layer in self.layers}
        specs: dict[str, TensorSpec] = {
            self._keys[layer.name][factor]: (dtype, shape, [((0,) * len(shape), shape)])
            for layer in self.layers
            for factor, (shape, dtype) in layer.factors.items()
        }
        self.laid = plan_dcp(specs, {})

    def prepare(self, folder: Path) -> None:
        (folder / ITERATION).mkdir()
        write_frames(folder / ITERATION, self.laid)

    def write(self, folder: Path, rank: int, size: int) -> None:
        _write_values(folder / ITERATION, self.laid, self._values(self.layers[rank::size]))

    def finish(self, folder: Path) -> None:
        settings = {self._name: {layer.name: layer.settings for layer in self.layers}}
        write_side_files(folder / ITERATION, settings, self._bridge.config)
        write_metadata(folder / ITERATION, self.laid)
        (folder / LATEST).write_text("0", encoding="utf-8")

    def _values(self, mine: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
        for layer in mine:
            _, factors = self.adapter.read(layer.base.name, layer.number, canonical=self._canonical)
            for factor, (_, dtype) in layer.factors.items():
                yield self._keys[layer.name][factor], factors[factor].to(torch_dtype(dtype)).contiguous()


def bridge_of(
    hf_model: AutoBridge | str | Path | None,
    hf_config: Mapping[str, Any] | None,
    *,
    where: object,
    named_by: str | Path | None = None,
) -> AutoBridge:
    """The bridge of the base model: as given, or as the checkpoint or the adapter says.

    Raises:
        ConfigError: nobody says which model it is.
    """
    if isinstance(hf_model, AutoBridge):
        return hf_model
    if hf_model is not None:
        return AutoBridge.from_hf_pretrained(hf_model)
    if hf_config is not None:
        return AutoBridge.from_hf_config(hf_config)
    named = None
    if named_by is not None:
        named = peft_config.read(Path(named_by)).base_model
        if named and (Path(named) / "config.json").is_file():
            return AutoBridge.from_hf_pretrained(named)
    raise ConfigError(
        "nothing says which model the adapter belongs to",
        where=where,
        expected="a folder with config.json",
        got=f"the name {named!r}, which is no folder here" if named else "nothing",
        fix="pass the HF model's folder, or its config.json: hf_model (--hf-model)",
    )


def name_of(bridge: AutoBridge) -> str | None:
    """What adapter_config.json calls the base model."""
    return str(bridge.path) if bridge.path else bridge.config.get("_name_or_path") or None


def _free(path: Path, *, overwrite: bool) -> Path:
    check_free(path, overwrite=overwrite)
    return real_path(path)


def _layer(adapter: HfAdapter, key: tuple[str, int], canonical: bool, dtype: str | None) -> Layer:
    settings, factors = adapter.read(*key, canonical=canonical)
    wanted = None if dtype is None else dtype_of(dtype).name
    found = {name: (tuple(value.shape), wanted or dtype_name(value)) for name, value in factors.items()}
    return Layer(adapter.layers[key][0], key[1], settings, found)


def _keys(layer: Layer, bases: Bases, name: str) -> dict[str, str]:
    """Checkpoint key of each factor, as `bridge_peft.sharded` has them."""
    form = written_forms(bases.plan.entries)[layer.base.entry.block]
    stem = next(places(layer.base.entry, form, layer.number, 0)).key.partition(".weight")[0]
    number = f"layers.{layer.number}." if layer.base.entry.has_layer and form is Form.STACKED else ""
    return {factor: f"{stem}.adapter.{name}.{number}{factor}" for factor in layer.factors}


def write_side_files(
    folder: Path, adapters: Mapping[str, Mapping[str, AdapterSettings]], hf_config: Mapping[str, Any] | None
) -> None:
    """What lies beside the tensors of an adapter checkpoint: mcore's files, and the settings."""
    for name, data in megatron_side_files({"iteration": 0, "checkpoint_version": 3.0}).items():
        (folder / name).write_bytes(data)
    (folder / RUN_CONFIG).write_text(write_settings(adapters, hf_config), encoding="utf-8")


def _write_values(folder: Path, laid: DcpLayout, values: Iterator[tuple[str, Tensor]]) -> None:
    placed = {chunk.key: chunk for chunk in laid.placed()}
    descriptors = {name: os.open(folder / name, os.O_WRONLY) for name in laid.files}
    try:
        for key, tensor in values:
            chunk = placed[key]
            write_all(descriptors[chunk.file], tensor.view(-1).view(torch.uint8).numpy().data, chunk.data_offset)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)

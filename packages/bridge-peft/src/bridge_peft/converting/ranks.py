"""Adapters of a live model to an HF folder or as a stream, and back. Collective, at any layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bridge_core.bridge import AutoBridge
from bridge_core.checkpoint.output import check_free, real_path, write_folder
from bridge_core.checkpoint.workers import jointly
from bridge_core.runtime.agreement import check_size
from bridge_core.runtime.homes import unwrap
from bridge_core.runtime.words import default_group
from bridge_core.runtime.workers import TorchWorkers, WorkerError
from bridge_peft.apply import LoraReport, apply_lora
from bridge_peft.config import LoraConfig
from bridge_peft.converting.adapter_file import AdapterFile, Layer
from bridge_peft.converting.bases import Bases, bases_for
from bridge_peft.converting.exclude import warn_changed_base, warn_unused
from bridge_peft.converting.gather import Held, Share
from bridge_peft.converting.hf_adapter import HfAdapter, open_adapter
from bridge_peft.converting.layouts import Target, check_target
from bridge_peft.converting.offline import name_of
from bridge_peft.converting.report import AdapterReport
from bridge_peft.dtypes import lora_dtype_name
from bridge_peft.layers.attach import adapters_of
from bridge_peft.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor

_BUCKET = 256 * 1024 * 1024


def bases_of(bridge: AutoBridge, model: Any, group: Any) -> Bases:
    """The layers of a live model, with the rows that its vocabulary is padded to. Collective over `group`."""
    check_size(model, None, group)
    rows = [bridge.fields["vocab_size"]]
    for chunk in unwrap(model):
        embedding = getattr(getattr(chunk, "embedding", None), "word_embeddings", None)
        for layer in (getattr(chunk, "output_layer", None), embedding):
            rows += [getattr(layer, "output_size", None) or getattr(layer, "num_embeddings", None) or 0]
    workers = TorchWorkers(group)
    padded = max(workers.share(max(rows)))  # a stage in the middle has no vocabulary
    return jointly(workers, lambda: bases_for(bridge, padded_vocab=padded))


def save_hf_adapter(
    model: Any,
    path: str | Path,
    bridge: AutoBridge,
    *,
    adapter_name: str = "default",
    dtype: str | None = None,
    target: str = "peft",
    base_model: str | None = None,
    exclude_adapter_base_prefix: Sequence[str] = (),
    overwrite: bool = False,
    durable: bool = False,
    bucket_bytes: int = _BUCKET,
    group: Any = None,
) -> AdapterReport:
    """Write an adapter of a live model as an HF folder: the same bytes whatever the layout. Collective over `group`.

    Rank 0 of the group writes; factors travel to it in buckets. The folder gets its name last, so a save that fails
    leaves nothing that looks finished.

    Args:
        model: an adapted model or its chunks, wrapped or not, on CPU or GPU.
        path: output folder; gets `adapter_model.safetensors` and `adapter_config.json`.
        bridge: of the HF model that the base came from.
        adapter_name: which of its adapters.
        dtype: `"fp32"`, `"fp16"`, `"bf16"`; by default factors keep theirs.
        target: who is to read it: `"peft"`, `"peft-target-parameters"`, `"vllm"`, `"sglang"`; see `layouts`.
        base_model: name or path of the HF model, for the configuration; by default the bridge's folder.
        exclude_adapter_base_prefix: beginnings of Megatron names to leave out, such as `"mtp."`.
        overwrite: replace a folder that holds something.
        durable: wait for the disk before the folder gets its name.
        bucket_bytes: of factors that travel at a time.
        group: all ranks of the model; by default torch's default group.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    group = group or default_group()
    workers = TorchWorkers(group)
    output = real_path(Path(path))
    workers.together(lambda: check_free(output, overwrite=overwrite))
    held, file = _laid_out(
        model, bridge, adapter_name, dtype, target, base_model or name_of(bridge), exclude_adapter_base_prefix, group
    )
    write_folder(
        output,
        file.laid.nbytes,
        workers,
        file.create,
        lambda folder, rank, size: _write(file, folder, held.whole(bucket_bytes, to=0), rank),
        file.finish,
        overwrite=overwrite,
        durable=durable,
    )
    return AdapterReport(
        output=output,
        layers=len(held.layers),
        tensors=len(file.names),
        nbytes=file.laid.nbytes - len(file.laid.header),
        left_out=tuple(sorted(held.excluded)),
    )


def _laid_out(
    model: Any,
    bridge: AutoBridge,
    adapter_name: str,
    dtype: str | None,
    target: str,
    base_model: str | None,
    exclude: Sequence[str],
    group: Any,
) -> tuple[Held, AdapterFile]:
    """What this rank holds of an adapter, and the file that all of it makes. Collective."""
    workers = TorchWorkers(group)

    def check() -> Target:
        lora_dtype_name(dtype, where="dtype")
        return check_target(target)

    layout = jointly(workers, check)
    bases = bases_of(bridge, model, group)
    held = Held(model, bases, adapter_name, exclude=exclude, group=group)
    file = jointly(workers, lambda: AdapterFile(held.layers, bases, layout, dtype=dtype, base_model=base_model))
    if workers.rank == 0:
        warn_unused(exclude, held.excluded)
        if any(layer.settings.changes_base for layer in held.layers):
            warn_changed_base()
    return held, file


def _write(file: AdapterFile, folder: Path, whole: Iterator[tuple[Layer, dict[str, Tensor]]], rank: int) -> None:
    """Write the file on the first rank. All ranks take every layer, also after an error.

    Where another rank could not give its share, that one raises, and this one hears of it when the filling ends.
    """
    try:
        try:
            if rank == 0:
                file.write(folder, whole)
        finally:
            for _ in whole:  # the others still expect this rank's share of every sum
                pass
    except WorkerError as error:
        if error.worker is None:  # lost: nobody will say so
            raise


def export_adapter_weights(
    model: Any,
    bridge: AutoBridge,
    *,
    adapter_name: str = "default",
    dtype: str | None = None,
    target: str = "peft",
    cpu: bool = False,
    exclude_adapter_base_prefix: Sequence[str] = (),
    bucket_bytes: int = _BUCKET,
    group: Any = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every HF tensor of an adapter of a live model as (name, tensor), in one order on all ranks.

    Collective over `group` and lazy: all ranks iterate to the end.

    Args:
        cpu: give tensors in host memory.
        model, bridge, adapter_name, dtype, target, exclude_adapter_base_prefix, bucket_bytes, group: as for
            `save_hf_adapter`.
    """
    group = group or default_group()
    held, file = _laid_out(model, bridge, adapter_name, dtype, target, None, exclude_adapter_base_prefix, group)
    for layer, factors in held.whole(bucket_bytes):
        for name, tensor in file.tensors(layer, factors):
            yield name, tensor.cpu() if cpu else tensor


def load_hf_adapter(
    model: Any,
    path: str | Path,
    bridge: AutoBridge,
    *,
    adapter_name: str = "default",
    canonical: bool = False,
    lora_dtype: Any = None,
    groups: Any = None,
    group: Any = None,
) -> LoraReport:
    """Put an HF adapter on a live model: `apply_lora` with its settings, then its values. Collective over `group`.

    Where q, k, v (or gate, up) have different A factors, the fused layer gets their ranks side by side, which is
    exact, or one pair for each with `canonical`.

    Args:
        model: a model without DDP, or its chunks.
        path: folder with `adapter_config.json` and `adapter_model.safetensors`; all ranks must see it.
        bridge: of the HF model.
        adapter_name: what it is called on the model.
        canonical: keep the parts of fused layers apart.
        lora_dtype: of the factors; by default that of the file.
        groups: the model's process groups; by default those it was built with.
        group: all ranks of the model; by default torch's default group.

    Raises:
        BridgeError: on every rank; the model is then as it was before.
    """
    group = group or default_group()
    workers = TorchWorkers(group)
    bases = bases_of(bridge, model, group)
    adapter = jointly(workers, lambda: open_adapter(path, bases))
    settings, dtype = _agreed_settings(adapter, canonical, workers)
    config = jointly(workers, lambda: _lora_config(settings, lora_dtype or dtype))
    report = jointly(workers, lambda: apply_lora(model, config, groups, adapter_name=adapter_name))
    jointly(workers, lambda: _fill(model, adapter, bases, adapter_name, canonical))
    return report


def _agreed_settings(
    adapter: HfAdapter, canonical: bool, workers: TorchWorkers
) -> tuple[dict[str, AdapterSettings], str]:
    """Settings of every layer, by name; ranks look at an equal share of them each. Collective."""
    order = list(adapter.layers)[workers.rank :: workers.size]

    def look() -> list[tuple[str, dict[str, Any], str]]:
        found = []
        for name, layer in order:
            settings, factors = adapter.read(name, layer, canonical=canonical)
            dtype = str(next(iter(factors.values())).dtype)
            found.append((adapter.layers[name, layer][0].named(layer), settings.to_dict(), dtype))
        return found

    said = workers.share(jointly(workers, look))
    both = {name: (settings, dtype) for theirs in said for name, settings, dtype in theirs}
    dtypes = {dtype for _, dtype in both.values()}
    settings = {name: AdapterSettings.from_dict(both[name][0], where=name) for name in sorted(both)}
    return settings, "fp32" if len(dtypes) > 1 else dtypes.pop()


def _lora_config(settings: dict[str, AdapterSettings], dtype: Any) -> LoraConfig:
    """The configuration that adapts exactly these layers, with these settings."""
    some = next(iter(settings.values()))
    canonical = any(one.parts for one in settings.values())
    leaves = {"q": "linear_q", "k": "linear_k", "v": "linear_v", "gate": "linear_fc1_gate", "up": "linear_fc1_up"}
    targets: list[str] = []
    for name, one in settings.items():
        stem = name.rpartition(".")[0]
        targets += [f"{stem}.{leaves[part]}" for part in one.parts] or [name]
    return LoraConfig(
        r=some.r,
        lora_alpha=some.alpha,
        target_modules=targets,
        lora_dropout=some.dropout,
        use_rslora=some.rslora,
        use_dora=some.dora,
        rank_pattern={re.escape(name): one.r for name, one in settings.items() if one.r != some.r},
        alpha_pattern={re.escape(name): one.alpha for name, one in settings.items() if one.alpha != some.alpha},
        lora_dtype=dtype,
        variant="canonical" if canonical else "lora",
    )


def _fill(model: Any, adapter: HfAdapter, bases: Bases, name: str, canonical: bool) -> None:
    """Copy this rank's shares out of the file, layer by layer."""
    by_layer: dict[tuple[str, int], list[Any]] = {}
    for chunk in unwrap(model):
        for _, adapters in adapters_of(chunk):
            if name in adapters:
                base, layer, _ = bases.find(adapters.site.name)
                by_layer.setdefault((base.name, layer or 0), []).append(adapters[name])
    with torch.no_grad():
        for (base_name, layer), members in by_layer.items():
            _, factors = adapter.read(base_name, layer, canonical=canonical)
            for member in members:
                for key in member.factors:
                    for whole, own in Share(member, key).regions(factors[key]):
                        own.copy_(whole)

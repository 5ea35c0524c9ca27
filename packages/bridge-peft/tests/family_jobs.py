"""Jobs for the pool of ranks: adapters on models of any family, recurrent and prediction layers too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from convert_jobs import fill


@contextmanager
def family(path: str, layout: dict[str, Any], ignore: tuple[str, ...]) -> Iterator[tuple[Any, Any, Any]]:
    """Bridge, groups and chunks of an HF model on the CPU, with its weights; Mamba layers are built but cannot run."""
    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mamba import mamba_layers
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path, ignore=ignore)
    with host_backend(), mamba_layers():
        _, pg, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
        bridge.load_hf_weights(chunks)
        yield bridge, pg, chunks


def export(
    path: str,
    layout: dict[str, Any],
    lora: dict[str, Any],
    outs: dict[str, str],
    *,
    run: str | None = None,
    tokens: Any = None,
    ignore: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> dict[str, Any]:
    """An export for each target, a checkpoint, logits: what each wrote, or the text of its error."""
    import torch

    from bridge_core.errors import BridgeError
    from bridge_core.testing.mcore_jobs import forward
    from bridge_peft import LoraConfig, apply_lora, save_adapter_ckpt, save_hf_adapter

    with family(path, layout, ignore) as (bridge, pg, chunks):
        report = apply_lora(chunks, LoraConfig(**lora), pg)
        fill(chunks)
        found: dict[str, Any] = {"names": [one.name for one in report.adapted], "tp": pg.tp.rank(), "logits": None}
        for target, out in outs.items():
            try:
                save_hf_adapter(chunks, out, bridge, target=target, exclude_adapter_base_prefix=exclude)
            except BridgeError as error:
                found[target] = str(error)
        if run is not None:
            save_adapter_ckpt(chunks, run, bridge)
        if tokens is not None:
            with torch.no_grad():
                found["logits"] = forward([chunk.eval() for chunk in chunks], pg, tokens)
    return found


def refused(path: str, layout: dict[str, Any], lora: dict[str, Any]) -> tuple[str, bool]:
    """The error of `apply_lora`, and whether the model is as it was."""
    from bridge_core.errors import BridgeError
    from bridge_peft import LoraConfig, apply_lora

    with family(path, layout, ()) as (_, pg, chunks):
        names = [list(chunk.state_dict()) for chunk in chunks]
        try:
            apply_lora(chunks, LoraConfig(**lora), pg)
        except BridgeError as error:
            same = names == [list(chunk.state_dict()) for chunk in chunks]
            return str(error), same and all(p.requires_grad for chunk in chunks for p in chunk.parameters())
        return "", False


def devices(path: str, lora: dict[str, Any]) -> dict[str, str]:
    """The devices of factors, by name, of adapters on a model that was moved to the meta device before."""
    from bridge_peft import LoraConfig, apply_lora

    with family(path, {}, ()) as (_, pg, chunks):
        moved = [chunk.to("meta") for chunk in chunks]
        apply_lora(moved, LoraConfig(**lora), pg)
        return {name: p.device.type for chunk in moved for name, p in chunk.named_parameters() if ".adapter." in name}


def merge(path: str, lora: dict[str, Any]) -> list[str]:
    """The errors of all ways to merge."""
    from bridge_core.errors import BridgeError
    from bridge_peft import LoraConfig, apply_lora, merge_adapters, merged_weights

    found = []
    with family(path, {}, ()) as (_, pg, chunks):
        apply_lora(chunks, LoraConfig(**lora), pg)
        fill(chunks)
        for call in (lambda: list(merged_weights(chunks)), lambda: merge_adapters(chunks)):
            try:
                call()
                found.append("")
            except BridgeError as error:
                found.append(str(error))
    return found

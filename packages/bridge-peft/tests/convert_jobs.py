"""Jobs for the pool of ranks: HF models with adapters, exported and imported at any layout."""

from __future__ import annotations

import hashlib
from typing import Any


def adapted(path: str, layout: dict[str, Any], lora: dict[str, Any] | None, *, spec: str = "host"):
    """Bridge, groups and chunks of an HF model with adapters whose values depend on names alone."""
    from bridge_core import AutoBridge
    from bridge_core.testing.mcore_jobs import build
    from bridge_peft import LoraConfig, apply_lora

    bridge = AutoBridge.from_hf_pretrained(path)
    _, pg, chunks = build(bridge.fields, layout, spec=spec, vocab_divisible_by=16)
    bridge.load_hf_weights(chunks)
    if lora is not None:
        apply_lora(chunks, LoraConfig(**lora), pg)
        fill(chunks)
    return bridge, pg, chunks


def fill(chunks, name: str = "default") -> None:
    """Distinct values in every factor, the same for a whole factor however it is cut; magnitudes stay near theirs."""
    import torch

    from bridge_core.runtime.homes import unwrap
    from bridge_peft.converting.gather import Share
    from bridge_peft.layers.attach import adapters_of

    with torch.no_grad():
        for chunk in unwrap(chunks):
            for _, adapters in adapters_of(chunk):
                adapter = adapters[name]
                for key, factor in adapter.factors.items():
                    digest = hashlib.sha256(f"{adapter.site.name}|{key}".encode()).digest()
                    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                    size = 0.1 if key.startswith("lora_m") else 0.4
                    whole = (torch.rand(factor.shape, generator=generator) - 0.5) * size
                    whole = whole + 1.0 if key.startswith("lora_m") else whole
                    for source, target in Share(adapter, key).regions(whole):
                        target.copy_(source)


def export(path: str, layout: dict[str, Any], lora: dict[str, Any], outs: dict[str, str], tokens, *, spec="host"):
    """Logits of the adapted model; an export for each target; the stream of the first."""
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import forward
    from bridge_peft import export_adapter_weights, save_hf_adapter

    with host_backend():
        bridge, pg, chunks = adapted(path, layout, lora, spec=spec)
        reports = [
            save_hf_adapter(chunks, out, bridge, target=target, bucket_bytes=20_000) for target, out in outs.items()
        ]
        stream = dict(export_adapter_weights(chunks, bridge, target=next(iter(outs)), bucket_bytes=3_000))
        with torch.no_grad():
            logits = forward([chunk.eval() for chunk in chunks], pg, tokens)
    return {
        "logits": None if logits is None else logits.float(),
        "tp": pg.tp.rank(),
        "layers": reports[0].layers if reports else 0,
        "nbytes": reports[0].nbytes if reports else 0,
        "stream": stream if torch.distributed.get_rank() in (0, torch.distributed.get_world_size() - 1) else None,
    }


def save_checkpoint(path: str, layout: dict[str, Any], lora: dict[str, Any], out: str, *, spec: str = "host", **fields):
    """An adapter checkpoint of the model at a layout."""
    from bridge_core.runtime.host import host_backend
    from bridge_peft import save_adapter_ckpt

    with host_backend():
        bridge, _, chunks = adapted(path, layout, lora, spec=spec)
        save_adapter_ckpt(chunks, out, bridge)


def load(path: str, adapter: str, layout: dict[str, Any], tokens, out=None, target="peft", **options: Any):
    """An HF adapter on a live model: logits, the factors' names and shapes, and its export."""
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import forward
    from bridge_peft import load_hf_adapter, save_hf_adapter

    with host_backend():
        bridge, pg, chunks = adapted(path, layout, None)
        report = load_hf_adapter(chunks, adapter, bridge, **options)
        if out is not None:
            save_hf_adapter(chunks, out, bridge, target=target)
        with torch.no_grad():
            logits = forward([chunk.eval() for chunk in chunks], pg, tokens)
    return {"logits": logits, "tp": pg.tp.rank(), "ranks": {one.name: one.r for one in report.adapted}}


def load_checkpoint(path: str, folder: str, layout: dict[str, Any], lora: dict[str, Any], tokens):
    """An adapter checkpoint on a live model that was adapted otherwise before: its logits."""
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import forward
    from bridge_peft import LoraConfig, apply_lora, load_adapter_ckpt

    with host_backend():
        _, pg, chunks = adapted(path, layout, None)
        apply_lora(chunks, LoraConfig(**lora), pg)
        load_adapter_ckpt(chunks, folder)
        with torch.no_grad():
            logits = forward([chunk.eval() for chunk in chunks], pg, tokens)
    return {"logits": logits, "tp": pg.tp.rank()}


def base_round_trip(path: str, layout: dict[str, Any], lora: dict[str, Any], outs: dict[str, str]) -> dict[str, Any]:
    """The base of an adapted model, loaded and saved as HF's and as Megatron's; whether the factors stayed.

    Args:
        outs: folders for "hf", "megatron" (the base alone) and "everything" (as megatron-core's trainer saves it).
    """
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from bridge_core.errors import BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import sharded

    with host_backend():
        bridge, pg, chunks = adapted(path, layout, lora)
        (chunk,) = chunks
        before = {name: p.clone() for name, p in chunk.named_parameters() if ".adapter." in name}

        def lose_the_base():
            with torch.no_grad():
                for name, parameter in chunk.named_parameters():
                    if ".adapter." not in name:
                        parameter.fill_(float("nan"))

        def kept():
            return all(torch.equal(value, chunk.get_parameter(name)) for name, value in before.items())

        lose_the_base()
        bridge.load_hf_weights(chunks)
        saved = bridge.save_megatron_model(chunks, outs["megatron"])
        found = {"adapters": len(before), "reported": saved.adapters, "kept_by_hf": kept()}
        lose_the_base()
        bridge.load_megatron_model(chunks, outs["megatron"])
        found["kept_by_megatron"] = kept()
        bridge.save_hf_pretrained(chunks, outs["hf"])
        dist_checkpointing.save(sharded(chunks, pg), outs["everything"])
        dist.barrier()
        try:
            bridge.load_megatron_model(chunks, outs["everything"])
            found["refused"] = ""
        except BridgeError as error:
            found["refused"] = str(error)
        lose_the_base()
        bridge.load_megatron_model(chunks, outs["everything"], ignore=["*.adapter.*"])
        found["kept_beside_others"] = kept()
        found["whole"] = not any(p.isnan().any() for p in chunk.parameters())
        return found


def refusals(path: str, other: str, layout: dict[str, Any], out: str) -> list[tuple[str, list[str]]]:
    """Bad input to the export of a live model, and to a load: each error's text, and the warnings before it."""
    import warnings

    from bridge_core import AutoBridge
    from bridge_core.errors import BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_peft import load_hf_adapter, save_hf_adapter

    found = []
    with host_backend():
        bridge, _, chunks = adapted(path, layout, {"r": 4})
        calls = (
            lambda: save_hf_adapter(chunks, out, bridge, target="tgi"),
            lambda: save_hf_adapter(chunks, out, bridge, dtype="int8"),
            lambda: save_hf_adapter(chunks, out, bridge, adapter_name="other"),
            lambda: save_hf_adapter(chunks, out, AutoBridge.from_hf_pretrained(other)),
            lambda: save_hf_adapter(
                chunks, out, bridge, exclude_adapter_base_prefix=["mpt.", "decoder."], bucket_bytes=1
            ),
            lambda: load_hf_adapter(chunks, f"{out}/nowhere", bridge, adapter_name="second"),
        )
        for call in calls:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    call()
                    text = ""
                except BridgeError as error:
                    text = str(error)
            found.append((text, [str(entry.message) for entry in caught if "adapted layer" in str(entry.message)]))
    return found


def merged(path: str, layout: dict[str, Any], lora: dict[str, Any], out: str):
    """The model with adapters folded in, saved as an HF folder."""
    from bridge_core.runtime.host import host_backend
    from bridge_peft import merge_adapters

    with host_backend():
        bridge, _, chunks = adapted(path, layout, lora)
        merge_adapters(chunks)
        bridge.save_hf_pretrained(chunks, out)

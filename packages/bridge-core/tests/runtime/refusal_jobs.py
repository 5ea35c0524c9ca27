"""Jobs for the pool: models that are not the checkpoint's, and what every verb says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def refuse(path: str, changes: dict[str, Any], layout: dict[str, Any], out: str, *, meta_on: Sequence[int] = ()):
    """Load into, save and stream a model of other fields, or without memory on some ranks; the error of each verb."""
    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    verbs = {
        "load": lambda: bridge.load_hf_weights(chunks),
        "save": lambda: bridge.save_hf_pretrained(chunks, out),
        "stream": lambda: list(bridge.export_hf_weights(chunks)),
    }
    told = {}
    with host_backend():
        _, _, chunks = build(bridge.fields | changes, layout, spec="host")
        if dist.get_rank() in meta_on:
            chunks = [chunk.to("meta") for chunk in chunks]
        before = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
        for verb, call in verbs.items():
            try:
                call()
                told[verb] = "no error"
            except BridgeError as error:
                told[verb] = str(error)
    after = [parameter for chunk in chunks for parameter in chunk.parameters()]
    same = [a.is_meta or bool((a == b).all()) for a, b in zip(before, after, strict=True)]
    return told, all(same)

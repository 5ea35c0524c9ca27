"""Jobs for pools of their own: a rank is killed while adapters of a live model are exported or imported."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


def _save(chunks: Any, bridge: Any, out: str, adapter: str) -> None:
    from bridge_peft import save_hf_adapter

    save_hf_adapter(chunks, out, bridge, bucket_bytes=3_000)


def _checkpoint(chunks: Any, bridge: Any, out: str, adapter: str) -> None:
    from bridge_peft import save_adapter_ckpt

    save_adapter_ckpt(chunks, out, bridge)


def _load(chunks: Any, bridge: Any, out: str, adapter: str) -> None:
    from bridge_peft import load_hf_adapter

    load_hf_adapter(chunks, adapter, bridge, adapter_name="another")


VERBS: dict[str, Callable[[Any, Any, str, str], None]] = {
    "save": _save,
    "checkpoint": _checkpoint,
    "load": _load,
}

# Verb -> what ranks are about to tell one another -> what is called just before: what has it, its name, which call.
PLACES: dict[str, dict[str, tuple[str, str, int]]] = {
    "save": {
        "layers": ("bridge_peft.converting.gather", "unwrap", 0),
        "later factors": ("bridge_peft.converting.gather", "owns", 7),
    },
    "checkpoint": {"settings": ("bridge_peft.converting.rank_checkpoints", "adapters_named", 0)},
    "load": {
        "settings": ("bridge_core.runtime.workers:TorchWorkers", "share", 1),
        "patterns": ("bridge_peft.apply", "match", 0),
    },
}


def die_in(path: str, adapter: str, layout: dict[str, Any], verb: str, place: str, out: str, notes: str) -> None:
    """The last rank is killed in a verb; every other rank notes after how many seconds it was told what."""
    import torch.distributed as dist
    from convert_jobs import adapted
    from hf_cases import LORA
    from runtime.kill_jobs import note_loss

    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, _, chunks = adapted(path, layout, None if verb == "load" else LORA)
        owner, name, number = PLACES[verb][place]
        where = resolve_name(owner), name
        note_loss(lambda: VERBS[verb](chunks, bridge, out, adapter), where, number, dist.get_world_size() - 1, notes)

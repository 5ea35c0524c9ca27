"""Jobs for pools of their own: a rank is killed while a quantised model is exported."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

# What ranks are about to tell one another -> what is called just before (what has it, its name), options of the export.
PLACES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "inputs of peers": ("bridge_quant_export.live.policy", "reduced", {"uncalibrated": "peers"}),
    "ranges": ("bridge_quant_export.live.agree", "_reduce", {}),
    "bytes written": ("bridge_quant_export.live.export", "summed", {}),
}


def die_in(path: str, layout: dict[str, Any], place: str, out: str, notes: str) -> None:
    """The last rank is killed in an export; every other rank notes after how many seconds it was told what."""
    import warnings

    import torch.distributed as dist
    from quantising import build_loaded, quantise
    from runtime.kill_jobs import note_loss

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        pg, chunks = build_loaded(bridge, layout, "host", grouped=True)
        quantise(chunks, pg, "fp8")
        owner, name, options = PLACES[place]
        note_loss(
            lambda: export_quantized(chunks, out, bridge=bridge, groups=pg, **options),
            (resolve_name(owner), name),
            0,
            dist.get_world_size() - 1,
            notes,
        )

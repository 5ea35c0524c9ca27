"""Jobs for the pool: how much memory an export takes beside the model."""

from __future__ import annotations

from typing import Any

from quantising import quantise

from bridge_core.testing.memory import Peak


def peak_of_export(
    config: dict[str, Any], layout: dict[str, Any], out: str, depths: list[int]
) -> list[tuple[int, int]]:
    """For models of some depths: bytes of this rank's parameters, and the memory that their export took beside them."""
    import gc
    import warnings

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    found = []
    with host_backend():
        for depth in [depths[0], *depths]:  # the first pays for what is loaded once
            bridge = AutoBridge.from_hf_config(config | {"num_hidden_layers": depth})
            _, pg, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
            quantise(chunks, pg, "nvfp4")
            gc.collect()
            with Peak() as peak:
                export_quantized(chunks, f"{out}/{depth}", bridge=bridge, groups=pg, overwrite=True)
            held = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
            found.append((held, peak.nbytes))
            del chunks
    return found[1:]

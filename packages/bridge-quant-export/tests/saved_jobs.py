"""Jobs for the pool: what others make of a quantised model, its checkpoint and its export on one rank."""

from __future__ import annotations

from typing import Any

from quantising import build_loaded, quantise
from te_forms import te_forms


def save_and_export(
    path: str,
    layout: dict[str, Any],
    out: str,
    formats: list[tuple[str, str]],
    *,
    spec: str = "host",
    like_te: bool = False,
) -> None:
    """Quantise, save to `out/{format}` as Megatron-LM does with ModelOpt, export live to `out/{format}-{writer}`.

    Args:
        like_te: grouped experts and a quantised KV cache, saved as ModelOpt saves those of Transformer Engine.
    """
    import warnings
    from contextlib import nullcontext
    from pathlib import Path

    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.megatron_ckpt import sharded_state
    from bridge_core.testing.mcore_jobs import global_state
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend(), te_forms() if like_te else nullcontext():
        for name in dict.fromkeys(name for name, _ in formats):
            pg, chunks = build_loaded(bridge, layout, spec, grouped=like_te)
            quantise(chunks, pg, name, kv=like_te)
            folder = Path(out, name)
            if dist.get_rank() == 0:
                folder.mkdir()
            dist.barrier()
            with global_state(layout):  # ModelOpt 0.47 asks mcore's for the groups that describe its tensors
                dist_checkpointing.save(sharded_state(chunks, pg) | {"iteration": 0}, str(folder))
                save_sharded_modelopt_state(chunks, str(folder))
            for writer in [writer for other, writer in formats if other == name]:
                export_quantized(chunks, f"{out}/{name}-{writer}", bridge=bridge, groups=pg, format=writer)


def export_with_modelopt(path: str, out: str, names: list[str]) -> None:
    """Quantise on one rank; export to `out/{name}`, and with ModelOpt's own exporter to `out/{name}-theirs`."""
    import warnings

    import torch
    from modelopt.torch.export import export_mcore_gpt_to_hf

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import global_state
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        for name in names:
            pg, chunks = build_loaded(bridge, {}, "local", grouped=False)
            quantise(chunks, pg, name)
            export_quantized(chunks, f"{out}/{name}", bridge=bridge, groups=pg)
            with global_state({}):
                export_mcore_gpt_to_hf(chunks[0], path, dtype=torch.float32, export_dir=f"{out}/{name}-theirs")

"""Jobs for the pool: the forward pass of a `MimoModel` over components on ranks of their own, by plain exchanges."""

from __future__ import annotations

from typing import Any

from live_mimo_jobs import Layouts, bridge_of, build


def logits(path: str, layouts: Layouts, batches: list[dict[str, Any]], *, colocated: bool = False):
    """Logits [B, S, V / tp] of each batch on this rank, None but on the language model's last stage; its tp rank."""
    import torch

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, colocated=colocated)
    with host_backend(), torch.no_grad():
        model = build(bridge)
        bridge.load_hf_weights(model)
        model.eval()
        language = model.mimo_groups.collections["language"]
        run = run_colocated if colocated else run_disjoint
        found = [run(model, batch) for batch in batches]
        model.destroy()
    return found, None if language is None else language.tp.rank()


def run_colocated(model, batch):
    """Every rank has both components, whose data-parallel replicas each take their share of images or of texts."""
    images = model.mimo_groups.mine["images"].dp
    inputs = None
    if batch["pixels"] is not None:
        grids = batch["grids"].chunk(images.size())[images.rank()]
        counts = batch["grids"].prod(1).chunk(images.size())
        first = sum(int(count.sum()) for count in counts[: images.rank()])
        share = batch["pixels"][first : first + int(counts[images.rank()].sum())]
        inputs = {"images": {"qwen_visual": {"pixel_values": share, "grid_thw": grids}}}
    language = model.mimo_groups.mine["language"].dp
    tokens = batch["tokens"].chunk(language.size())[language.rank()]
    positions = batch["positions"].chunk(language.size(), dim=1)[language.rank()]
    output, _ = model(tokens, positions, modality_inputs=inputs)
    return output


def run_disjoint(model, batch):
    """First all stages of the images component, then all stages of the language model."""
    import torch.distributed as dist

    me, groups = dist.get_rank(), model.mimo_groups
    inputs = None
    if batch["pixels"] is not None:
        inputs = {"images": {"qwen_visual": {"pixel_values": batch["pixels"], "grid_thw": batch["grids"]}}}
    passed: Any = None
    output = None
    for name in ("images", "language"):
        layout = groups.layouts[name]
        for stage in range(layout.parallel.pp):
            ranks = [r for r in layout.ranks if layout.parallel.coords(r - layout.ranks.start).pp == stage]
            held = [None]
            if me in ranks:
                given = None if passed is None else {name if stage else "images": passed}
                model.set_input_tensor([given or {}])
                result, _ = model(batch["tokens"], batch["positions"], modality_inputs=inputs)
                output = result if not isinstance(result, dict) else None
                held = [result[name] if isinstance(result, dict) else None]
            dist.broadcast_object_list(held, src=ranks[0])
            passed = held[0]
    return output

"""Jobs for the pool: the forward pass of a `MimoModel` over components on ranks of their own, by plain exchanges."""

from __future__ import annotations

from typing import Any

from live_mimo_jobs import Layouts, bridge_of, build


def logits(path: str, layouts: Layouts, batches: list[dict[str, Any]], *, colocated: bool = False, hf_towers=()):
    """Logits [B, S, V / tp] of each batch on this rank, None but on the language model's last stage; its tp rank."""
    import torch

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, colocated=colocated, hf_towers=hf_towers)
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
    if batch["inputs"] is not None:
        whole = batch["inputs"]["qwen_visual"]
        grids = whole["grid_thw"].chunk(images.size())
        patches = [int(some.prod(1).sum()) for some in grids]
        pixels = whole["pixel_values"].split(patches)
        mine = {"pixel_values": pixels[images.rank()], "grid_thw": grids[images.rank()]}
        inputs = {"images": {"qwen_visual": mine}}
    language = model.mimo_groups.mine["language"].dp
    tokens = batch["tokens"].chunk(language.size())[language.rank()]
    positions = batch["positions"].chunk(language.size(), dim=1)[language.rank()]
    output, _ = model(tokens, positions, modality_inputs=inputs)
    return output


def run_disjoint(model, batch):
    """First all stages of the images component, then all stages of the language model."""
    import torch.distributed as dist

    me, groups = dist.get_rank(), model.mimo_groups
    inputs = None if batch["inputs"] is None else {"images": batch["inputs"]}
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


def llava(path: str, layouts: Layouts, out: str, run: str, batches: list[dict[str, Any]]):
    """A third party's model: logits as `logits` gives them, with a tower from a function; saved as HF and Megatron."""
    import llava_family
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_mimo.towers import clip_tower_spec, projector_spec, vision_modality_spec

    llava_family.register()
    bridge = bridge_of(path, layouts)

    def images(fields, settings, groups, spec):
        sizes = fields["vision_hidden_size"], fields["hidden_size"], fields["hidden_size"]
        tower = clip_tower_spec(bridge.config["vision_config"], settings, groups=groups, spec=spec)
        projector = projector_spec(sizes, settings, groups=groups, spec=spec)
        return vision_modality_spec({"clip": tower}, groups=groups, input_projections=[projector])

    with host_backend(), torch.no_grad():
        provider = bridge.to_megatron_mimo_provider(spec="host")
        provider.modality_specs["images"] = images
        model = provider.provide()
        bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, out)
        bridge.save_megatron_model(model, run)
        model.eval()
        found = [run_disjoint(model, batch) for batch in batches]
    language = model.mimo_groups.collections["language"]
    return found, None if language is None else language.tp.rank()

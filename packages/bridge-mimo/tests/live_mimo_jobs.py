"""Jobs for the pool: components on ranks of their own, weights in and out."""

from __future__ import annotations

from typing import Any

Layouts = dict[str, dict[str, Any]]

# What mcore's linears ask when they are built, and make no use of (0.19.2, tensor_parallel/layers.py).
UNUSED = frozenset({"get_gtp_weight_remat_group", "get_expert_gtp_weight_remat_group"})


def opened(path: str, layouts: Layouts, *, colocated: bool = False, ignore=()):
    """Components of the model in an HF folder, and their filled-in layouts."""
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_mimo import ComponentLayout, auto_fill_layout
    from bridge_mimo.components import Components

    bridge = AutoBridge.from_hf_pretrained(path, ignore=ignore)
    wanted = {name: ComponentLayout(**sizes) for name, sizes in layouts.items()}
    return Components.of(bridge.family, bridge.fields), auto_fill_layout(
        wanted, dist.get_world_size(), colocated=colocated
    )


def build(components, layouts):
    """A model full of NaN, and its provider. Call inside `host_backend`; collective."""
    from bridge_mimo.runtime.provider import MimoProvider

    provider = MimoProvider(components, layouts, spec="host")
    provider.language.make_vocab_size_divisible_by = 16
    model = provider.provide()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return provider, model


def round_trip(path: str, layouts: Layouts, out: str, *, colocated: bool = False, bucket_bytes: int = 60_000):
    """Load, save, stream with mcore's global state poisoned: what each step said on this rank."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core.runtime.host import host_backend
    from bridge_mimo.runtime import weights

    components, filled = opened(path, layouts, colocated=colocated)
    with host_backend(), poisoned_parallel_state(UNUSED) as reads:
        _, model = build(components, filled)
        reads.clear()
        loaded = weights.load_hf_weights(model, path, components)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        saved = weights.save_hf_pretrained(model, out, components, source=path)
        stream = weights.make_stream(model, components, bucket_bytes=bucket_bytes)
        tensors = {name: tensor.clone() for name, tensor in stream}
        again = [name for name, _ in stream]
    return {
        "loaded": loaded,
        "saved": saved,
        "stream": tensors,
        "again": again,
        "metadata": stream.metadata(),
        "names": {name for name, _ in model.named_parameters()},
        "reads": sorted(reads),
    }

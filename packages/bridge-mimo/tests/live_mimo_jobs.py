"""Jobs for the pool: components on ranks of their own, weights in and out."""

from __future__ import annotations

from typing import Any

Layouts = dict[str, dict[str, Any]]

# What mcore's linears ask when they are built, and make no use of (0.19.2, tensor_parallel/layers.py).
UNUSED = frozenset({"get_gtp_weight_remat_group", "get_expert_gtp_weight_remat_group"})


def bridge_of(path: str, layouts: Layouts, *, colocated: bool = False, ignore=()):
    """The bridge of the model in an HF folder, for as many ranks as the job has."""
    import torch.distributed as dist

    from bridge_mimo import ComponentLayout, MegatronMIMOBridge

    wanted = {name: ComponentLayout(**sizes) for name, sizes in layouts.items()}
    return MegatronMIMOBridge.from_hf_pretrained(
        path, parallelism=wanted, world_size=dist.get_world_size(), colocated=colocated, ignore=ignore
    )


def build(bridge):
    """A model full of NaN. Call inside `host_backend`; collective."""
    provider = bridge.to_megatron_mimo_provider(spec="host")
    provider.language.make_vocab_size_divisible_by = 16
    model = provider.provide()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def round_trip(path: str, layouts: Layouts, out: str, *, colocated: bool = False, bucket_bytes: int = 60_000):
    """Load, save, stream with mcore's global state poisoned: what each step said on this rank."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, colocated=colocated)
    with host_backend(), poisoned_parallel_state(UNUSED) as reads:
        model = build(bridge)
        reads.clear()
        loaded = bridge.load_hf_weights(model)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        saved = bridge.save_hf_pretrained(model, out)
        stream = bridge.stream(model, bucket_bytes=bucket_bytes)
        tensors = {name: tensor.clone() for name, tensor in stream}
        again = [name for name, _ in stream]
        model.destroy()
    return {
        "loaded": loaded,
        "saved": saved,
        "stream": tensors,
        "again": again,
        "metadata": stream.metadata(),
        "reads": sorted(reads),
    }


def save_checkpoint(path: str, layouts: Layouts, run: str, *, colocated: bool = False):
    """HF weights into a live model, and a checkpoint of it."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, colocated=colocated)
    with host_backend(), poisoned_parallel_state(UNUSED) as reads:
        model = build(bridge)
        reads.clear()
        bridge.load_hf_weights(model)
        report = bridge.save_megatron_model(model, run, iteration=7)
        return report, sorted(reads)


def load_checkpoint(path: str, layouts: Layouts, run: str, out: str, *, colocated: bool = False):
    """A checkpoint into a live model of other layouts, and an HF folder of it."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, colocated=colocated)
    with host_backend(), poisoned_parallel_state(UNUSED) as reads:
        model = build(bridge)
        reads.clear()
        report = bridge.load_megatron_model(model, run)
        bridge.save_hf_pretrained(model, out)
        return report, sorted(reads)

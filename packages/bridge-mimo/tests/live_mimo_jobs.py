"""Jobs for the pool: components on ranks of their own, weights in and out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from watching import context_parallel_without_te, frozen_parallel_state, reads

Layouts = dict[str, dict[str, Any]]

# What mcore's linears ask when they are built, and make no use of (0.19.2, tensor_parallel/layers.py).
UNUSED = frozenset({"get_gtp_weight_remat_group", "get_expert_gtp_weight_remat_group"})


def bridge_of(path: str, layouts: Layouts, *, colocated: bool = False, ignore=(), hf_towers=()):
    """The bridge of the model in an HF folder, for as many ranks as the job has."""
    import torch.distributed as dist

    from bridge_mimo import ComponentLayout, MegatronMIMOBridge

    wanted = {name: ComponentLayout(**sizes) for name, sizes in layouts.items()}
    bridge = MegatronMIMOBridge.from_hf_pretrained(
        path, parallelism=wanted, world_size=dist.get_world_size(), colocated=colocated, ignore=ignore
    )
    return bridge.with_hf_towers(*hf_towers)


def build(bridge, *, dtype=None):
    """A model full of NaN. Call inside `host_backend`; collective."""
    provider = bridge.to_megatron_mimo_provider(spec="host")
    provider.language.make_vocab_size_divisible_by = 16
    if dtype is not None:
        provider.language.apply_overrides({"bf16": True, "params_dtype": dtype})
        provider.towers["images"] |= {"bf16": True, "params_dtype": dtype}
    cut = any(layout.cp > 1 for layout in bridge.layouts.values())
    with context_parallel_without_te() if cut else nullcontext():
        model = provider.provide()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def round_trip(path: str, layouts: Layouts, out: str, *, colocated: bool = False, bucket_bytes: int = 60_000):
    """Load, save, stream with mcore's global state poisoned: what each step said on this rank."""
    import torch
    import torch.distributed as dist
    from runtime.helpers import poisoned_parallel_state, small_bands

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, colocated=colocated)
    with host_backend(), poisoned_parallel_state(UNUSED) as asked, frozen_parallel_state():
        model = build(bridge)
        asked.clear()
        with reads() as read:
            loaded = bridge.load_hf_weights(model)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        with small_bands():
            saved = bridge.save_hf_pretrained(model, out)
        stream = bridge.stream(model, bucket_bytes=bucket_bytes)
        tensors = {name: tensor.clone() for name, tensor in stream}
        again = [name for name, _ in stream]
        bridge.save_hf_pretrained(model, f"{out}-whole", one_writer_per_file=True, bucket_bytes=bucket_bytes)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        node = dist.group.WORLD
        again_loaded = bridge.load_hf_weights(
            model, one_reader_per_node=True, node_group=node, bucket_bytes=bucket_bytes
        )
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        model.destroy()
    return {
        "loaded": loaded,
        "saved": saved,
        "stream": tensors,
        "again": again,
        "metadata": stream.metadata(),
        "collectives": stream.collectives,
        "asked": sorted(asked),
        "read": sorted(read),
        "read_alone": again_loaded.bytes_read,
    }


def describe(path: str, layouts: Layouts):
    """What this rank says of its shards: M2N entries with tensors; name and size of what it owns first."""
    from bridge_core.runtime.host import host_backend
    from bridge_mimo.runtime.provider import wrap_in_ddp

    bridge = bridge_of(path, layouts)
    with host_backend():
        model = wrap_in_ddp(build(bridge))
        bridge.load_hf_weights(model)
        entries = [
            (entry.key, entry.mesh, entry.box, entry.replica, entry.local_tensor())
            for entry in bridge.m2n_entries(model)
        ]
        shards = [(shard.name, shard.tensor.numel()) for shard in bridge.iter_local_shards(model) if not shard.replica]
    return entries, shards


def save_checkpoint(path: str, layouts: Layouts, run: str, **options: Any):
    """HF weights into a live model, and a checkpoint of it."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, **options)
    with host_backend(), poisoned_parallel_state(UNUSED) as asked, frozen_parallel_state():
        model = build(bridge)
        asked.clear()
        bridge.load_hf_weights(model)
        report = bridge.save_megatron_model(model, run, iteration=7)
        return report, sorted(asked)


def load_checkpoint(path: str, layouts: Layouts, run: str, out: str, **options: Any):
    """A checkpoint into a live model of other layouts, and an HF folder of it."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, **options)
    with host_backend(), poisoned_parallel_state(UNUSED) as asked, frozen_parallel_state():
        model = build(bridge)
        asked.clear()
        report = bridge.load_megatron_model(model, run)
        bridge.save_hf_pretrained(model, out)
        return report, sorted(asked)


def relay_checkpoint(run: str, out: str):
    """Build the model that a checkpoint says, in the layouts that it was made for; load, save; what was built."""
    from bridge_core.checkpoint.megatron_folder import find_iteration, open_megatron
    from bridge_core.runtime.host import host_backend
    from bridge_mimo import MegatronMIMOBridge
    from bridge_mimo.checkpoint.stored import mimo_variant, stored_components

    stored = stored_components(find_iteration(Path(run)))
    bridge = MegatronMIMOBridge.from_hf_config(
        open_megatron(run, variant=mimo_variant()).hf_config,
        parallelism=stored.layouts,
        colocated=stored.colocated,
    ).with_hf_towers(*stored.hf_towers)
    with host_backend():
        model = build(bridge)
        bridge.load_megatron_model(model, run)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        bridge.save_megatron_model(model, out)
    return ", ".join(f"{name}: {layout}" for name, layout in model.mimo_groups.layouts.items())


def from_fp8(path: str, layouts: Layouts, out: str, *, fp8: bool):
    """An fp8 folder into a live model in bf16; out of it as a folder, a checkpoint, and a stream."""
    import torch
    from fp8_folders import as_read

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts)
    with host_backend():
        model = build(bridge, dtype=torch.bfloat16)
        report = bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, f"{out}/hf", fp8=fp8)
        bridge.save_megatron_model(model, f"{out}/run")
        stream = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(model, fp8=fp8)}
    codes = sum(tensor.dtype == torch.float8_e4m3fn for tensor in stream.values())
    return report, codes, as_read(stream)  # mcore's patch of pickle, for answers to the pool, knows no fp8


def settings_stay(path: str):
    """Build a `MimoModel`, then a plain model of the same provider; whether settings changed, and who predicts."""
    import torch.distributed as dist

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups

    bridge = bridge_of(path, {"language": {"tp": 2, "dp": 1}, "images": {"dp": 1}})
    with host_backend():
        provider = bridge.to_megatron_mimo_provider(spec="host")
        before = dict(vars(provider.language)["_settings"])
        model = provider.provide()
        same = before == vars(provider.language)["_settings"]
        (plain,) = provider.language.provide(groups(dp=dist.get_world_size()))
    beside = model.language_model is not None and any("mtp" in name for name, _ in model.named_parameters())
    return same, beside, any(name.startswith("mtp.") for name, _ in plain.named_parameters())

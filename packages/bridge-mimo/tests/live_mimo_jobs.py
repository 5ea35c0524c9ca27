"""Jobs for the pool: components on ranks of their own, weights in and out."""

from __future__ import annotations

from typing import Any

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
    import torch
    import torch.distributed as dist
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
        "reads": sorted(reads),
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
    with host_backend(), poisoned_parallel_state(UNUSED) as reads:
        model = build(bridge)
        reads.clear()
        bridge.load_hf_weights(model)
        report = bridge.save_megatron_model(model, run, iteration=7)
        return report, sorted(reads)


def load_checkpoint(path: str, layouts: Layouts, run: str, out: str, **options: Any):
    """A checkpoint into a live model of other layouts, and an HF folder of it."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, layouts, **options)
    with host_backend(), poisoned_parallel_state(UNUSED) as reads:
        model = build(bridge)
        reads.clear()
        report = bridge.load_megatron_model(model, run)
        bridge.save_hf_pretrained(model, out)
        return report, sorted(reads)


def fail_on_one_rank(path: str, layouts: Layouts, out: str, failing: int):
    """One rank cannot read, write or stream; what every rank is told in each step, and whether it goes on."""
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime import load
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.shared_files import SharedFiles

    def broken(*args, **kwargs):
        raise MemoryError(f"no memory left on rank {failing}")

    def stream_to_the_fourth(bridge, model):
        for number, (_, tensor) in enumerate(bridge.export_hf_weights(model, bucket_bytes=20_000)):
            assert tensor.numel()
            if dist.get_rank() == failing and number == 3:
                broken()

    bridge = bridge_of(path, layouts)
    told = {}
    with host_backend():
        model = build(bridge)
        bridge.load_hf_weights(model)
        steps = {
            "load": lambda: bridge.load_hf_weights(model),
            "save": lambda: bridge.save_hf_pretrained(model, f"{out}/hf"),
            "stream": lambda: stream_to_the_fourth(bridge, model),
            "checkpoint": lambda: bridge.save_megatron_model(model, f"{out}/run"),
        }
        originals = load.gather, SharedFiles._write
        for name, step in steps.items():
            if dist.get_rank() == failing:
                load.gather = SharedFiles._write = broken
                if name == "checkpoint":
                    module = next(iter(model.modality_submodules.values()), model.language_model)
                    module.sharded_state_dict = broken
            try:
                step()
                told[name] = "no error"
            except (BridgeError, MemoryError) as error:
                told[name] = str(error)
            finally:
                load.gather, SharedFiles._write = originals
        before = [parameter.detach().clone() for parameter in model.parameters()]
        bridge.load_hf_weights(model)  # the groups are whole
        assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    return told


def settings_stay(path: str):
    """Build a `MimoModel`, then a plain model of the same provider; whether settings changed, and who predicts."""
    import torch.distributed as dist

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import global_state_for_mtp
    from bridge_core.testing.rank_worker import groups

    bridge = bridge_of(path, {"language": {"tp": 2, "dp": 1}, "images": {"dp": 1}})
    with host_backend(), global_state_for_mtp(bridge.fields, {}):
        provider = bridge.to_megatron_mimo_provider(spec="host")
        before = dict(vars(provider.language)["_settings"])
        model = provider.provide()
        same = before == vars(provider.language)["_settings"]
        (plain,) = provider.language.provide(groups(dp=dist.get_world_size()))
    beside = model.language_model is not None and any("mtp" in name for name, _ in model.named_parameters())
    return same, beside, any(name.startswith("mtp.") for name, _ in plain.named_parameters())


def refuse(path: str, kind: str) -> str:
    """Ask for what cannot be; the error's text."""
    import torch
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_mimo import ComponentLayout, MegatronMIMOBridge

    one = {"language": {}, "images": {}}
    try:
        with host_backend():
            if kind == "ranks":
                layouts = {name: ComponentLayout() for name in one}
                bridge = MegatronMIMOBridge.from_hf_pretrained(path, parallelism=layouts, world_size=None)
                bridge = bridge.with_parallelism({"language": ComponentLayout(tp=4), "images": ComponentLayout()})
                build(bridge)
            elif kind == "vpp":
                build(bridge_of(path, {"language": {"pp": 2, "vpp": 2, "dp": 1}, "images": {"dp": 1}}))
            elif kind == "heads":
                build(bridge_of(path, {"language": {"dp": 1}, "images": {"tp": 3, "dp": 1}}))
            elif kind == "layers":
                build(bridge_of(path, {"language": {"dp": 1}, "images": {"pp": 3, "dp": 1}}))
            elif kind == "groups":
                bridge = bridge_of(path, one)
                model = build(bridge)
                del model.mimo_groups
                bridge.load_hf_weights(model)
            elif kind == "component":
                bridge = bridge_of(path, one)
                model = build(bridge)
                if dist.get_rank() == 1:
                    del model.modality_submodules["images"]
                bridge.load_hf_weights(model)
            elif kind == "parameter":
                bridge = bridge_of(path, one)
                model = build(bridge)
                if model.language_model is not None:
                    model.language_model.extra = torch.nn.Parameter(torch.ones(1))
                bridge.load_hf_weights(model)
            elif kind == "carried":
                bridge = bridge_of(path, one)
                model = build(bridge)
                bridge.load_hf_weights(model)
                bridge.save_hf_pretrained(model, f"{path}-out", source=None)
    except BridgeError as error:
        return str(error)
    return "no error"

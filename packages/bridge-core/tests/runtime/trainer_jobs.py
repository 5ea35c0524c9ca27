"""Jobs for the pool: what trainers do to a model between two looks at its weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


def _loaded(path: str, layout: dict[str, Any]):
    from bridge_core import AutoBridge
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    _, pg, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
    bridge.load_hf_weights(chunks)
    return bridge, pg, chunks


def replaced_tensors(path: str) -> dict[str, list[float]]:
    """A kept stream's first and second pass, between which a buffer and a parameter were exchanged for others."""
    import torch

    from bridge_core.runtime.host import host_backend

    norm, bias = "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
    with host_backend():
        bridge, _, (chunk,) = _loaded(path, {})
        stream = bridge.stream(chunk)
        before = {name: tensor.tolist() for name, tensor in stream if name in (norm, bias)}
        router = next(module for name, module in chunk.named_modules() if name.endswith("layers.1.mlp.router"))
        router.expert_bias = router.expert_bias + 1  # as a move to another device and back makes new buffers
        final = chunk.decoder.final_layernorm
        final.weight = torch.nn.Parameter(final.weight.detach() * 2)
        after = {name: tensor.tolist() for name, tensor in stream if name in (norm, bias)}
    return {"bias": before[bias], "new bias": after[bias], "norm": before[norm], "new norm": after[norm]}


def replaced_otherwise(path: str) -> dict[str, str]:
    """What passes of a kept stream say to a parameter that was exchanged for one that the stream cannot send."""
    import torch

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    told = {}
    with host_backend():
        bridge, _, (chunk,) = _loaded(path, {})
        stream, linear = bridge.stream(chunk), chunk.decoder.layers[1].mlp.linear_fc2
        values = linear.weight.detach()
        for kind, odd in {
            "longer": torch.cat([values, values]),
            "turned": values.t().contiguous(),
            "gaps": values.t().contiguous().t(),
            "wider": values.double(),
        }.items():
            linear.weight = torch.nn.Parameter(odd)
            try:
                dict(stream)
                told[kind] = "no error"
            except BridgeError as error:
                told[kind] = str(error)
        linear.weight = torch.nn.Parameter(values.double())
        assert {tensor.dtype for _, tensor in bridge.stream(chunk, dtype="F32")} == {torch.float32}
    return told


def late_parameters(path: str, layout: dict[str, Any], out: str) -> None:
    """Save, stream and checkpoint a model of which every rank has its own part only, as after an optimizer's step."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.provider import Provider
    from bridge_core.testing.mcore_jobs import on_this_device, seed_gpu, settings
    from bridge_core.testing.rank_worker import groups

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        pg = groups(**layout)
        seed_gpu(pg)
        provider = Provider(bridge.fields, spec=on_this_device("host"))
        provider.apply_overrides(settings(layout))
        config = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True
        )
        chunks = provider.provide_distributed_model(pg, wrap_with_ddp=True, ddp_config=config)
        bridge.load_hf_weights(chunks)
        for verb in ("hf", "megatron", "stream"):
            _spoil(chunks)
            if verb == "hf":
                bridge.save_hf_pretrained(chunks, f"{out}/hf")
            elif verb == "megatron":
                bridge.save_megatron_model(chunks, f"{out}/megatron")
            else:
                assert not any((tensor == 7).all() for _, tensor in bridge.export_hf_weights(chunks))


def _spoil(chunks: list[Any]) -> None:
    """Fill what other ranks of the optimizer own with 7."""
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                parts = bucket.param_data.view(group.size(), -1)
                for rank in range(group.size()):
                    if rank != group.rank():
                        parts[rank] = 7


def odd_memory(path: str, kind: str) -> str:
    """Load into a model one of whose parameters is no plain memory; the error's text. Nothing may have been copied."""
    import torch

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    class Coded(torch.nn.Parameter):
        """Stands in for a parameter that is stored in fewer bits."""

    with host_backend():
        bridge, _, (chunk,) = _loaded(path, {})
        weight = chunk.decoder.layers[1].mlp.linear_fc2.weight
        values = weight.detach()
        odd = torch.nn.Parameter(values.t().contiguous().t()) if kind == "gaps" else Coded(values)
        chunk.decoder.layers[1].mlp.linear_fc2.weight = odd
        for parameter in chunk.parameters():
            parameter.data.fill_(3.0)
        try:
            bridge.load_hf_weights(chunk)
        except BridgeError as error:
            assert all((parameter == 3.0).all() for parameter in chunk.parameters()), "bytes were copied"
            return str(error)
    return "no error"


def unequal_streams(path: str, layout: dict[str, Any]) -> str:
    """Make a stream whose buckets are larger on one rank; what every rank is told."""
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, _, chunks = _loaded(path, layout)
        try:
            bridge.stream(chunks, bucket_bytes=20_000 + 20_000 * dist.get_rank())
        except BridgeError as error:
            return str(error)
    return "no error"


def plans_of_exports(path: str, layout: dict[str, Any]) -> list[set[str]]:
    """What each of three exports planned: the last one is of another model, of other groups."""
    from runtime.stream_jobs import planning

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    planned: list[set[str]] = []
    with host_backend():
        bridge, _, chunks = _loaded(path, layout)
        _, _, others = build(bridge.fields, {"pp": 2}, spec="host", vocab_divisible_by=16)
        bridge.load_hf_weights(others)
        for model in (chunks, chunks, others):
            with planning() as steps:
                assert list(bridge.export_hf_weights(model))
            planned.append(set(steps))
    return planned


def words_beside_nccl() -> tuple[list[Any], list[bool]]:
    """What ranks say to one another where the default group says that it is NCCL alone, and where they say it."""
    import torch.distributed as dist

    from bridge_core.runtime.words import words_group
    from bridge_core.runtime.workers import TorchWorkers

    world, configured = dist.group.WORLD, dist.get_backend_config

    def as_nccl(group=None):
        return "cuda:nccl" if group is world else configured(group)

    with patch.object(dist, "get_backend_config", as_nccl):
        said = TorchWorkers(world).share(dist.get_rank())
        beside = words_group(world)
        facts = [beside is not world, beside is words_group(world), beside.size() == world.size()]
    return said, facts


def devices_that_differ(path: str, layout: dict[str, Any], kinds: list[str]) -> str:
    """Ranks whose parameters say that they are on these kinds of devices; what every rank is told."""
    from dataclasses import replace

    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.agreement import agreed_device
    from bridge_core.runtime.host import host_backend
    from bridge_core.runtime.live import open_live

    with host_backend():
        bridge, _, chunks = _loaded(path, layout)
        live = open_live(chunks, bridge.family, bridge.fields)
        kind = kinds[dist.get_rank()]
        home = SimpleNamespace(tensor=SimpleNamespace(device=SimpleNamespace(type=kind)))
        homes: Any = {(0, "weight"): home} if kind else {}
        try:
            return str(agreed_device(replace(live, homes=homes), dist.group.WORLD))
        except BridgeError as error:
            return str(error)

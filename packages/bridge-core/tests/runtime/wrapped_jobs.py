"""Jobs for the pool: models as trainers hold them, in wrappers, and with context-parallel groups."""

from __future__ import annotations

from typing import Any

from bridge_core.testing.mcore_jobs import context_parallel_without_te, on_this_device, seed_gpu, settings


@context_parallel_without_te()
def _built(bridge, layout: dict[str, Any], wrapper: str, dtype: str):
    """Groups and chunks, wrapped; every parameter is NaN."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from bridge_core.runtime.provider import Provider
    from bridge_core.testing.rank_worker import groups

    sizes = {name: layout[name] for name in ("tp", "pp", "ep", "etp", "cp", "dp") if name in layout}
    pg = groups(**sizes)
    seed_gpu(pg)
    provider = Provider(bridge.fields, spec=on_this_device("host"))
    provider.apply_overrides(settings(layout) | {"make_vocab_size_divisible_by": 16})
    if dtype == "bf16":
        provider.apply_overrides({"bf16": True, "params_dtype": torch.bfloat16})
    if wrapper in ("ddp", "distributed optimizer"):
        config = DistributedDataParallelConfig(use_distributed_optimizer=wrapper != "ddp", grad_reduce_in_fp32=True)
        chunks = provider.provide_distributed_model(pg, wrap_with_ddp=True, ddp_config=config)
    else:
        chunks = provider.provide_distributed_model(pg)
    if wrapper == "Float16Module":
        chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
    if wrapper == "Float16Module in ddp":
        chunks = _ddp_of_float16(provider, pg)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return pg, chunks


def _ddp_of_float16(provider, pg):
    """As Megatron-LM nests them (megatron/training/training.py, `get_model`): DDP(Float16Module(GPTModel))."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return [
        DistributedDataParallel(
            chunk.config, config, Float16Module(chunk.config, chunk), disable_bucketing=number > 0, pg_collection=pg
        )
        for number, chunk in enumerate(provider.provide_distributed_model(pg))
    ]


def everything(path: str, layout: dict[str, Any], wrapper: str, dtype: str, out: str, *, megatron: bool):
    """Load, describe, stream, save both ways, perhaps save for Megatron and load that again; facts of each."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        pg, chunks = _built(bridge, layout, wrapper, dtype)
        memory = [parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()]
        with poisoned_parallel_state(frozenset()) as reads:
            loaded = bridge.load_hf_weights(chunks)
            shards = [(s.name, s.box, s.tensor.clone(), s.replica) for s in bridge.iter_local_shards(chunks)]
            entries = [entry.key for entry in bridge.m2n_entries(chunks)]
            stream = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks, bucket_bytes=60_000)}
            saved = bridge.save_hf_pretrained(chunks, f"{out}/hf")
            owned = bridge.save_hf_pretrained(chunks, f"{out}/owned", one_writer_per_file=True)
            if megatron:
                _through_megatron(bridge, chunks, f"{out}/megatron")
        assert not reads, reads
        # The optimizer's and DDP's buffers still are the parameters' memory.
        assert memory == [parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()]
        again = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks)}
    return {
        "loaded": loaded,
        "saved": saved,
        "owned": owned,
        "shards": shards,
        "entries": entries,
        "stream": stream,
        "again": again,
        "class": type(chunks[0]).__name__,
        "cp": pg.cp.size(),
        "held": sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters()),
    }


def _through_megatron(bridge, chunks, folder: str) -> None:
    bridge.save_megatron_model(chunks, folder)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    bridge.load_megatron_model(chunks, folder)

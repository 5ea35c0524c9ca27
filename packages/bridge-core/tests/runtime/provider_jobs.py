"""Jobs for the pool: models built on the groups of mcore's global state, by a caller who chose to have one."""

from __future__ import annotations

from typing import Any


def on_global_groups(path: str, layout: dict[str, Any], out: str):
    """Build, load and save; the reports, and whether the model's groups are those of the global state."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import global_state, on_this_device, seed_gpu, settings

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend(), global_state(layout):
        provider = bridge.to_megatron_provider(spec=on_this_device("host"))
        provider.apply_overrides(settings(layout) | {"make_vocab_size_divisible_by": 16}).finalize()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        seed_gpu(groups)
        chunks = provider.provide_distributed_model(pg_collection=groups)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        loaded = bridge.load_hf_weights(chunks)
        saved = bridge.save_hf_pretrained(chunks, out)
        used = chunks[0].pg_collection
        own = used.tp is parallel_state.get_tensor_model_parallel_group() and used.ep is (
            parallel_state.get_expert_model_parallel_group()
        )
        sizes = {"tp": used.tp.size(), "pp": used.pp.size(), "dp": used.dp.size(), "ep": used.ep.size()}
    return {"loaded": loaded, "saved": saved, "own": own, "sizes": sizes}

"""Jobs for the pool: models built on groups that fit or do not, and on those of mcore's global state."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

# What mcore reads of its global state in spite of groups (`test_host.READS`): None there means "not used".
READ_BY_MCORE = frozenset({"get_gtp_weight_remat_group", "get_expert_gtp_weight_remat_group"})


_BUILT_FROM = ("models.gpt", "models.hybrid.hybrid_model", "ssm.mamba_mixer", "transformer.multi_latent_attention")


def on_groups(path: str, sizes: dict[str, Any], layout: dict[str, Any], left_out: str | None = None) -> str:
    """Build a model of some sizes on the groups of a layout, of which one may be left out; what is said to that."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import settings
    from bridge_core.testing.rank_worker import groups

    provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider(spec="host").apply_overrides(settings(sizes))
    held = vars(groups(**layout))
    with host_backend():
        try:
            provider.provide_distributed_model(
                ProcessGroupCollection(**{name: group for name, group in held.items() if name != left_out})
            )
        except BridgeError as error:
            return str(error)
    return "no error"


def built_without_global_state(path: str, layout: dict[str, Any], wrap_with_ddp: bool):
    """Build with every read of the global state poisoned; the reads, whether `parallel_state` is as it was, names."""
    from contextlib import suppress
    from importlib import import_module

    from megatron.core import parallel_state
    from runtime.helpers import poisoned_parallel_state

    from bridge_core import AutoBridge
    from bridge_core.runtime.homes import unwrap
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mamba import mamba_layers
    from bridge_core.testing.mcore_jobs import context_parallel_without_te, settings
    from bridge_core.testing.rank_worker import groups

    for name in _BUILT_FROM:  # poison reaches imported modules only
        with suppress(ModuleNotFoundError):  # megatron-core 0.16 has no hybrid models
            import_module(f"megatron.core.{name}")
    sizes = {name: layout[name] for name in ("tp", "pp", "ep", "etp", "cp", "dp") if name in layout}
    provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider(spec="host").apply_overrides(settings(layout))
    before = dict(vars(parallel_state))
    with ExitStack() as stack:
        stack.enter_context(host_backend())
        stack.enter_context(mamba_layers())
        stack.enter_context(context_parallel_without_te())
        pg = groups(**sizes)
        reads = stack.enter_context(poisoned_parallel_state(READ_BY_MCORE))
        chunks = provider.provide_distributed_model(pg, wrap_with_ddp=wrap_with_ddp)
    names = [name for chunk in unwrap(chunks) for name, _ in chunk.named_parameters()]
    return sorted(reads), vars(parallel_state) == before, names


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

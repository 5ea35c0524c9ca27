"""Jobs for the pool: what cannot be, and what fails on one rank alone."""

from __future__ import annotations

from typing import Any

from live_mimo_jobs import Layouts, bridge_of, build

EACH = {"language": {}, "images": {}}


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
        originals = load.read_into, SharedFiles._write
        for name, step in steps.items():
            if dist.get_rank() == failing:
                load.read_into = SharedFiles._write = broken
                if name == "checkpoint":
                    module = next(iter(model.modality_submodules.values()), model.language_model)
                    module.sharded_state_dict = broken
            try:
                step()
                told[name] = "no error"
            except (BridgeError, MemoryError) as error:
                told[name] = str(error)
            finally:
                load.read_into, SharedFiles._write = originals
        before = [parameter.detach().clone() for parameter in model.parameters()]
        bridge.load_hf_weights(model)  # the groups are whole
        assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    return told


def refuse_to_build(path: str, layouts: Layouts, *, colocated: bool = False) -> str:
    """Build a model in layouts that it cannot be in; the error's text."""
    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    try:
        with host_backend():
            build(bridge_of(path, layouts, colocated=colocated))
    except BridgeError as error:
        return str(error)
    return "no error"


def build_recomputing(config: dict[str, Any]) -> str:
    """Build a model whose language model recomputes whole layers; the error's text."""
    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_mimo import MegatronMIMOBridge

    provider = MegatronMIMOBridge.from_hf_config(config).to_megatron_mimo_provider(spec="host")
    whole = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    provider.language.apply_overrides(whole)
    try:
        with host_backend():
            provider.provide()
    except BridgeError as error:
        return str(error)
    return "no error"


def refuse_other_ranks(path: str, *, built: bool) -> str:
    """Layouts for more ranks than there are, or groups of other layouts than the provider's; the error's text."""
    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_mimo import ComponentLayout
    from bridge_mimo.runtime.groups import make_groups

    bridge = bridge_of(path, EACH)
    try:
        with host_backend():
            if built:
                turned = bridge.with_parallelism({name: ComponentLayout() for name in reversed(EACH)})
                bridge.to_megatron_model(groups=make_groups(turned.layouts))
            else:
                build(bridge.with_parallelism({"language": ComponentLayout(tp=4), "images": ComponentLayout()}))
    except BridgeError as error:
        return str(error)
    return "no error"


def refuse_a_spoiled_model(path: str, kind: str, step: str, out: str) -> str:
    """Spoil a model, on one rank alone where that is possible, then make all take a step; the error's text."""
    import torch
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    bridge = bridge_of(path, EACH)
    with host_backend():
        model = build(bridge)
        if step == "load checkpoint":
            bridge.load_hf_weights(model)
            bridge.save_megatron_model(model, out)
        if kind == "groups" and dist.get_rank() == 1:
            del model.mimo_groups
        elif kind == "component" and dist.get_rank() == 1:
            del model.modality_submodules["images"]
        elif kind == "parameter" and model.language_model is not None:
            model.language_model.extra = torch.nn.Parameter(torch.ones(1))
        try:
            if step == "load":
                bridge.load_hf_weights(model)
            elif step == "save":
                bridge.save_hf_pretrained(model, out, **({"source": None} if kind == "carried" else {}))
            elif step == "stream":
                next(iter(bridge.export_hf_weights(model)))
            elif step == "save checkpoint":
                bridge.save_megatron_model(model, out)
            else:
                bridge.load_megatron_model(model, out)
        except BridgeError as error:
            return str(error)
    return "no error"

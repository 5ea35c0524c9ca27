"""Jobs on one or a few ranks that look at adapted layers: their start, switches, merges, checkpoints, dtypes."""

from __future__ import annotations

from typing import Any

from lora_jobs import Case, adapted, logits_of, make, shards, stir, whole


def freeze(chunks) -> None:
    """What `apply_lora` does to the base: torch's matmul takes another path, with other rounding, for a weight
    that wants a gradient when its input is not contiguous (latent attention's is not)."""
    for chunk in chunks:
        chunk.requires_grad_(False)


def started(chunks, case: Case, pg) -> dict[str, Any]:
    """Put adapters on: logits before and after, the report, and what is trained."""
    from bridge_peft import LoraConfig, apply_lora

    freeze(chunks)
    before = whole(logits_of(chunks[0]), pg)
    report = apply_lora(chunks, LoraConfig(**case.lora), pg)
    named = dict(chunks[0].named_parameters())
    return {
        "before": before,
        "after": whole(logits_of(chunks[0]), pg),
        "report": report,
        "trained": sorted(name for name, value in named.items() if value.requires_grad),
        "shapes": {name: tuple(value.shape) for name, value in named.items() if ".adapter." in name},
        "text": str(report),
    }


def initial(case: Case) -> list[Any]:
    """The shards of all factors as they are made."""
    from bridge_core.runtime.host import host_backend

    with host_backend():
        pg, chunks, _ = adapted(case)
        return shards(chunks, pg, lambda p: p.data if p.requires_grad else None)


def merging(case: Case) -> dict[str, Any]:
    """`started`, then logits with stirred adapters, merged, unmerged, disabled; merged weights as a stream; all weights
    before and after."""
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_peft import disable_adapters, enable_adapters, merge_adapters, merged_weights, unmerge_adapters

    with host_backend(), torch.no_grad():
        pg, chunks = make(case)
        result = started(chunks, case, pg)
        stir(chunks)
        weights = {n: p.detach().clone() for n, p in chunks[0].named_parameters()}
        result |= {"adapted": whole(logits_of(chunks[0]), pg), "weights": weights}
        disable_adapters(chunks)
        result["disabled"] = whole(logits_of(chunks[0]), pg)
        enable_adapters(chunks)
        result["stream"] = {name: value.clone() for name, value in merged_weights(chunks)}
        result["stream_adapted"] = [name for name, _ in merged_weights(chunks, only_adapted=True)]
        result["untouched"] = all(torch.equal(p, weights[n]) for n, p in chunks[0].named_parameters())
        merge_adapters(chunks, keep_on="cpu")
        result["merged"] = whole(logits_of(chunks[0]), pg)
        result["merged_weights"] = {n: p.detach().clone() for n, p in chunks[0].named_parameters()}
        unmerge_adapters(chunks)
        result["restored"] = all(torch.equal(p, weights[n]) for n, p in chunks[0].named_parameters())
        result["unmerged"] = whole(logits_of(chunks[0]), pg)
        result["scaling"] = {path: adapters["default"].settings.scaling for path, adapters in _adapters(chunks[0])}
        return result


def _adapters(chunk):
    from bridge_peft.layers.attach import adapters_of

    return list(adapters_of(chunk))


def named(case: Case) -> dict[str, Any]:
    """Two named adapters: logits of each, of both, of none; state dict round trip; deletion."""
    import copy

    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_peft import LoraConfig, apply_lora, delete_adapter, set_adapter

    with host_backend(), torch.no_grad():
        pg, chunks = make(case)
        (chunk,) = chunks
        keys = list(chunk.state_dict())
        result: dict[str, Any] = {"base": logits_of(chunk)}
        apply_lora(chunks, LoraConfig(**case.lora), pg, adapter_name="first")
        stir(chunks)
        result["first"] = logits_of(chunk)
        apply_lora(chunks, LoraConfig(**case.lora | {"r": 3}), pg, adapter_name="second")
        result["second_start"] = logits_of(chunk)
        stir(chunks)
        result["second"] = logits_of(chunk)
        result["trained"] = sorted(
            {n.split(".adapter.")[1].split(".")[0] for n, p in chunk.named_parameters() if p.requires_grad}
        )
        set_adapter(chunks, ["first", "second"])
        result["both"] = logits_of(chunk)
        set_adapter(chunks, "first")
        result["first_again"] = logits_of(chunk)
        result["trained_again"] = sorted(
            {n.split(".adapter.")[1].split(".")[0] for n, p in chunk.named_parameters() if p.requires_grad}
        )
        saved = copy.deepcopy(chunk.state_dict())
        for parameter in chunk.parameters():
            parameter.zero_()
        chunk.load_state_dict(saved, strict=True)
        result["loaded"] = logits_of(chunk)
        delete_adapter(chunks, "first")
        set_adapter(chunks, "second")
        result["second_alone"] = logits_of(chunk)
        delete_adapter(chunks, "second")
        result["nothing_left"] = logits_of(chunk)
        result["keys"] = list(chunk.state_dict()) == keys
        result["hooks"] = sum(len(module._forward_hooks) for module in chunk.modules())
        return result


def checkpoint(case: Case, *, metadata: dict[str, Any] | None = None) -> tuple[list[Any], Any]:
    """Load if the case says so, save if it says so: the shards of all factors, and logits."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from bridge_core.runtime.host import host_backend

    with host_backend():
        pg, chunks, _ = adapted(Case(case.fields, case.layout, case.lora, case.spec))
        (chunk,) = chunks
        options = {"dp_cp_group": pg.dp_cp} | (metadata or {})
        if case.load is not None:
            loaded: Any = dist_checkpointing.load(chunk.sharded_state_dict(metadata=options), case.load)
            chunk.load_state_dict(loaded, strict=True)
        elif pg.tp_dp_cp.size() == 1:
            stir(chunks)
        if case.save is not None:
            dist_checkpointing.save(chunk.sharded_state_dict(metadata=options), case.save)
            dist.barrier()
        with torch.no_grad():
            logits = whole(logits_of(chunk), pg)
        return shards(chunks, pg, lambda p: p.data if p.requires_grad else None), logits


def dtypes(case: Case, base: str) -> dict[str, Any]:
    """Dtypes of factors after casts of the whole model, and whether it trains."""
    import torch

    from bridge_core.runtime.host import host_backend

    with host_backend():
        _, chunks, _ = adapted(case)
        (chunk,) = chunks
        chunk.to(getattr(torch, base))
        factors = {n: p for n, p in chunk.named_parameters() if ".adapter." in n}
        before = {name: value.detach().clone() for name, value in factors.items()}
        logits = logits_of(chunk)
        logits.float().square().mean().backward()
        return {
            "logits": logits.dtype,
            "factors": sorted({str(value.dtype) for value in factors.values()}),
            "bases": sorted({str(p.dtype) for n, p in chunk.named_parameters() if ".adapter." not in n}),
            "gradients": all(value.grad is not None for value in factors.values()),
            "same": all(torch.equal(before[name], value) for name, value in factors.items()),
        }


def recomputed(case: Case) -> dict[str, Any]:
    """Gradients of all factors, with and without recomputation of whole layers."""
    import torch

    from bridge_core.runtime.host import host_backend

    found = []
    with host_backend():
        for extra in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
            _, chunks, _ = adapted(Case(case.fields | extra, lora=case.lora))
            stir(chunks)
            logits_of(chunks[0]).float().square().mean().backward()
            found.append({n: p.grad for n, p in chunks[0].named_parameters() if p.requires_grad})
    plain, again = found
    return {
        "missing": [name for name, grad in again.items() if grad is None],
        "apart": max((plain[name] - again[name]).abs().max().item() for name in plain if again[name] is not None),
        "size": max(torch.as_tensor(grad).abs().max().item() for grad in plain.values()),
    }


def dropped(case: Case) -> dict[str, Any]:
    """Logits while training, twice, and in evaluation, with dropout."""
    import torch

    from bridge_core.runtime.host import host_backend

    with host_backend(), torch.no_grad():
        _, chunks, _ = adapted(case)
        stir(chunks)
        (chunk,) = chunks
        training = [logits_of(chunk) for _ in range(2)]
        chunk.eval()
        return {"training": training, "evaluation": [logits_of(chunk) for _ in range(2)]}


def refused(case: Case, *, wrap: bool = False, first: dict[str, Any] | None = None, name: str = "default") -> Any:
    """The error of `apply_lora`, and whether the model is as it was."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from bridge_core.errors import BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_peft import LoraConfig, apply_lora

    with host_backend():
        pg, chunks = make(case)
        (chunk,) = chunks
        model: Any = chunks
        if wrap:
            model = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk, pg_collection=pg)
        if first is not None:
            apply_lora(model, LoraConfig(**first), pg)
        keys = list(chunk.state_dict())
        try:
            apply_lora(model, LoraConfig(**case.lora), pg, adapter_name=name)
        except BridgeError as error:
            trained = all(p.requires_grad for p in chunk.parameters()) or first is not None
            return error, list(chunk.state_dict()) == keys and trained
        return None, False


def dora_layers(case: Case) -> list[dict[str, Any]]:
    """Plain layers with DoRA: input, output, weight, bias, factors, and all gradients."""
    import torch

    from bridge_core.runtime.host import host_backend

    found = []
    with host_backend():
        _, chunks, _ = adapted(case)
        stir(chunks)
        for _, adapters in _adapters(chunks[0]):
            module, adapter = adapters.site.module, adapters["default"]
            if adapters.site.normed or adapters.site.grouped:
                continue
            torch.manual_seed(1)
            x = torch.randn(5, 2, module.weight.shape[1], requires_grad=True)
            output, bias = module(x)
            output.square().sum().backward()
            found.append(
                {
                    "x": x.detach(),
                    "x_grad": x.grad,
                    "output": output.detach(),
                    "bias_left": bias is not None,
                    "weight": module.weight.detach(),
                    "bias": None if module.bias is None or bias is not None else module.bias.detach(),
                    "scaling": adapter.settings.scaling,
                    "factors": {n: p.detach() for n, p in adapter.named_parameters()},
                    "gradients": {n: p.grad for n, p in adapter.named_parameters()},
                }
            )
    return found


def on_a_pipeline(case: Case) -> tuple[list[str], list[str]]:
    """Names of the adapted layers on this rank, and the parameters that are trained."""
    from bridge_core.runtime.host import host_backend

    with host_backend():
        _, chunks, report = adapted(case)
        trained = [n for chunk in chunks for n, p in chunk.named_parameters() if p.requires_grad]
        return [entry.name for entry in report.adapted], trained


def decomposed(case: Case) -> dict[str, Any]:
    """Logits before and after a method that takes something out of the base, and how the products compare."""
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_peft import LoraConfig, apply_lora

    with host_backend(), torch.no_grad():
        pg, chunks = make(case)
        before = whole(logits_of(chunks[0]), pg)
        weights = {n: p.detach().clone() for n, p in chunks[0].named_parameters()}
        apply_lora(chunks, LoraConfig(**case.lora), pg)
        after = whole(logits_of(chunks[0]), pg)
        left = {}
        for path, adapters in _adapters(chunks[0]):
            if not adapters.site.grouped:
                left[path] = (
                    weights[f"{path}.weight"],
                    adapters["default"].update(),
                    adapters.site.weights()[0].clone(),
                )
        return {"before": before, "after": after, "layers": left}

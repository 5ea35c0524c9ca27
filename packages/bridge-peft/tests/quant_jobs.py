"""Jobs with ModelOpt-quantised Megatron models: order of things, SVD of the residual, save and restore."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from lora_jobs import Case, batch, cross_entropy, logits_of, make, shards, stir, whole


@contextmanager
def quantising(case: Case):
    """What ModelOpt needs while it works: the host backend, and mcore's global groups, which it reads."""
    from megatron.core import parallel_state

    from bridge_core.runtime.host import host_backend

    with host_backend():
        layout = case.layout
        parallel_state.initialize_model_parallel(
            layout.get("tp", 1),
            expert_model_parallel_size=layout.get("ep", 1),
            expert_tensor_parallel_size=layout.get("etp", layout.get("tp", 1)),
        )
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def quantise(chunks, form: str) -> None:
    """Fake-quantise in place, calibrated on one sequence. form: "INT8", "FP8", "INT8_SMOOTHQUANT"."""
    import modelopt.torch.quantization as mtq
    import torch

    config = getattr(mtq, f"{form}_CFG" if "SMOOTH" in form else f"{form}_DEFAULT_CFG")

    def calibrate(model):
        with torch.no_grad():
            logits_of(model)

    mtq.quantize(chunks[0], config, calibrate)


def lora(chunks, pg, options: dict[str, Any]) -> list[str]:
    """Put adapters on; the texts of the warnings."""
    import warnings

    from bridge_peft import LoraConfig, apply_lora

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_lora(chunks, LoraConfig(**options), pg)
    return [str(entry.message) for entry in caught if "svdquant" in str(entry.message)]


def either_order(case: Case, form: str) -> list[dict[str, Any]]:
    """Quantise, then adapt; adapt, then quantise: names, logits, gradients."""
    found = []
    for adapter_first in (False, True):
        with quantising(case):
            pg, chunks = make(case)
            if adapter_first:
                lora(chunks, pg, case.lora)
                quantise(chunks, form)
            else:
                quantise(chunks, form)
                lora(chunks, pg, case.lora)
            start = logits_of(chunks[0]).detach()
            stir(chunks)
            logits = logits_of(chunks[0])
            cross_entropy(logits, batch(0)[1], pg).backward()
            named = dict(chunks[0].named_parameters())
            found.append(
                {
                    "start": start,
                    "logits": logits.detach(),
                    "gradients": {n: p.grad for n, p in named.items() if ".adapter." in n},
                    "trained": sorted(n for n, p in named.items() if p.requires_grad),
                    "quantizers": sum(type(m).__name__ == "TensorQuantizer" for m in chunks[0].modules()),
                    "in_adapters": sum(
                        type(m).__name__ == "TensorQuantizer" and ".adapter." in n for n, m in chunks[0].named_modules()
                    ),
                }
            )
    return found


def residuals(case: Case, form: str | None, rank: int) -> dict[str, Any]:
    """Per weight: singular values of W - quant(W), and what is left of it with the adapter."""
    import torch
    from megatron.core import dist_checkpointing

    from bridge_core.testing.mcore_jobs import load, sharded
    from bridge_peft.layers.attach import adapters_of
    from bridge_peft.layers.weights import weight_quantizers

    with quantising(case), torch.no_grad():
        pg, chunks = make(case)
        if case.load is not None:
            load(chunks, pg, case.load)
        if case.save is not None:
            dist_checkpointing.save(sharded(chunks, pg), case.save)
        exact = whole(logits_of(chunks[0]), pg)
        if form is not None:
            quantise(chunks, form)
        rough = whole(logits_of(chunks[0]), pg)
        warned = lora(chunks, pg, case.lora)
        better = whole(logits_of(chunks[0]), pg)
        weights = {}
        for path, adapters in adapters_of(chunks[0]):
            site, adapter = adapters.site, adapters["default"]
            quantizers = weight_quantizers(site)
            if quantizers[0] is None:
                continue
            (weight,) = site.weights()
            residual = weight.double() - quantizers[0](weight).double()
            weights[path] = {
                "values": torch.linalg.svdvals(residual),
                "left": (residual - adapter.update().double()).square().sum(),
                "all": residual.square().sum(),
            }
        factors = shards(chunks, pg, lambda p: p.data if p.requires_grad else None)
        return {
            "weights": weights,
            "warned": warned,
            "exact": exact,
            "rough": rough,
            "better": better,
            "factors": factors,
        }


def restored(case: Case, form: str, folder: str, *, adapter_first: bool) -> dict[str, Any]:
    """Save a quantised, adapted model with ModelOpt's state; restore it in a new one; a further step in each."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import (
        restore_sharded_modelopt_state,
        save_sharded_modelopt_state,
    )

    def step(chunks, pg):
        loss = cross_entropy(logits_of(chunks[0]), batch(1)[1], pg)
        loss.backward()
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
                    parameter.grad = None
        return loss.item()

    with quantising(case):
        pg, chunks = make(case)
        metadata = {"dp_cp_group": pg.dp_cp, "singleton_local_shards": True}
        quantise(chunks, form)
        lora(chunks, pg, case.lora)
        losses = [step(chunks, pg) for _ in range(2)]
        dist_checkpointing.save(chunks[0].sharded_state_dict(metadata=metadata), folder)
        save_sharded_modelopt_state(chunks, folder)
        dist.barrier()
        expected = [step(chunks, pg) for _ in range(2)]

        pg, chunks = make(case, seed=77)
        plain = {name: value for name, value in case.lora.items() if name != "lora_init_method"}
        if adapter_first:
            lora(chunks, pg, plain)
        restore_sharded_modelopt_state(chunks, folder, metadata=metadata)
        if not adapter_first:
            lora(chunks, pg, plain)
        state: Any = dist_checkpointing.load(chunks[0].sharded_state_dict(metadata=metadata), folder)
        chunks[0].load_state_dict(state, strict=True)
        return {"before": losses, "expected": expected, "found": [step(chunks, pg) for _ in range(2)]}


def taken_out(case: Case, form: str) -> dict[str, Any]:
    """A method that takes a part out of quantised weights: each weight before and after, its factors and ranges."""
    import torch
    from megatron.core import dist_checkpointing

    from bridge_core.testing.mcore_jobs import load, sharded
    from bridge_peft.layers.attach import adapters_of
    from bridge_peft.layers.weights import input_scale

    with quantising(case), torch.no_grad():
        pg, chunks = make(case)
        if case.load is not None:
            load(chunks, pg, case.load)
        if case.save is not None:
            dist_checkpointing.save(sharded(chunks, pg), case.save)
        exact = whole(logits_of(chunks[0]), pg)
        quantise(chunks, form)
        rough = whole(logits_of(chunks[0]), pg)
        before = {name: value.detach().clone() for name, value in chunks[0].named_parameters()}
        lora(chunks, pg, case.lora)
        weights = {}
        for path, adapters in adapters_of(chunks[0]):
            scale = input_scale(adapters.site)
            update = adapters["default"].update()
            weights[path] = {
                "before": before[f"{path}.weight"],
                "after": adapters.site.weights()[0].detach().clone(),
                "product": update if scale is None else update / scale,
                "scaled": scale is not None,
                "range": adapters.site.module.weight_quantizer.amax.clone(),
            }
        return {"weights": weights, "exact": exact, "rough": rough, "better": whole(logits_of(chunks[0]), pg)}


def refused(case: Case, form: str | None) -> str:
    """The error of `apply_lora` on a model that is quantised, or is not."""
    from bridge_core.errors import BridgeError

    with quantising(case):
        pg, chunks = make(case)
        if form is not None:
            quantise(chunks, form)
        before = {name: value.detach().clone() for name, value in chunks[0].named_parameters()}
        try:
            lora(chunks, pg, case.lora)
        except BridgeError as error:
            after = dict(chunks[0].named_parameters())
            same = before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
            return str(error) if same else "the model was changed"
        return ""


def merged(case: Case, form: str) -> dict[str, Any]:
    """What merging says about a quantised model."""
    import torch

    from bridge_core.errors import BridgeError
    from bridge_peft import merge_adapters, merged_weights
    from bridge_peft.layers.attach import adapters_of

    with quantising(case), torch.no_grad():
        pg, chunks = make(case)
        quantise(chunks, form)
        lora(chunks, pg, case.lora)
        stir(chunks)
        before = {n: p.detach().clone() for n, p in chunks[0].named_parameters()}
        stream = dict(merged_weights(chunks, only_adapted=True))
        expected = {}
        for path, adapters in adapters_of(chunks[0]):
            module = adapters.site.module
            quantised = module.weight_quantizer(module.weight)
            expected[f"{path}.weight"] = quantised + adapters["default"].update()
        try:
            merge_adapters(chunks)
            error = None
        except BridgeError as caught:
            error = caught
        same = all(torch.equal(p, before[n]) for n, p in chunks[0].named_parameters())
        return {"stream": stream, "expected": expected, "error": error, "same": same}

"""Jobs for the pool: a Megatron model that computes with fake-quantised weights, beside its export."""

from __future__ import annotations

import copy
from typing import Any

import torch
from quantising import CONFIGS, build_loaded, give_ranges

_BY_TENSOR = {"nvfp4": "NVFP4QTensor", "w4a16_nvfp4": "NVFP4QTensor", "mxfp8": "MXFP8QTensor", "mxfp4": "MXFP4QTensor"}


def calibrate_and_export(
    path: str, layout: dict[str, Any], out: str, names: list[str], tokens: Any
) -> list[tuple[int, Any]]:
    """Calibrate with tokens where a CPU can, export as compressed-tensors, and run with ModelOpt's own fake weights.

    Returns:
        For each format this rank's logits [1, S, V / tp], and its tensor-parallel rank.
    """
    import warnings

    import modelopt.torch.quantization as mtq

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import forward
    from bridge_quant_export import export_quantized, prepare_for_modelopt

    warnings.simplefilter("ignore")
    bridge = AutoBridge.from_hf_pretrained(path)
    found = []
    with host_backend(), torch.no_grad():
        for name in names:
            pg, chunks = build_loaded(bridge, layout, "host", grouped=True)
            chunks = [chunk.eval() for chunk in chunks]
            config = copy.deepcopy(getattr(mtq, CONFIGS[name]))
            config["algorithm"] = "max"
            prepare_for_modelopt(chunks, pg)
            # Fake quantisation of blocks of FP4 and of powers of two needs CUDA; ranges of weights do not.
            run = None if name in _BY_TENSOR else lambda model, pg=pg: forward([model], pg, tokens)
            mtq.quantize(chunks[0], config, run)
            if name == "nvfp4":
                give_ranges(chunks[0], pg, name)
            export_quantized(chunks, f"{out}/{name}", bridge=bridge, groups=pg, format="compressed-tensors")
            _fold(chunks[0], name)
            found.append((pg.tp.rank(), forward(chunks, pg, tokens)))
    return found


def _fold(model: Any, name: str) -> None:
    """Put fake-quantised values into the weights, by ModelOpt's functions; no quantiser acts any more."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import qtensor
    from modelopt.torch.quantization.nn import TensorQuantizer

    if name not in _BY_TENSOR:
        mtq.fold_weight(model)
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if name in _BY_TENSOR and quantizer is not None and quantizer.is_enabled:
            kind = getattr(qtensor, _BY_TENSOR[name])
            module.weight.data = _through(kind, module.weight.data, quantizer)
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()


def _through(kind: Any, weight: Any, quantizer: Any) -> Any:
    """A weight as one of ModelOpt's packed tensors, and back."""
    if kind.__name__ == "NVFP4QTensor":
        double = quantizer.amax.float() / (6 * 448)
        packed, scale, _ = kind.quantize(weight, 16, None, double)
        return packed.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    if kind.__name__ == "MXFP8QTensor":
        packed, scale = kind.quantize(weight)
        return packed.dequantize(torch.float32, scale=scale)
    packed, scale = kind.quantize(weight, 32)
    return packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})

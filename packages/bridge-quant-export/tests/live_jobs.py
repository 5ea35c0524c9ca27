"""Jobs for the pool: real mcore models, quantised by ModelOpt on the ranks of a layout, and exported."""

from __future__ import annotations

import copy
import re
import zlib
from contextlib import contextmanager
from typing import Any

import torch

CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a16_nvfp4": "W4A16_NVFP4_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "w4a8_mxfp4_fp8": "W4A8_MXFP4_FP8_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int8_weight_only": "INT8_WEIGHT_ONLY_CFG",
}
_SCALED = ("int4_awq", "w4a8_awq")


def quantise(chunks: list[Any], pg: Any, name: str, *, kv: bool = False) -> None:
    """`mtq.quantize` with ranges of the weights; input ranges and scales are given, the same in every layout."""
    import modelopt.torch.quantization as mtq

    from bridge_quant_export import prepare_for_modelopt

    config = copy.deepcopy(getattr(mtq, CONFIGS[name]))
    config["algorithm"] = "max"
    if kv:
        extra = [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}, "enable": True}]
        config["quant_cfg"] = [*config["quant_cfg"], *extra]
    prepare_for_modelopt(chunks, pg)
    for chunk in chunks:
        with _either_expert_module(chunk):
            mtq.quantize(chunk, config, None)
        give_ranges(chunk, pg, name)


@contextmanager
def _either_expert_module(chunk: Any):
    """ModelOpt refuses to quantise `SequentialMLP` under tensor and expert parallelism; its ranges need neither."""
    sizes = {}
    for module in chunk.modules():
        if type(module).__name__ == "SequentialMLP":
            sizes.setdefault(id(module.config), (module.config, module.config.expert_model_parallel_size))
    for config, _ in sizes.values():
        config.expert_model_parallel_size = 1
    try:
        yield
    finally:
        for config, size in sizes.values():
            config.expert_model_parallel_size = size


def give_ranges(chunk: Any, pg: Any, name: str) -> None:
    """Input ranges, and scales of inputs, that depend on nothing but the layer and the linear's name."""
    numbers = {id(layer): layer.layer_number for layer in chunk.decoder.layers}
    for layer in chunk.decoder.layers:
        for path, module in layer.named_modules():
            place = f"{numbers[id(layer)]}." + re.sub(r"local_experts\.\d+\.", "", path)
            for which in ("k", "v"):
                if (found := getattr(module, f"{which}_bmm_quantizer", None)) is not None and found.is_enabled:
                    found.amax = torch.tensor(500.0 + 300 * _number(f"{place}.{which}"))
            inputs = getattr(module, "input_quantizer", None)
            if inputs is None or not module.weight_quantizer.is_enabled:
                continue
            per_tensor = not inputs._dynamic and inputs.block_sizes is None
            if inputs.is_enabled and (per_tensor or name == "nvfp4"):
                inputs.amax = torch.tensor(1.0 + _number(place))
            if name in _SCALED:
                _scale_inputs(module, inputs, pg, place)


def _scale_inputs(module: Any, inputs: Any, pg: Any, place: str) -> None:
    """`pre_quant_scale` of this rank's part of the input."""
    group = pg.expt_tp if ".experts." in place else pg.tp
    weights = [value for key, value in module.named_parameters(recurse=False) if re.fullmatch(r"weight\d*", key)]
    split = "linear_fc2" in place or "linear_proj" in place
    width = weights[0].shape[1] * (group.size() if split else 1)
    generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
    whole = 0.5 + torch.rand(width, generator=generator)
    inputs.pre_quant_scale = whole.chunk(group.size())[group.rank()].clone() if split else whole


def _number(text: str) -> float:
    return zlib.crc32(text.encode()) / 2**32


def export(
    path: str,
    layout: dict[str, Any],
    out: str,
    formats: list[tuple[str, str]],
    *,
    spec: str = "host",
    kv: bool = False,
    grouped: bool = True,
    options: dict[str, Any] | None = None,
) -> list[Any]:
    """Quantise and export to `out/{format}-{writer}`, for each pair of both; the reports."""
    import logging
    import warnings

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    bridge = AutoBridge.from_hf_pretrained(path)
    reports = []
    with host_backend():
        for name in dict.fromkeys(name for name, _ in formats):
            settings = layout if grouped else layout | {"moe_grouped_gemm": False}
            _, pg, chunks = build(bridge.fields, settings, spec=spec, vocab_divisible_by=16)
            bridge.load_hf_weights(chunks)
            quantise(chunks, pg, name, kv=kv)
            for writer in [writer for other, writer in formats if other == name]:
                reports.append(
                    export_quantized(
                        chunks, f"{out}/{name}-{writer}", bridge=bridge, groups=pg, format=writer, **(options or {})
                    )
                )
    return reports

"""Real mcore models with the weights of a folder, quantised by ModelOpt on the ranks of a layout."""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Iterator
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
MIXED = "mixed"
"""FP8 attention, NVFP4 feed-forward networks and experts."""
_SCALED = ("int4_awq", "w4a8_awq")


def quantise(chunks: list[Any], pg: Any, name: str, *, kv: bool = False, head: bool = False) -> None:
    """`mtq.quantize` with ranges of the weights; input ranges and scales are given, the same in every layout.

    Args:
        kv: with the KV cache.
        head: with the output layer, which ModelOpt's configurations leave out.
    """
    import modelopt.torch.quantization as mtq

    from bridge_quant_export import prepare_for_modelopt

    config = copy.deepcopy(getattr(mtq, CONFIGS["fp8" if name == MIXED else name]))
    config["algorithm"] = "max"
    if name == MIXED:
        fp4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}, "axis": None}
        names = [f"*mlp*{which}_quantizer" for which in ("weight", "input")]
        added = [{"quantizer_name": quantizer, "cfg": fp4, "enable": True} for quantizer in names]
        config["quant_cfg"] = [*config["quant_cfg"], *added]
    if kv:
        extra = [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}, "enable": True}]
        config["quant_cfg"] = [*config["quant_cfg"], *extra]
    if head:
        found = {entry["quantizer_name"]: entry for entry in config["quant_cfg"] if "cfg" in entry}
        names = [f"*{which}_quantizer" for which in ("weight", "input")]
        of_head = [
            found[quantizer] | {"quantizer_name": f"*output_layer.{quantizer[1:]}"}
            for quantizer in names
            if quantizer in found
        ]
        config["quant_cfg"] = [*config["quant_cfg"], *(entry | {"enable": True} for entry in of_head)]
    prepare_for_modelopt(chunks, pg)
    for chunk in chunks:
        for place, module in _linears(chunk) if name in _SCALED else ():
            for weight in _weights(module):
                weight.data /= _scale_of(module, pg, place)
        with _either_expert_module(chunk), _nested_quantizers():
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


@contextmanager
def _nested_quantizers():
    """ModelOpt 0.47 asks every quantiser of grouped experts for a property that `SequentialQuantizer` lacks (W4A8)."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    SequentialQuantizer.is_nvfp4_static = False
    try:
        yield
    finally:
        del SequentialQuantizer.is_nvfp4_static


def give_ranges(chunk: Any, pg: Any, name: str) -> None:
    """Input ranges, and scales of inputs, that depend on nothing but the layer and the linear's name."""
    for place, module in _linears(chunk):
        inputs = module.input_quantizer
        per_tensor = not inputs._dynamic and inputs.block_sizes is None
        if inputs.is_enabled and (per_tensor or name in ("nvfp4", MIXED)):
            inputs.amax = torch.tensor(1.0 + _number(place))
        if name in _SCALED:
            inputs.pre_quant_scale = _scale_of(module, pg, place)
    for layer in chunk.decoder.layers:
        for module in layer.modules():
            for which in ("k", "v"):
                if (found := getattr(module, f"{which}_bmm_quantizer", None)) is not None and found.is_enabled:
                    found.amax = torch.tensor(500.0 + 300 * _number(f"{layer.layer_number}.{which}"))


def _scale_of(module: Any, pg: Any, place: str) -> Any:
    """A `pre_quant_scale` for this rank's part of the input of a linear."""
    group = pg.expt_tp if ".experts." in place else pg.tp
    split = "linear_fc2" in place or "linear_proj" in place
    width = _weights(module)[0].shape[1] * (group.size() if split else 1)
    generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
    whole = 0.5 + torch.rand(width, generator=generator)
    return whole.chunk(group.size())[group.rank()].clone() if split else whole


def _weights(module: Any) -> list[Any]:
    return [value for key, value in module.named_parameters(recurse=False) if re.fullmatch(r"weight\d*", key)]


def _linears(chunk: Any) -> Iterator[tuple[str, Any]]:
    """The linears of the model, each with its global layer number and name, the same for every expert module."""
    for layer in chunk.decoder.layers:
        for path, module in layer.named_modules():
            if re.search(r"linear_\w+$", path) and _weights(module):
                yield f"{layer.layer_number}." + re.sub(r"local_experts\.\d+\.", "", path), module
    if hasattr(getattr(chunk, "output_layer", None), "input_quantizer"):
        yield "output_layer", chunk.output_layer


def disable(chunks: list[Any], layers: tuple[int, ...]) -> None:
    """Switch off all quantisers of some layers (global numbers)."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number - 1 in layers:
                for module in layer.modules():
                    if isinstance(module, TensorQuantizer):
                        module.disable()


def _number(text: str) -> float:
    return zlib.crc32(text.encode()) / 2**32


def build_loaded(bridge: Any, layout: dict[str, Any], spec: str, *, grouped: bool) -> tuple[Any, list[Any]]:
    """Groups and chunks of a layout, with the bridge's weights.

    mcore's attention refuses context parallelism without Transformer Engine. Weights do not know of it: the model is
    built as without, and has the groups of a layout with it.
    """
    from bridge_core.testing.mcore_jobs import build
    from bridge_core.testing.rank_worker import groups

    settings = dict(layout) if grouped else layout | {"moe_grouped_gemm": False}
    cp = settings.pop("cp", 1)
    settings["dp"] = settings.get("dp", 1) * cp
    _, pg, chunks = build(bridge.fields, settings, spec=spec, vocab_divisible_by=16)
    if cp > 1:
        sizes = {name: layout[name] for name in ("tp", "pp", "ep", "etp", "dp") if name in layout}
        pg = groups(**sizes, cp=cp)
    bridge.load_hf_weights(chunks, groups=pg)
    return pg, chunks

"""Jobs for the pool: real mcore models, quantised by ModelOpt on the ranks of a layout, and exported."""

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


def export(
    path: str,
    layout: dict[str, Any],
    out: str,
    formats: list[tuple[str, str]],
    *,
    spec: str = "host",
    kv: bool = False,
    head: bool = False,
    grouped: bool = True,
    skip: tuple[int, ...] = (),
    options: dict[str, Any] | None = None,
) -> list[Any]:
    """Quantise and export to `out/{format}-{writer}`, for each pair of both; the reports.

    Args:
        kv, head: see `quantise`.
        skip: layers (global numbers) that are left unquantised.
    """
    import logging
    import warnings

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    bridge = AutoBridge.from_hf_pretrained(path)
    reports = []
    with host_backend():
        for name in dict.fromkeys(name for name, _ in formats):
            pg, chunks = build_loaded(bridge, layout, spec, grouped=grouped)
            quantise(chunks, pg, name, kv=kv, head=head)
            disable(chunks, skip)
            for writer in [writer for other, writer in formats if other == name]:
                reports.append(
                    export_quantized(
                        chunks, f"{out}/{name}-{writer}", bridge=bridge, groups=pg, format=writer, **(options or {})
                    )
                )
    return reports


def opened_for_writing(path: str, layout: dict[str, Any], out: str) -> list[str]:
    """Names of the JSON files that this rank opens for writing in an export, each as often as it does.

    Told by the interpreter itself, to a hook that stays and is silent afterwards: hooks cannot be removed.
    """
    import sys
    from pathlib import Path

    opened: list[str] = []
    listening = True

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            name = Path(str(arguments[0])).name
            if name.endswith(".json"):
                opened.append(name)

    sys.addaudithook(hear)
    try:
        export(path, layout, out, [("fp8", "modelopt")], options={"max_shard_size": 300_000})
    finally:
        listening = False
    return opened


# --- What goes wrong ---------------------------------------------------------------------------


def _linear(chunks: list[Any]) -> Any:
    """The first linear of the feed-forward network of a rank's first layer."""
    return chunks[0].decoder.layers[0].mlp.linear_fc1


def _scaled(quantizer: Any, factor: float) -> None:
    quantizer.amax = quantizer.amax * factor


SPOILS = {
    "input not calibrated": lambda chunks: _linear(chunks).input_quantizer.reset_amax(),
    "input differs": lambda chunks: _scaled(_linear(chunks).input_quantizer, 2.0),
    "weight differs": lambda chunks: _scaled(_linear(chunks).weight_quantizer, 2.0),
    "input is zero": lambda chunks: _scaled(_linear(chunks).input_quantizer, 0.0),
    "input is nan": lambda chunks: _scaled(_linear(chunks).input_quantizer, float("nan")),
    "weight is infinite": lambda chunks: _scaled(_linear(chunks).weight_quantizer, float("inf")),
    "not quantised here": lambda chunks: _linear(chunks).weight_quantizer.disable(),
    "output quantised": lambda chunks: _linear(chunks).output_quantizer.enable(),
    "weight is nan": lambda chunks: _linear(chunks).weight.data[3].fill_(float("nan")),
}


def refuse(
    path: str,
    layout: dict[str, Any],
    out: str,
    spoil: str,
    *,
    name: str = "fp8",
    everywhere: bool = False,
    options: dict[str, Any] | None = None,
) -> str:
    """Export after the last rank (or each) spoiled its model; what this rank is told."""
    import warnings

    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized
    from bridge_quant_export.live import files, one_writer

    warnings.simplefilter("ignore")
    last = everywhere or dist.get_rank() == dist.get_world_size() - 1
    bridge = AutoBridge.from_hf_pretrained(path)
    kind = one_writer.OwnedFiles if (options or {}).get("one_writer_per_file") else files.PackedFiles
    original_pack, original_put = files.pack, kind.put
    with host_backend():
        pg, chunks = build_loaded(bridge, layout, "host", grouped=True)
        if spoil != "not quantised":
            quantise(chunks, pg, name)
        if last and spoil in SPOILS:
            SPOILS[spoil](chunks)
        if last and spoil == "packing fails":
            files.pack = _no_memory
        if last and spoil == "a tensor is forgotten":
            kind.put = _forgetful(original_put)
        try:
            export_quantized(chunks, out, bridge=bridge, groups=pg, **(options or {}))
        except (BridgeError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            files.pack, kind.put = original_pack, original_put
    return "no error"


def _no_memory(*args: Any, **kwargs: Any) -> None:
    raise MemoryError("no memory left on this rank")


def _forgetful(put: Any) -> Any:
    def some(self: Any, name: str, tensor: Any, piece: Any) -> None:
        if not name.endswith("layers.2.mlp.down_proj.weight"):
            put(self, name, tensor, piece)

    return some


def uncalibrated_experts(path: str, layout: dict[str, Any], out: str, name: str, policy: str) -> tuple[str, Any]:
    """Export after expert 1 of layer 2 was never reached, wherever it is; `SequentialMLP`, a quantiser for each expert.

    Returns:
        What this rank was told, and its report.
    """
    import warnings

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        pg, chunks = build_loaded(bridge, layout, "host", grouped=False)
        quantise(chunks, pg, name)
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                if layer.layer_number == 3:
                    experts = layer.mlp.experts.local_experts
                    first = pg.ep.rank() * len(experts)
                    for number, expert in enumerate(experts, first):
                        _scaled(expert.linear_fc1.input_quantizer, 1 + number)
                        if number == 1:
                            expert.linear_fc1.input_quantizer.reset_amax()
        try:
            return "no error", export_quantized(chunks, out, bridge=bridge, groups=pg, uncalibrated=policy)
        except BridgeError as error:
            return f"{type(error).__name__}: {error}", None


def export_often(path: str, layout: dict[str, Any], out: str, times: int) -> list[int]:
    """The same export again and again, with ranks that come late by chance; sizes of what each reads afterwards."""
    import json
    import random
    import time
    import warnings
    from pathlib import Path

    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized
    from bridge_quant_export.folders.open import open_quantized
    from bridge_quant_export.live import files

    warnings.simplefilter("ignore")
    chance = random.Random(dist.get_rank())
    original = files.pack

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(chance.random() * 0.002)
        return original(*args, **kwargs)

    bridge = AutoBridge.from_hf_pretrained(path)
    sizes = []
    with host_backend():
        pg, chunks = build_loaded(bridge, layout, "host", grouped=True)
        quantise(chunks, pg, "fp8")
        files.pack = late
        try:
            for _ in range(times):
                time.sleep(chance.random() * 0.01)
                export_quantized(
                    chunks, out, bridge=bridge, groups=pg, overwrite=True, max_shard_size=100_000, format="modelopt"
                )
                json.loads(Path(out, "model.safetensors.index.json").read_text())
                json.loads(Path(out, "hf_quant_config.json").read_text())
                found = open_quantized(out)
                assert not found.wrong, found.wrong
                sizes.append(len(found.folder.tensors))
                dist.barrier()  # nobody replaces what another still reads
        finally:
            files.pack = original
    return sizes


def load_packed(path: str, layout: dict[str, Any], out: str, *, one_reader: bool = False) -> Any:
    """Load a packed folder into a live model, and save the model's weights plain; this rank's report of loading."""
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    options = {"one_reader_per_node": True, "node_group": dist.group.WORLD} if one_reader else {}
    with host_backend():
        _, pg, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
        report = bridge.load_hf_weights(chunks, groups=pg, **options)
        bridge.save_hf_pretrained(chunks, out, groups=pg, dtype="bfloat16")
    return report

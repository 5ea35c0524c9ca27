"""`hf_quant_config.json` and `quantization_config` as ModelOpt 0.47 writes them.

Sources: export/quant_utils.py (`process_layer_quant_config`) and export/convert_hf_config.py. Readers take one or the
other: vLLM and SGLang prefer `config.json`, TensorRT-LLM the file of its own; both are written from the same facts.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from bridge_core.errors import ConfigError
from bridge_quant_export.configs.layers import QuantizedLayers, fused_name
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats.format import Format
from bridge_quant_export.readers import check_mixture, check_writable

HF_QUANT_CONFIG = "hf_quant_config.json"

# TensorRT-LLM knows `fp8_pb_wo` in lower case only, vLLM in any; SGLang refuses it in lower case and would read it
# as FP8 per tensor in upper case.
ALGORITHMS = {
    "fp8": "FP8",
    "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8_block": "fp8_pb_wo",
    "nvfp4": "NVFP4",
    "w4a16_nvfp4": "W4A16_NVFP4",
    "w4a8_mxfp4_fp8": "W4A8_MXFP4_FP8",
    "mxfp8": "MXFP8",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "int8_weight_only": "W8A16",
}
_GROUPED = ("nvfp4", "w4a16_nvfp4", "w4a8_mxfp4_fp8", "mxfp8", "int4_awq", "w4a8_awq")
_SCALED_INPUTS = {"has_zero_point": False, "pre_quant_scale": True}

_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_INT4 = {"dynamic": False, "num_bits": 4, "type": "int"}
_MXFP8 = {**_FP8, "group_size": 32}
# What stands in `config_groups`. Readers of this format go by `quant_algo`; SGLang takes NVFP4's group size from here.
_GROUPS: dict[str, dict[str, Any]] = {
    "fp8": {"input_activations": _FP8, "weights": _FP8},
    "fp8_channel": {"input_activations": _FP8, "weights": {**_FP8, "strategy": "channel"}},
    "nvfp4": {"input_activations": _FP4, "weights": _FP4},
    "w4a16_nvfp4": {"weights": _FP4},
    "w4a8_mxfp4_fp8": {"input_activations": _FP8, "weights": {**_FP4, "group_size": 32}},
    "mxfp8": {"input_activations": _MXFP8, "weights": _MXFP8},
    "int4_awq": {"weights": _INT4},
    "w4a8_awq": {"input_activations": _FP8, "weights": _INT4},
    "int8_weight_only": {"weights": {"dynamic": False, "num_bits": 8, "type": "int"}},
}
# The formats for which ModelOpt writes a group when all layers have one format.
_ALONE = ("fp8", "nvfp4", "w4a16_nvfp4")


def layer_entry(format: Format) -> dict[str, Any]:
    """What ModelOpt says of one layer: `quant_algo`, and the group size and AWQ's fields where they apply.

    Raises:
        FormatError: ModelOpt's configuration has no word that a reader knows for the format.
    """
    algorithm = ALGORITHMS.get(format.name)
    if algorithm is None:
        raise FormatError(f"no reader of the modelopt format reads {format.title}", expected=", ".join(ALGORITHMS))
    entry: dict[str, Any] = {"quant_algo": algorithm}
    if format.name in _GROUPED:
        entry["group_size"] = format.group_size
    if "pre_quant_scale" in format.needs:
        entry.update(_SCALED_INPUTS)
    return entry


def compose(layers: QuantizedLayers, *, producer_version: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `quantization_config` for `config.json`, and the content of `hf_quant_config.json`.

    Args:
        layers: what is quantised, from all ranks.
        producer_version: version of the ModelOpt that quantised the model; readers look for its name.

    Raises:
        ConfigError: nothing is quantised, fused layers disagree, or a layer that is not quantised would make vLLM
            take one that is for unquantised.
        FormatError: no reader of this format reads one of the formats, or their mixture.
    """
    layers.check()
    for format in layers.formats:
        check_writable("modelopt", format)
    check_mixture("modelopt", list(layers.formats))
    quantization = _quantization(layers)
    _check_shadows(layers)
    producer = {"name": "modelopt", "version": producer_version}
    return _inline(quantization, layers, producer), {"producer": producer, "quantization": quantization}


def _quantization(layers: QuantizedLayers) -> dict[str, Any]:
    kv = "FP8" if layers.fp8_kv_cache else None
    exclude = sorted(layers.unquantized)
    if len(layers.formats) > 1:
        return {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": kv,
            "quantized_layers": {name: layer_entry(layers.quantized[name]) for name in sorted(layers.quantized)},
            "exclude_modules": exclude,
        }
    entry = layer_entry(next(iter(layers.formats)))
    algorithm = entry.pop("quant_algo")
    return {"quant_algo": algorithm, "kv_cache_quant_algo": kv, **entry, "exclude_modules": exclude}


def _inline(quantization: dict[str, Any], layers: QuantizedLayers, producer: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if len(layers.formats) > 1:
        found["config_groups"] = {
            f"group_{index}": {**_group(format), "targets": names}
            for index, (format, names) in enumerate(layers.formats.items())
        }
        found["quantized_layers"] = quantization["quantized_layers"]
    elif (format := next(iter(layers.formats))).name in _ALONE:
        found["config_groups"] = {"group_0": {**_group(format), "targets": ["Linear"]}}
    found["ignore"] = quantization["exclude_modules"]
    found["quant_algo"] = quantization["quant_algo"]
    if layers.fp8_kv_cache:
        found["kv_cache_scheme"] = dict(_FP8)
    found["producer"] = producer
    found["quant_method"] = "modelopt"
    return found


def _group(format: Format) -> dict[str, Any]:
    group = {operand: dict(args) for operand, args in _GROUPS.get(format.name, {}).items()}
    if format.name in ("int4_awq", "w4a8_awq"):
        group["weights"]["group_size"] = format.group_size
    return group


def _check_shadows(layers: QuantizedLayers) -> None:
    # vLLM (model_executor/layers/quantization/modelopt.py, is_layer_excluded) takes a layer for unquantised if an
    # entry is a *part* of its name. Entries are full module names, so that one with dots can only be its beginning.
    names = sorted({form for name in layers.quantized for form in (name, fused_name(name))})
    for entry in sorted(layers.unquantized):
        at = bisect_left(names, entry)
        if "." not in entry:
            at = next((index for index, name in enumerate(names) if entry in name), len(names))
        if at < len(names) and entry in names[at]:
            raise ConfigError(
                "a layer that is not quantised hides one that is from vLLM",
                where=entry,
                expected="a name that no quantised layer's begins with",
                got=names[at],
                fix="write the checkpoint as compressed-tensors, which compares whole names",
            )

"""`quantization_config` of compressed-tensors 0.20 (quantization/quant_config.py, quant_scheme.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

from bridge_quant_export.configs.layers import QuantizedLayers
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats.format import Format
from bridge_quant_export.readers import check_mixture, check_writable

Args = dict[str, Any]


class Scheme(NamedTuple):
    """How compressed-tensors describes a format: its name for the storage, and arguments of both operands."""

    format: str
    weights: Args
    input_activations: Args | None = None


def _float(bits: int, strategy: str, **more: Any) -> Args:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def _int(bits: int, strategy: str, **more: Any) -> Args:
    return {**_float(bits, strategy, **more), "type": "int"}


_E4M3 = "torch.float8_e4m3fn"
_NVFP4 = _float(4, "tensor_group", group_size=16, scale_dtype=_E4M3)
_MXFP4 = _float(4, "group", group_size=32, scale_dtype="torch.uint8")
_MXFP8 = _float(8, "group", group_size=32, scale_dtype="torch.uint8")

SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme("float-quantized", _float(8, "tensor"), _float(8, "tensor")),
    "fp8_channel": Scheme("float-quantized", _float(8, "channel"), _float(8, "token", dynamic=True)),
    # Readers have no block kernels for unquantised inputs: vLLM and TensorRT-LLM quantise them per 128.
    "fp8_block": Scheme(
        "float-quantized",
        _float(8, "block", block_structure=[128, 128]),
        _float(8, "group", group_size=128, dynamic=True),
    ),
    "nvfp4": Scheme("nvfp4-pack-quantized", _NVFP4, {**_NVFP4, "dynamic": "local"}),
    "w4a16_nvfp4": Scheme("nvfp4-pack-quantized", _NVFP4),
    "mxfp4": Scheme("mxfp4-pack-quantized", _MXFP4, {**_MXFP4, "dynamic": True}),
    "w4a16_mxfp4": Scheme("mxfp4-pack-quantized", _MXFP4),
    "mxfp8": Scheme("mxfp8-quantized", _MXFP8, {**_MXFP8, "dynamic": True}),
    "int4": Scheme("pack-quantized", _int(4, "group")),
    "int8_weight_only": Scheme("pack-quantized", _int(8, "channel")),
    "int8": Scheme("int-quantized", _int(8, "channel"), _int(8, "tensor")),
}
"""By format name. INT4's group size is the format's."""

FP8_KV_CACHE = _float(8, "tensor")


def scheme_of(format: Format, *, targets: list[str]) -> dict[str, Any]:
    """A config group: which layers, how their weights and inputs are quantised, and how they are stored.

    Raises:
        FormatError: compressed-tensors has no scheme for the format.
    """
    scheme = SCHEMES.get(format.name)
    if scheme is None:
        raise FormatError(f"compressed-tensors has no scheme for {format.title}", expected=", ".join(SCHEMES))
    weights = dict(scheme.weights)
    if format.name == "int4":
        weights["group_size"] = format.group_size
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": scheme.input_activations and dict(scheme.input_activations),
        "output_activations": None,
        "format": scheme.format,
    }


def compose(layers: QuantizedLayers) -> dict[str, Any]:
    """The `quantization_config` for `config.json`.

    One format: the group targets all linear layers but those in `ignore`. Several: each group names its layers, as
    TensorRT-LLM needs it (it does not know the class of a layer when it reads the configuration).

    Raises:
        ConfigError: nothing is quantised, or fused layers disagree.
        FormatError: no reader of compressed-tensors reads one of the formats.
    """
    layers.check()
    for format in layers.formats:
        check_writable("compressed-tensors", format)
    check_mixture("compressed-tensors", list(layers.formats))
    mixed = len(layers.formats) > 1
    groups = {
        f"group_{index}": scheme_of(format, targets=names if mixed else ["Linear"])
        for index, (format, names) in enumerate(layers.formats.items())
    }
    stored = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(stored) > 1 else next(iter(stored)),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(layers.unquantized),
        "kv_cache_scheme": dict(FP8_KV_CACHE) if layers.fp8_kv_cache else None,
    }

"""SGLang, read at the commits that each entry names."""

from __future__ import annotations

from bridge_quant_export.formats.format import Writer
from bridge_quant_export.readers.compressed_tensors import NEEDS, needs
from bridge_quant_export.readers.reader import SCALAR, Needs, Reader, Takes

_QUANTIZATION = "sgl-project/sglang python/sglang/srt/layers/quantization"
_MODELOPT = f"{_QUANTIZATION}/modelopt_quant.py @ faeb9685"
_SCHEMES = f"{_QUANTIZATION}/compressed_tensors/schemes/compressed_tensors_"

_ONE = Takes(("F32",), SCALAR)
_BY_MODELOPT: dict[str, Needs] = {
    "fp8": Needs(
        tensors={"weight": Takes(("F8_E4M3",), ("N", "K")), "weight_scale": _ONE, "input_scale": _ONE},
        source=f"{_MODELOPT}, ModelOptFp8LinearMethod",
    ),
    "nvfp4": Needs(
        tensors={
            "weight": Takes(("U8",), ("N", "K/2")),
            "weight_scale": Takes(("F8_E4M3",), ("N", "K/16")),
            "weight_scale_2": _ONE,
            "input_scale": _ONE,
        },
        shared=frozenset({"weight_scale_2", "input_scale"}),
        source=f"{_MODELOPT}, ModelOptFp4LinearMethod",
    ),
}
_BY_COMPRESSED_TENSORS = {
    "fp8": "w8a8_fp8.py @ 01d2a3d0",
    "fp8_channel": "w8a8_fp8.py @ 01d2a3d0",
    "nvfp4": "w4a4_nvfp4.py @ 0541d3be",
    "w4a16_nvfp4": "w4a16_nvfp4.py @ 1402ae43",
    "int4": "wNa16.py @ 255632ef",
    "int8_weight_only": "wNa16.py @ 255632ef",
    "int8": "w8a8_int8.py @ 0fbab45d (computes with scales per token)",
}
_UNKNOWN = "its ModelOpt configurations take FP8 and NVFP4 only (modelopt_quant.py, from_config)"
_NO_SCHEME = "no scheme of its compressed-tensors loader was found to take it"

_MODELOPT_WRITER: Writer = "modelopt"
_COMPRESSED_WRITER: Writer = "compressed-tensors"

READER = Reader(
    name="SGLang",
    reads={
        **{(_MODELOPT_WRITER, name): found for name, found in _BY_MODELOPT.items()},
        **{
            (_COMPRESSED_WRITER, name): needs(NEEDS[name], source=f"{_SCHEMES}{source}")
            for name, source in _BY_COMPRESSED_TENSORS.items()
        },
    },
    refuses={
        **{
            (_MODELOPT_WRITER, name): _UNKNOWN
            for name in (
                *("fp8_channel", "fp8_block", "w4a16_nvfp4", "mxfp4", "w4a16_mxfp4", "w4a8_mxfp4_fp8", "mxfp8"),
                *("int4", "int4_awq", "w4a8_awq", "int8", "int8_weight_only", "int8_smoothquant"),
            )
        },
        **{
            (_COMPRESSED_WRITER, name): _NO_SCHEME
            for name in (
                *("fp8_block", "mxfp4", "w4a16_mxfp4", "w4a8_mxfp4_fp8", "mxfp8"),
                *("int4_awq", "w4a8_awq", "int8_smoothquant"),
            )
        },
    },
    mixes={
        # ModelOptMixedPrecisionConfig; which model families take it is up to srt/configs/model_config.py.
        "modelopt": frozenset(_BY_MODELOPT),
        "compressed-tensors": frozenset(_BY_COMPRESSED_TENSORS),
    },
    config={
        "modelopt": ("quant_method", "quant_algo", "ignore"),
        "compressed-tensors": ("quant_method", "format", "config_groups", "ignore"),
    },
    own_config={
        "fp8": ("quant_algo", "kv_cache_quant_algo", "exclude_modules"),
        "nvfp4": ("quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"),
    },
)

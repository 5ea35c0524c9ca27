"""vLLM, read at the commits that each entry names."""

from __future__ import annotations

from bridge_quant_export.formats.format import Writer
from bridge_quant_export.readers.compressed_tensors import NEEDS, needs
from bridge_quant_export.readers.reader import SCALAR, Needs, Reader, Takes

_QUANTIZATION = "vllm-project/vllm vllm/model_executor/layers/quantization"
_MODELOPT = f"{_QUANTIZATION}/modelopt.py @ 00155cde"
_SCHEMES = f"{_QUANTIZATION}/compressed_tensors/schemes/compressed_tensors_"

_CODES = Takes(("F8_E4M3",), ("N", "K"))
_ONE = Takes(("F32",), SCALAR)
_NVFP4 = {
    "weight": Takes(("U8",), ("N", "K/2")),
    "weight_scale": Takes(("F8_E4M3",), ("N", "K/16")),
    "weight_scale_2": _ONE,
}

# The loaders take the largest of the fused layers' second-level scales and do not rescale the blocks of the others.
_SHARED = frozenset({"weight_scale_2", "input_scale"})

_BY_MODELOPT: dict[str, Needs] = {
    "fp8": Needs(
        # Without its input scale a layer computes with the lowest number of fp32.
        tensors={"weight": _CODES, "weight_scale": _ONE, "input_scale": _ONE},
        source=f"{_MODELOPT}, ModelOptFp8LinearMethod",
    ),
    "fp8_channel": Needs(
        tensors={"weight": _CODES, "weight_scale": Takes(("F32",), ("N",))},
        source=f"{_MODELOPT}, ModelOptFp8PcPtLinearMethod",
    ),
    "fp8_block": Needs(
        tensors={"weight": _CODES, "weight_scale": Takes(("F32",), ("N/128", "1", "K/128", "1"))},
        source=f"{_MODELOPT}, ModelOptFp8PbWoLinearMethod (dense layers only)",
    ),
    "nvfp4": Needs(
        # A missing input scale is memory that nobody wrote.
        tensors={**_NVFP4, "input_scale": _ONE},
        shared=_SHARED,
        source=f"{_MODELOPT}, ModelOptNvFp4LinearMethod",
    ),
    "w4a16_nvfp4": Needs(
        tensors=_NVFP4,
        optional=frozenset({"input_scale"}),
        shared=frozenset({"weight_scale_2"}),
        source=f"{_MODELOPT}, ModelOptNvFp4W4A16LinearMethod",
    ),
    "mxfp8": Needs(
        tensors={"weight": _CODES, "weight_scale": Takes(("U8",), ("N", "K/32"))},
        source=f"{_MODELOPT}, ModelOptMxFp8LinearMethod",
    ),
}
_BY_COMPRESSED_TENSORS = {
    "fp8": "w8a8_fp8.py @ 00cb05c3",
    "fp8_channel": "w8a8_fp8.py @ 00cb05c3",
    "fp8_block": "w8a8_fp8.py @ 00cb05c3",
    "nvfp4": "w4a4_nvfp4.py @ 0094cb9b",
    "w4a16_nvfp4": "w4a16_nvfp4.py @ 17b6501a",
    "mxfp4": "w4a16_mxfp4.py @ 1a6da548 (inputs are not quantised)",
    "w4a16_mxfp4": "w4a16_mxfp4.py @ 1a6da548",
    "mxfp8": "w8a8_mxfp8.py @ 109f2f21",
    "int4": "wNa16.py @ 519b90d4",
    "int8_weight_only": "wNa16.py @ 519b90d4",
    "int8": "w8a8_int8.py @ 00ba7ff1",
}
_UNKNOWN = "its list of ModelOpt algorithms does not have it (modelopt.py, QUANT_ALGOS)"
_NO_SCALED_INPUTS = "compressed-tensors has no tensor for a pre_quant_scale"

_MODELOPT_WRITER: Writer = "modelopt"
_COMPRESSED_WRITER: Writer = "compressed-tensors"

READER = Reader(
    name="vLLM",
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
                *("mxfp4", "w4a16_mxfp4", "w4a8_mxfp4_fp8", "int4", "int4_awq", "w4a8_awq"),
                *("int8", "int8_weight_only", "int8_smoothquant"),
            )
        },
        **{(_COMPRESSED_WRITER, name): _NO_SCALED_INPUTS for name in ("int4_awq", "w4a8_awq", "int8_smoothquant")},
        (_COMPRESSED_WRITER, "w4a8_mxfp4_fp8"): "its MXFP4 scheme runs with unquantised inputs",
    },
    mixes={
        # modelopt.py, ModelOptMixedPrecisionConfig.get_quant_method: any other layer is taken for unquantised.
        "modelopt": frozenset({"fp8", "nvfp4", "w4a16_nvfp4"}),
        "compressed-tensors": frozenset(_BY_COMPRESSED_TENSORS),
    },
    config={
        "modelopt": ("quant_method", "quant_algo", "ignore"),
        "compressed-tensors": ("quant_method", "format", "config_groups", "ignore"),
    },
    own_config={
        "nvfp4": ("quant_algo", "group_size", "kv_cache_quant_algo", "exclude_modules"),
        "w4a16_nvfp4": ("quant_algo", "group_size", "kv_cache_quant_algo", "exclude_modules"),
        "mxfp8": ("quant_algo", "kv_cache_quant_algo", "exclude_modules"),
    },
)

"""TensorRT-LLM's PyTorch backend, read at the commits that each entry names."""

from __future__ import annotations

from bridge_quant_export.formats.format import Writer
from bridge_quant_export.readers.reader import MODEL_DTYPES, SCALAR, Needs, Reader, Takes

_LINEAR = "NVIDIA/TensorRT-LLM tensorrt_llm/_torch/modules/linear.py @ 00bbf71e"

_CODES = Takes(("F8_E4M3",), ("N", "K"))
_ONE = Takes(("F32",), SCALAR)
_INT4 = {
    "weight": Takes(("U8", "I8"), ("N/2", "K")),
    "weight_scale": Takes(MODEL_DTYPES, ("N", "K/G")),
    # In the model's dtype: the loader of W4A8 compares, that of W4A16 multiplies inputs with it.
    "pre_quant_scale": Takes(("BF16", "F16"), ("K",)),
}

_BY_MODELOPT: dict[str, Needs] = {
    "fp8": Needs(
        tensors={"weight": _CODES, "weight_scale": _ONE, "input_scale": _ONE}, source=f"{_LINEAR}, FP8QDQLinearMethod"
    ),
    "fp8_channel": Needs(
        tensors={"weight": _CODES, "weight_scale": Takes(("F32",), ("N",))}, source=f"{_LINEAR}, FP8RowwiseLinearMethod"
    ),
    "fp8_block": Needs(
        tensors={"weight": _CODES, "weight_scale": Takes(("F32",), ("N/128", "1", "K/128", "1"))},
        source=f"{_LINEAR}, FP8BlockScalesLinearMethod",
    ),
    "nvfp4": Needs(
        tensors={
            "weight": Takes(("U8",), ("N", "K/2")),
            "weight_scale": Takes(("F8_E4M3",), ("N", "K/16")),
            "weight_scale_2": _ONE,
            "input_scale": _ONE,
        },
        shared=frozenset({"weight_scale_2", "input_scale"}),  # asserted
        source=f"{_LINEAR}, NVFP4LinearMethod",
    ),
    "w4a8_mxfp4_fp8": Needs(
        tensors={"weight": Takes(("U8",), ("N", "K/2")), "weight_scale": Takes(("U8",), ("N", "K/32"))},
        source=f"{_LINEAR}, W4A8MXFP4FP8LinearMethod",
    ),
    "int8_weight_only": Needs(
        tensors={"weight": Takes(("I8",), ("N", "K")), "weight_scale": Takes(MODEL_DTYPES, ("N",))},
        source=f"{_LINEAR}, WeightOnlyQuantLinearMethod",
    ),
    "int4_awq": Needs(tensors=_INT4, source=f"{_LINEAR}, W4A16_AWQ_LinearMethod"),
    "w4a8_awq": Needs(
        tensors={**_INT4, "weight_scale_2": _ONE, "input_scale": _ONE},
        shared=frozenset({"weight_scale_2", "input_scale", "pre_quant_scale"}),
        source=f"{_LINEAR}, W4A8_AWQ_LinearMethod",
    ),
}
_NO_METHOD = "get_quant_method has no linear layer for it (linear.py)"
_COMPRESSED = (
    "it maps the configuration of compressed-tensors to its own algorithms, but looks for tensors under ModelOpt's "
    "names and shapes, unless the adapter of a model renames them"
)

_MODELOPT_WRITER: Writer = "modelopt"
_COMPRESSED_WRITER: Writer = "compressed-tensors"

_REFUSED = {
    **dict.fromkeys(("w4a16_nvfp4", "mxfp4", "w4a16_mxfp4", "mxfp8", "int8", "int8_smoothquant"), _NO_METHOD),
    "int4": "W4A16_AWQ_LinearMethod requires a pre_quant_scale (linear.py)",
}

READER = Reader(
    name="TensorRT-LLM",
    reads={(_MODELOPT_WRITER, name): found for name, found in _BY_MODELOPT.items()},
    refuses={
        **{(_MODELOPT_WRITER, name): reason for name, reason in _REFUSED.items()},
        **{(_COMPRESSED_WRITER, name): _COMPRESSED for name in (*_BY_MODELOPT, *_REFUSED)},
    },
    # _torch/model_config.py @ 008e0af8, _build_modelopt_quant_config: any algorithm per layer.
    mixes={"modelopt": frozenset(_BY_MODELOPT)},
    # quantization/modelopt_config.py @ 2edf354d, read_modelopt_quant_config.
    config={"modelopt": ("producer", "quant_method", "quant_algo", "ignore")},
    own_config={
        **dict.fromkeys(_BY_MODELOPT, ("quant_algo", "kv_cache_quant_algo", "exclude_modules")),
        **dict.fromkeys(
            ("int4_awq", "w4a8_awq"),
            ("quant_algo", "kv_cache_quant_algo", "exclude_modules", "group_size", "has_zero_point", "pre_quant_scale"),
        ),
    },
)

"""What compressed-tensors 0.20 itself, and with it transformers 5, requires; engines that read it require the same.

Suffixes: `compression_param_names` of compressors/*/base.py. Shapes: what the compressors make, and for scales
quantization/lifecycle/initialize.py, `initialize_qparams`.
"""

from __future__ import annotations

from dataclasses import replace

from bridge_quant_export.formats.format import Writer
from bridge_quant_export.readers.reader import MODEL_DTYPES, SCALAR, Needs, Reader, Takes

_CODES = Takes(("F8_E4M3",), ("N", "K"))
_ONE = Takes(("F32",), SCALAR)
_CHANNELS = Takes(MODEL_DTYPES, ("N", "1"))
_WHOLE = Takes(("I64",), ("2",))
_NVFP4 = {
    "weight_packed": Takes(("U8",), ("N", "K/2")),
    "weight_scale": Takes(("F8_E4M3",), ("N", "K/16")),
    "weight_global_scale": _ONE,
}
_MXFP4 = {"weight_packed": Takes(("U8",), ("N", "K/2")), "weight_scale": Takes(("U8",), ("N", "K/32"))}
_AT = "compressed-tensors 0.20.0 compressed_tensors/compressors"

NEEDS: dict[str, Needs] = {
    "fp8": Needs(
        tensors={"weight": _CODES, "weight_scale": _ONE, "input_scale": _ONE}, source=f"{_AT}/naive_quantized/base.py"
    ),
    "fp8_channel": Needs(
        tensors={"weight": _CODES, "weight_scale": _CHANNELS}, source=f"{_AT}/naive_quantized/base.py"
    ),
    "fp8_block": Needs(
        tensors={"weight": _CODES, "weight_scale": Takes(("F32",), ("ceil(N/128)", "ceil(K/128)"))},
        source=f"{_AT}/naive_quantized/base.py",
    ),
    "nvfp4": Needs(
        tensors={**_NVFP4, "input_global_scale": _ONE},
        shared=frozenset({"weight_global_scale", "input_global_scale"}),
        source=f"{_AT}/nvfp4/base.py",
    ),
    "w4a16_nvfp4": Needs(tensors=_NVFP4, shared=frozenset({"weight_global_scale"}), source=f"{_AT}/nvfp4/base.py"),
    "mxfp4": Needs(tensors=_MXFP4, source=f"{_AT}/mxfp4/base.py"),
    "w4a16_mxfp4": Needs(tensors=_MXFP4, source=f"{_AT}/mxfp4/base.py"),
    "mxfp8": Needs(
        tensors={"weight": _CODES, "weight_scale": Takes(("U8",), ("N", "K/32"))}, source=f"{_AT}/mxfp8/base.py"
    ),
    "int4": Needs(
        tensors={
            "weight_packed": Takes(("I32",), ("N", "K/8")),
            "weight_scale": Takes(MODEL_DTYPES, ("N", "K/G")),
            "weight_shape": _WHOLE,
        },
        source=f"{_AT}/pack_quantized/base.py",
    ),
    "int8_weight_only": Needs(
        tensors={
            "weight_packed": Takes(("I32",), ("N", "K/4")),
            "weight_scale": _CHANNELS,
            "weight_shape": _WHOLE,
        },
        source=f"{_AT}/pack_quantized/base.py",
    ),
    "int8": Needs(
        tensors={"weight": Takes(("I8",), ("N", "K")), "weight_scale": _CHANNELS, "input_scale": _ONE},
        source=f"{_AT}/naive_quantized/base.py",
    ),
}
"""By format name."""


def needs(found: Needs, *, source: str) -> Needs:
    """The same requirements, as another loader states them."""
    return replace(found, source=source)


_WRITER: Writer = "compressed-tensors"
_OTHER: Writer = "modelopt"
_NOT_MODELOPT = "it has no quantiser for the modelopt format, and would load codes as weights without their scales"
_NO_SCHEME = {
    **dict.fromkeys(
        ("int4_awq", "w4a8_awq", "int8_smoothquant"), "compressed-tensors has no tensor for a pre_quant_scale"
    ),
    "w4a8_mxfp4_fp8": "its only scheme with these operands quantises inputs per 128, not with one scale",
}

READER = Reader(
    name="transformers",
    reads={(_WRITER, name): found for name, found in NEEDS.items()},
    refuses={
        **{(_WRITER, name): reason for name, reason in _NO_SCHEME.items()},
        # transformers 5.23, quantizers/auto.py
        **{(_OTHER, name): _NOT_MODELOPT for name in (*NEEDS, *_NO_SCHEME)},
    },
    mixes={"compressed-tensors": frozenset(NEEDS)},
    config={"compressed-tensors": ("quant_method", "format", "quantization_status", "config_groups", "ignore")},
)

"""INT8 with one scale per output channel: weights only, with a static INT8 input, or that with SmoothQuant.

Tensors: ModelOpt 0.47, export/quant_utils.py (`W8A16`, `W8A8_SQ_PER_CHANNEL`); compressed-tensors 0.20,
compressors/naive_quantized for quantised inputs. Weights only go into int32 words there (compressors/pack_quantized):
vLLM has no scheme for bare int8 weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import Calibration, Format, Parts, Stored, cols, fixed, rows
from bridge_quant_export.formats.names import WHOLE_SHAPE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST = 127.0


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols]` int8, scale `[rows]` fp32; input scale `[]` and pre_quant_scale `[cols]` if calibrated."""
    import torch

    from bridge_quant_export.codes.rows import row_runs

    assert calibration.weight is not None
    scale = calibration.weight / LARGEST
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for span, run in row_runs(weight):
        codes[span] = (run / scale[span, None]).round_().clamp_(-128, 127)
    parts = {"codes": codes, "scale": scale}
    if calibration.input is not None:
        parts["input_scale"] = calibration.input / LARGEST
    if calibration.pre_quant_scale is not None:
        parts["pre_quant_scale"] = calibration.pre_quant_scale
    return parts


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times the scale of their row."""
    return (parts["codes"].float() * parts["scale"][:, None]).to(dtype)


_PARTS = {"codes": (rows(), cols()), "scale": (rows(),)}
_CODES = Stored("weight", "codes", "I8", (rows(), cols()))
_MODELOPT = (_CODES, Stored("weight_scale", "scale", "F32", (rows(),)))
_COLUMN = Stored("weight_scale", "scale", "F32", (rows(), fixed()))
_INPUT = Stored("input_scale", "input_scale", "F32", (fixed(),))

WEIGHT_ONLY = Format(
    name="int8_weight_only",
    title="INT8 weights with unquantised inputs",
    parts=_PARTS,
    amax=(rows(),),
    stores={
        "modelopt": _MODELOPT,
        "compressed-tensors": (
            Stored("weight_packed", "codes", "I32", (rows(), cols(4)), "words of 8"),
            _COLUMN,
            Stored("weight_shape", WHOLE_SHAPE, "I64", (fixed(2),)),
        ),
    },
    quantize=pack,
    dequantize=unpack,
)

FORMAT = Format(
    name="int8",
    title="INT8 weights and inputs",
    parts={**_PARTS, "input_scale": ()},
    amax=(rows(),),
    needs=frozenset({"input"}),
    stores={"modelopt": (*_MODELOPT, _INPUT), "compressed-tensors": (_CODES, _COLUMN, _INPUT)},
    quantize=pack,
    dequantize=unpack,
)

SMOOTHQUANT = Format(
    name="int8_smoothquant",
    title="INT8 SmoothQuant",
    parts={**_PARTS, "input_scale": (), "pre_quant_scale": (cols(),)},
    amax=(rows(),),
    needs=frozenset({"input", "pre_quant_scale"}),
    stores={
        "modelopt": (*_MODELOPT, _INPUT, Stored("pre_quant_scale", "pre_quant_scale", None, (cols(),))),
    },
    quantize=pack,
    dequantize=unpack,
)

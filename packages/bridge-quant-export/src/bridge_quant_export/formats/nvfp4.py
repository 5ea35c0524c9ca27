"""NVFP4: E2M1 codes, an E4M3 scale for every 16 along a row, an fp32 scale for the tensor; with or without FP4 inputs.

Tensors: ModelOpt 0.47, quantization/qtensor/nvfp4_tensor.py; compressed-tensors 0.20, compressors/nvfp4, which stores
the reciprocals of the tensor's and the input's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import Calibration, Format, Parts, Stored, cols, fixed, rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 16


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols / 2]` uint8, scale `[rows, cols / 16]` e4m3, scale_2 (and input_scale) `[]` fp32.

    A block of zeros has the scale 1. A block beyond the calibrated range of the tensor is clipped to it.
    """
    import torch

    from bridge_quant_export.codes import e2m1, e4m3
    from bridge_quant_export.codes.rows import block_amax, row_runs

    assert calibration.weight is not None
    height, width = weight.shape
    scale_2 = calibration.weight / (e2m1.MAX * e4m3.MAX)
    codes = torch.empty(height, width // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(height, width // BLOCK, dtype=torch.float8_e4m3fn, device=weight.device)
    for span, run in row_runs(weight):
        level = block_amax(run, BLOCK) / (e2m1.MAX * scale_2)
        level[level == 0] = 1.0
        # Not below the smallest code: a scale of zero would divide by zero.
        scale[span] = e4m3.encode(level.clamp_(min=e4m3.TINY))
        divisor = scale[span].float() * scale_2
        codes[span] = e2m1.encode((run.view(-1, BLOCK) / divisor.view(-1, 1)).view_as(run))
    parts = {"codes": codes, "scale": scale, "scale_2": scale_2}
    if calibration.input is not None:
        parts["input_scale"] = calibration.input / (e2m1.MAX * e4m3.MAX)
    return parts


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times the scale of their block times that of the tensor."""
    from bridge_quant_export.codes import e2m1

    values = e2m1.decode(parts["codes"])
    scale = parts["scale"].float() * parts["scale_2"]
    return (values.view(-1, BLOCK) * scale.view(-1, 1)).view_as(values).to(dtype)


_PARTS = {"codes": (rows(), cols(2)), "scale": (rows(), cols(BLOCK)), "scale_2": ()}
_MODELOPT = (
    Stored("weight", "codes", "U8", (rows(), cols(2))),
    Stored("weight_scale", "scale", "F8_E4M3", (rows(), cols(BLOCK))),
    Stored("weight_scale_2", "scale_2", "F32", ()),
)
_COMPRESSED_TENSORS = (
    Stored("weight_packed", "codes", "U8", (rows(), cols(2))),
    Stored("weight_scale", "scale", "F8_E4M3", (rows(), cols(BLOCK))),
    Stored("weight_global_scale", "scale_2", "F32", (fixed(),), "reciprocal"),
)

W4A16 = Format(
    name="w4a16_nvfp4",
    title="NVFP4 weights with unquantised inputs",
    parts=_PARTS,
    amax=(),
    group_size=BLOCK,
    stores={"modelopt": _MODELOPT, "compressed-tensors": _COMPRESSED_TENSORS},
    quantize=pack,
    dequantize=unpack,
)

FORMAT = Format(
    name="nvfp4",
    title="NVFP4",
    parts={**_PARTS, "input_scale": ()},
    amax=(),
    needs=frozenset({"input"}),
    group_size=BLOCK,
    stores={
        "modelopt": (*_MODELOPT, Stored("input_scale", "input_scale", "F32", ())),
        "compressed-tensors": (
            *_COMPRESSED_TENSORS,
            Stored("input_global_scale", "input_scale", "F32", (fixed(),), "reciprocal"),
        ),
    },
    quantize=pack,
    dequantize=unpack,
)

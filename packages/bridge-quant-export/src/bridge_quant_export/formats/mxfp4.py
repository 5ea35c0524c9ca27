"""MXFP4: E2M1 codes and a power of two for every 32 along a row; inputs in MXFP4, in FP8, or not quantised.

Tensors: ModelOpt 0.47, quantization/qtensor/mxfp4_tensor.py; compressed-tensors 0.20, compressors/mxfp4. The power
of two is the least that brings a block into range, as ModelOpt has it, not the rounding of the OCP text. ModelOpt
rounds ties away from the even code, towards zero, and writes zero as -0; here ties go to even codes and zero is +0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import Calibration, Format, Parts, Stored, Writer, cols, rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 32


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols / 2]` uint8, scale `[rows, cols / 32]` E8M0 as uint8."""
    import torch

    from bridge_quant_export.codes import e2m1, e8m0
    from bridge_quant_export.codes.rows import block_amax, row_runs

    height, width = weight.shape
    codes = torch.empty(height, width // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(height, width // BLOCK, dtype=torch.uint8, device=weight.device)
    for span, run in row_runs(weight):
        scale[span] = e8m0.encode_range(block_amax(run, BLOCK), e2m1.MAX)
        divisor = e8m0.decode(scale[span])
        codes[span] = e2m1.encode((run.view(-1, BLOCK) / divisor.view(-1, 1)).view_as(run))
    return {"codes": codes, "scale": scale}


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times the power of two of their block."""
    from bridge_quant_export.codes import e2m1, e8m0

    values = e2m1.decode(parts["codes"])
    return (values.view(-1, BLOCK) * e8m0.decode(parts["scale"]).view(-1, 1)).view_as(values).to(dtype)


_PARTS = {"codes": (rows(), cols(2)), "scale": (rows(), cols(BLOCK))}
_MODELOPT = (
    Stored("weight", "codes", "U8", (rows(), cols(2))),
    Stored("weight_scale", "scale", "U8", (rows(), cols(BLOCK))),
)
_COMPRESSED_TENSORS = (
    Stored("weight_packed", "codes", "U8", (rows(), cols(2))),
    Stored("weight_scale", "scale", "U8", (rows(), cols(BLOCK))),
)


def _format(name: str, title: str, stores: Mapping[Writer, tuple[Stored, ...]]) -> Format:
    return Format(
        name=name,
        title=title,
        parts=_PARTS,
        amax=None,
        group_size=BLOCK,
        stores=stores,
        quantize=pack,
        dequantize=unpack,
    )


_BOTH: Mapping[Writer, tuple[Stored, ...]] = {"modelopt": _MODELOPT, "compressed-tensors": _COMPRESSED_TENSORS}

FORMAT = _format("mxfp4", "MXFP4", _BOTH)
W4A16 = _format("w4a16_mxfp4", "MXFP4 weights with unquantised inputs", _BOTH)
W4A8 = _format("w4a8_mxfp4_fp8", "MXFP4 weights with FP8 inputs", {"modelopt": _MODELOPT})

"""MXFP8: E4M3 codes and a power of two for every 32 along a row; inputs likewise, when they arrive.

Tensors: ModelOpt 0.47, quantization/qtensor/mxfp8_tensor.py; compressed-tensors 0.20, compressors/mxfp8. The power of
two is the least that brings a block into range, not the rounding of the OCP text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import Calibration, Format, Parts, Stored, cols, rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 32


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols]` e4m3, scale `[rows, cols / 32]` E8M0 as uint8."""
    import torch

    from bridge_quant_export.codes import e4m3, e8m0
    from bridge_quant_export.codes.rows import block_amax, row_runs

    height, width = weight.shape
    codes = torch.empty(height, width, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(height, width // BLOCK, dtype=torch.uint8, device=weight.device)
    for span, run in row_runs(weight):
        scale[span] = e8m0.encode_range(block_amax(run, BLOCK), e4m3.MAX)
        divisor = e8m0.decode(scale[span])
        codes[span] = e4m3.encode(run.view(-1, BLOCK) / divisor.view(-1, 1)).view(run.shape)
    return {"codes": codes, "scale": scale}


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times the power of two of their block."""
    from bridge_quant_export.codes import e8m0

    values = parts["codes"].float()
    return (values.view(-1, BLOCK) * e8m0.decode(parts["scale"]).view(-1, 1)).view_as(values).to(dtype)


_STORED = (
    Stored("weight", "codes", "F8_E4M3", (rows(), cols())),
    Stored("weight_scale", "scale", "U8", (rows(), cols(BLOCK))),
)

FORMAT = Format(
    name="mxfp8",
    title="MXFP8",
    parts={"codes": (rows(), cols()), "scale": (rows(), cols(BLOCK))},
    amax=None,
    group_size=BLOCK,
    stores={"modelopt": _STORED, "compressed-tensors": _STORED},
    quantize=pack,
    dequantize=unpack,
)

"""FP8, one scale per block of 128 x 128, as DeepSeek-V3 has it; readers quantise inputs per 128 when they arrive.

Tensors: ModelOpt 0.47, `FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG`, whose exporter keeps the scale's four dims;
compressed-tensors 0.20, preset `FP8_BLOCK`. The last block of a dim may be cut short in compressed-tensors, which
pads when it computes; vLLM refuses that in the ModelOpt format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import Calibration, Format, Parts, Stored, cols, fixed, rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 128
_BLOCKS = (rows(BLOCK, partial=True), cols(BLOCK, partial=True))


def _along_columns(scale: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, dim=-1)[..., :width]


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols]` e4m3, scale `[ceil(rows / 128), ceil(cols / 128)]` fp32."""
    import torch

    from bridge_quant_export.codes import e4m3
    from bridge_quant_export.codes.rows import row_runs

    assert calibration.weight is not None
    scale = calibration.weight / e4m3.MAX
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for first in range(scale.shape[0]):
        band = weight[first * BLOCK : (first + 1) * BLOCK]
        divisor = _along_columns(scale[first], weight.shape[1])
        for span, run in row_runs(band):
            codes[first * BLOCK : (first + 1) * BLOCK][span] = e4m3.encode(run / divisor)
    return {"codes": codes, "scale": scale}


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times the scale of their block."""
    codes, scale = parts["codes"], parts["scale"]
    spread = _along_columns(scale, codes.shape[1]).repeat_interleave(BLOCK, dim=0)[: codes.shape[0]]
    return (codes.float() * spread).to(dtype)


FORMAT = Format(
    name="fp8_block",
    title="FP8 with one scale per 128 x 128 block",
    parts={"codes": (rows(), cols()), "scale": _BLOCKS},
    amax=_BLOCKS,
    group_size=BLOCK,
    stores={
        "modelopt": (
            Stored("weight", "codes", "F8_E4M3", (rows(), cols())),
            Stored("weight_scale", "scale", "F32", (rows(BLOCK), fixed(), cols(BLOCK), fixed())),
        ),
        "compressed-tensors": (
            Stored("weight", "codes", "F8_E4M3", (rows(), cols())),
            Stored("weight_scale", "scale", "F32", _BLOCKS),
        ),
    },
    quantize=pack,
    dequantize=unpack,
)

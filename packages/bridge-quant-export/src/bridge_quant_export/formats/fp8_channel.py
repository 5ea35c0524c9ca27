"""FP8, one scale per output channel; inputs are quantised per token when they arrive.

Tensors: ModelOpt 0.47, export/quant_utils.py, `FP8_PER_CHANNEL_PER_TOKEN`; compressed-tensors 0.20, quantization/
quant_scheme.py, preset `FP8_DYNAMIC`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import Calibration, Format, Parts, Stored, cols, fixed, rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols]` e4m3, scale `[rows]` fp32."""
    import torch

    from bridge_quant_export.codes import e4m3
    from bridge_quant_export.codes.rows import row_runs

    assert calibration.weight is not None
    scale = calibration.weight / e4m3.MAX
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for span, run in row_runs(weight):
        codes[span] = e4m3.encode(run / scale[span, None])
    return {"codes": codes, "scale": scale}


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times the scale of their row."""
    return (parts["codes"].float() * parts["scale"][:, None]).to(dtype)


FORMAT = Format(
    name="fp8_channel",
    title="FP8 with one scale per output channel",
    parts={"codes": (rows(), cols()), "scale": (rows(),)},
    amax=(rows(),),
    stores={
        "modelopt": (
            Stored("weight", "codes", "F8_E4M3", (rows(), cols())),
            Stored("weight_scale", "scale", "F32", (rows(),)),
        ),
        "compressed-tensors": (
            Stored("weight", "codes", "F8_E4M3", (rows(), cols())),
            Stored("weight_scale", "scale", "F32", (rows(), fixed())),
        ),
    },
    quantize=pack,
    dequantize=unpack,
)

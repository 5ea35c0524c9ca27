"""FP8, one scale for the whole tensor: E4M3 codes, fp32 scale = range / 448, a static scale for the input.

Tensors: ModelOpt 0.47, export/quant_utils.py (`to_quantized_weight`, `get_scaling_factor`); compressed-tensors 0.20,
compressors/naive_quantized, strategy `tensor`. ModelOpt's Megatron exporter divides in the dtype of the weight; in bf16
that rounds twice and moves about 2% of the codes. Here the division is in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import Calibration, Format, Parts, Stored, cols, fixed, rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

E4M3 = "F8_E4M3"


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols]` e4m3, scale and input scale `[]` fp32."""
    import torch

    from bridge_quant_export.codes import e4m3
    from bridge_quant_export.codes.rows import row_runs

    assert calibration.weight is not None
    assert calibration.input is not None
    scale = calibration.weight / e4m3.MAX
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for span, run in row_runs(weight):
        codes[span] = e4m3.encode(run / scale)
    return {"codes": codes, "scale": scale, "input_scale": calibration.input / e4m3.MAX}


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times scale."""
    return (parts["codes"].float() * parts["scale"]).to(dtype)


FORMAT = Format(
    name="fp8",
    title="FP8 with one scale per tensor",
    parts={"codes": (rows(), cols()), "scale": (), "input_scale": ()},
    amax=(),
    needs=frozenset({"input"}),
    stores={
        "modelopt": (
            Stored("weight", "codes", E4M3, (rows(), cols())),
            Stored("weight_scale", "scale", "F32", ()),
            Stored("input_scale", "input_scale", "F32", (fixed(),)),
        ),
        "compressed-tensors": (
            Stored("weight", "codes", E4M3, (rows(), cols())),
            Stored("weight_scale", "scale", "F32", (fixed(),)),
            Stored("input_scale", "input_scale", "F32", (fixed(),)),
        ),
    },
    quantize=pack,
    dequantize=unpack,
)

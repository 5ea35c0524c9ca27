"""INT4 with an fp32 scale for every group along a row: plain, AWQ (inputs are scaled first), AWQ with FP8 inputs.

Tensors: ModelOpt 0.47, export/quant_utils.py (`pack_int4_in_uint8`), two *rows* to a byte; compressed-tensors 0.20,
compressors/pack_quantized, eight columns to an int32 word. W4A8 quantises twice: the weights after INT4 go to FP8
with a scale of their own, which readers apply when they compute, so that the codes are those of INT4.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from bridge_quant_export.formats.format import (
    Axes,
    Calibration,
    Format,
    Parts,
    Stored,
    Writer,
    cols,
    fixed,
    rows,
)
from bridge_quant_export.formats.names import WHOLE_SHAPE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = 128
LARGEST = 7.0
"""The range goes to 7: with 8, which is the largest in size, one side would be clipped."""


def pack(weight: Tensor, calibration: Calibration) -> Parts:
    """Codes `[rows, cols]` int8 in -8..7, scale `[rows, cols / group]` fp32, and what AWQ and W4A8 add."""
    import torch

    from bridge_quant_export.codes import e4m3
    from bridge_quant_export.codes.rows import row_runs

    assert calibration.weight is not None
    scale = calibration.weight / LARGEST
    group = weight.shape[1] // scale.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for span, run in row_runs(weight):
        values = run.view(-1, group) / scale[span].view(-1, 1)
        codes[span] = values.round_().clamp_(-8, 7).view_as(run)
    parts = {"codes": codes, "scale": scale}
    if calibration.pre_quant_scale is not None:
        parts["pre_quant_scale"] = calibration.pre_quant_scale
    if calibration.weight_2 is not None and calibration.input is not None:
        parts["scale_2"] = calibration.weight_2 / e4m3.MAX
        parts["input_scale"] = calibration.input / e4m3.MAX
    return parts


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes times the scale of their group; through FP8 if there is a second scale."""
    from bridge_quant_export.codes import e4m3

    codes, scale = parts["codes"], parts["scale"]
    group = codes.shape[1] // scale.shape[1]
    values = codes.float().view(-1, group) * scale.view(-1, 1)
    if "scale_2" in parts:
        values = e4m3.encode(values / parts["scale_2"]).float() * parts["scale_2"]
    return values.view(codes.shape).to(dtype)


@cache
def int4(group: int = GROUP) -> Format:
    """INT4 without scaled inputs (`group` elements share a scale)."""
    return _format("int4", "INT4", group, {}, frozenset(), words=True)


@cache
def int4_awq(group: int = GROUP) -> Format:
    """INT4 weights that expect inputs scaled per feature."""
    return _format("int4_awq", "INT4 AWQ", group, _SCALED, frozenset({"pre_quant_scale"}))


@cache
def w4a8_awq(group: int = GROUP) -> Format:
    """INT4 weights and FP8 inputs, scaled per feature."""
    parts: dict[str, Axes] = {**_SCALED, "scale_2": (), "input_scale": ()}
    needs = frozenset({"pre_quant_scale", "weight_2", "input"})
    return _format("w4a8_awq", "W4A8 AWQ", group, parts, needs)


_SCALED: dict[str, Axes] = {"pre_quant_scale": (cols(),)}


def _format(
    name: str, title: str, group: int, extra: dict[str, Axes], needs: frozenset[str], *, words: bool = False
) -> Format:
    scale = (rows(), cols(group))
    stores: dict[Writer, tuple[Stored, ...]] = {
        "modelopt": (
            Stored("weight", "codes", "U8", (rows(2), cols()), "row pairs"),
            Stored("weight_scale", "scale", "F32", scale),
            *(_EXTRA[part] for part in extra),
        )
    }
    if words:
        stores["compressed-tensors"] = (
            Stored("weight_packed", "codes", "I32", (rows(), cols(8)), "words of 4"),
            Stored("weight_scale", "scale", "F32", scale),
            Stored("weight_shape", WHOLE_SHAPE, "I64", (fixed(2),)),
        )
    return Format(
        name=name,
        title=title,
        parts={"codes": (rows(), cols()), "scale": scale, **extra},
        amax=scale,
        needs=needs,
        group_size=group,
        stores=stores,
        quantize=pack,
        dequantize=unpack,
    )


_EXTRA: Mapping[str, Stored] = {
    "pre_quant_scale": Stored("pre_quant_scale", "pre_quant_scale", None, (cols(),)),
    "scale_2": Stored("weight_scale_2", "scale_2", "F32", (fixed(),)),
    "input_scale": Stored("input_scale", "input_scale", "F32", (fixed(),)),
}

"""What ModelOpt's quantisers say of a layer: which format it is to be stored in, and its ranges.

Quantisers are read by their attributes (ModelOpt 0.47, quantization/nn/modules/tensor_quantizer.py); modelopt is not
imported. A `SequentialQuantizer` is an `nn.Sequential` (one weight, twice), a `GroupedQuantizer` an `nn.ModuleList`
(one quantiser for each of the weights of a grouped layer).

Nothing here communicates: ranges are those of this rank. That the ranges of a whole tensor agree over ranks is to be
checked before anything is packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from bridge_core.geometry import Shape
from bridge_quant_export.errors import CalibrationError, FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.format import Calibration, Format

FP8, FP4 = (4, 3), (2, 1)
POWERS_OF_TWO = (8, 0)


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """How one weight is quantised.

    Attributes:
        format: what it is to be stored as.
        calibration: ranges of this rank's part of the weight, and of the layer's input.
    """

    format: Format
    calibration: Calibration


class _Quantizer(NamedTuple):
    """The settings of one quantiser. `bits` is an integer, or exponent and mantissa of a float."""

    bits: Any
    axis: Any
    blocks: dict[int, int | None]
    dynamic: bool
    scale_bits: tuple[int, int] | None
    module: Any

    def __str__(self) -> str:
        found = [f"num_bits {self.bits}"]
        found += [f"axis {self.axis}"] if self.axis is not None else []
        found += [f"blocks {self.blocks}"] if self.blocks else []
        found += ["dynamic"] if self.dynamic else []
        found += [f"scale_bits {self.scale_bits}"] if self.scale_bits else []
        return ", ".join(found)


def _settings(module: Any) -> _Quantizer | None:
    """Settings of a quantiser; None if there is none or it is switched off."""
    if module is None or not module.is_enabled:
        return None
    blocks = dict(module.block_sizes or {})
    kind, scale_bits = blocks.pop("type", None), blocks.pop("scale_bits", None)
    blocks.pop("scale_block_sizes", None)
    bits = tuple(module.num_bits) if isinstance(module.num_bits, list | tuple) else module.num_bits
    dynamic = kind == "dynamic" or bool(getattr(module, "_dynamic", False))
    return _Quantizer(bits, module.axis, blocks, dynamic, scale_bits and tuple(scale_bits), module)


def read_layer(
    layer: nn.Module, *, weight: str = "weight", index: int | None = None, where: object = None
) -> LayerState | None:
    """The format and calibration of one weight of a layer; None if it is not quantised.

    Args:
        layer: a module that ModelOpt quantised, or any other.
        weight: name of the parameter (`weight3` for the fourth of a grouped layer).
        index: which member of a `GroupedQuantizer` belongs to it.
        where: the layer's name, for messages.

    Raises:
        FormatError: quantised in a way that no format stores; says in which.
        CalibrationError: the number of ranges does not fit the weight.
    """
    quantizer: Any = getattr(layer, "weight_quantizer", None)
    if isinstance(quantizer, nn.ModuleList):
        if index is None:
            raise FormatError("a grouped layer has a quantiser for each weight", where=where, expected="an index")
        quantizer = quantizer[index]
    levels = list(quantizer) if isinstance(quantizer, nn.Sequential) else [quantizer]
    settings = [found for found in map(_settings, levels) if found is not None]
    if not settings:
        return None
    inputs = _settings(getattr(layer, "input_quantizer", None))
    scaled = _pre_quant_scale(getattr(layer, "input_quantizer", None))
    if _settings(getattr(layer, "output_quantizer", None)) is not None:
        raise FormatError("no format quantises a layer's output", where=where, fix="disable its output_quantizer")
    format = _format(settings, inputs, scaled is not None, where)
    shape = tuple(getattr(layer, weight).shape)
    return LayerState(format=format, calibration=_calibration(format, settings, inputs, scaled, shape, where))


def read_kv_ranges(attention: nn.Module, *, where: object = None) -> dict[str, Tensor] | None:
    """Ranges of keys (`k`) and values (`v`) of an attention module; None if its KV cache is not quantised.

    Raises:
        FormatError: it is not FP8 with one range each.
        CalibrationError: it was not calibrated, or only one of the two is quantised.
    """
    found = {which: _settings(getattr(attention, f"{which}_bmm_quantizer", None)) for which in ("k", "v")}
    if found["k"] is None and found["v"] is None:
        return None
    ranges = {}
    for which, settings in found.items():
        if settings is None:
            raise CalibrationError(
                "keys and values are quantised together or not at all", where=where, got=f"no {which}"
            )
        if settings.bits != FP8 or settings.blocks or settings.axis is not None:
            raise FormatError("only an FP8 KV cache is stored", where=where, expected="num_bits (4, 3)", got=settings)
        if getattr(settings.module, "_amax", None) is None:
            raise CalibrationError("the KV cache was not calibrated", where=where, got=f"no range of {which}")
        ranges[which] = settings.module._amax
    return ranges


def _pre_quant_scale(quantizer: Any) -> Tensor | None:
    """The scale of inputs; AWQ leaves it on a quantiser that is switched off otherwise."""
    return None if quantizer is None else getattr(quantizer, "pre_quant_scale", None)


def _format(levels: list[_Quantizer], inputs: _Quantizer | None, scaled: bool, where: object) -> Format:
    """The format of a weight's quantisers (one, or two in a row) and its input's.

    Raises:
        FormatError: there is none.
    """
    name = _two_levels(levels, inputs) if len(levels) == 2 else _one_level(levels[0], inputs)
    if scaled:
        name = {"int4": "int4_awq", "int8": "int8_smoothquant", "w4a8_awq": "w4a8_awq"}.get(name or "")
    elif name == "w4a8_awq":
        name = None
    if name is None:
        weights = " then ".join(map(str, levels))
        raise FormatError(
            "no format stores a layer that is quantised like this",
            where=where,
            got=f"weight: {weights}; input: {inputs or 'not quantised'}{', scaled first' if scaled else ''}",
            fix="quantise it with a configuration of modelopt.torch.quantization that a format here names",
        )
    return format_of(name, levels[0].blocks.get(-1) if name in ("int4", "int4_awq", "w4a8_awq") else None)


def _two_levels(levels: list[_Quantizer], inputs: _Quantizer | None) -> str | None:
    first, second = levels
    int4 = first.bits == 4 and first.blocks.get(-1) and not first.dynamic
    return "w4a8_awq" if int4 and second.bits == FP8 and not second.blocks and _per_tensor(inputs, FP8) else None


def _one_level(weight: _Quantizer, inputs: _Quantizer | None) -> str | None:
    if weight.bits == 4 and set(weight.blocks) == {-1} and not weight.dynamic and inputs is None:
        return "int4"
    if weight.bits == 8 and weight.axis in (0, (0,)) and not weight.blocks:
        return "int8_weight_only" if inputs is None else "int8" if _per_tensor(inputs, 8) else None
    if weight.bits == FP8:
        return _fp8(weight, inputs)
    if weight.bits == FP4 and not hasattr(weight.module, "svdquant_lora_a"):
        return _fp4(weight, inputs)
    return None


def _fp8(weight: _Quantizer, inputs: _Quantizer | None) -> str | None:
    if weight.scale_bits == POWERS_OF_TWO and weight.blocks == {-1: 32}:
        return "mxfp8" if _in_blocks(inputs, FP8, 32, POWERS_OF_TWO) else None
    if weight.blocks == {-1: 128, -2: 128} and not weight.dynamic:
        return "fp8_block" if inputs is None else None
    if weight.blocks or weight.dynamic:
        return None
    if weight.axis in (0, (0,)):
        return "fp8_channel" if _per_token(inputs, FP8) else None
    # An input that is not quantised has no scale, without which readers compute garbage: packing will say so.
    return "fp8" if weight.axis is None and (inputs is None or _per_tensor(inputs, FP8)) else None


def _fp4(weight: _Quantizer, inputs: _Quantizer | None) -> str | None:
    if weight.scale_bits == FP8 and weight.blocks == {-1: 16} and weight.dynamic:
        return "w4a16_nvfp4" if inputs is None else "nvfp4" if _in_blocks(inputs, FP4, 16, FP8) else None
    if weight.scale_bits == POWERS_OF_TWO and weight.blocks == {-1: 32}:
        if inputs is None:
            return "w4a16_mxfp4"
        if _per_tensor(inputs, FP8):
            return "w4a8_mxfp4_fp8"
        return "mxfp4" if _in_blocks(inputs, FP4, 32, POWERS_OF_TWO) else None
    return None


def _per_tensor(inputs: _Quantizer | None, bits: Any) -> bool:
    return (
        inputs is not None and inputs.bits == bits and inputs.axis is None and not inputs.blocks and not inputs.dynamic
    )


def _per_token(inputs: _Quantizer | None, bits: Any) -> bool:
    # A block that is all of the last dim becomes an axis of all others with the first input that is seen.
    return (
        inputs is not None
        and inputs.bits == bits
        and inputs.dynamic
        and (inputs.blocks == {-1: None} or (not inputs.blocks and isinstance(inputs.axis, tuple)))
    )


def _in_blocks(inputs: _Quantizer | None, bits: Any, size: int, scale_bits: tuple[int, int]) -> bool:
    return inputs is not None and (inputs.bits, inputs.blocks, inputs.scale_bits) == (bits, {-1: size}, scale_bits)


def _calibration(
    format: Format,
    levels: list[_Quantizer],
    inputs: _Quantizer | None,
    scaled: Tensor | None,
    shape: Shape,
    where: object,
) -> Calibration:
    amax = getattr(levels[0].module, "_amax", None) if format.amax is not None else None
    if amax is not None and format.amax is not None:
        sizes = tuple(axis.length(shape) for axis in format.amax)
        try:
            # Blocks are in the order of the weight's memory, whatever dims the quantiser keeps them in.
            amax = amax.reshape(sizes)
        except RuntimeError as error:
            raise CalibrationError(
                "the ranges of a weight do not fit its shape",
                where=where,
                expected=f"{list(sizes)} for {list(shape)}",
                got=list(amax.shape),
                fix="calibrate the model in the layout in which it is exported",
            ) from error
    return Calibration(
        weight=amax,
        weight_2=getattr(levels[1].module, "_amax", None) if "weight_2" in format.needs else None,
        input=getattr(inputs.module, "_amax", None) if inputs is not None and "input" in format.needs else None,
        pre_quant_scale=scaled,
    )

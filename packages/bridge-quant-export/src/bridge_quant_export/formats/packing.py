"""Pack and unpack one weight, or one shard of one, for a writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from bridge_core.dtypes import dtype_of
from bridge_core.geometry import Shape
from bridge_quant_export.errors import CalibrationError, FormatError
from bridge_quant_export.formats.encodings import ENCODINGS, whole_shape
from bridge_quant_export.formats.format import Calibration, Format, Parts, Writer, cols
from bridge_quant_export.formats.names import WHOLE_SHAPE


def pack(
    weight: Tensor,
    calibration: Calibration,
    *,
    format: Format,
    writer: Writer,
    whole: Shape | None = None,
    where: object = None,
) -> dict[str, Tensor]:
    """The tensors of a weight, or of a shard of it that `Format.check_cut` admits.

    Communicates nothing: the calibration must be the same on all ranks that hold shards of this weight. Then the
    tensors are the part of the packed whole that `Stored.box` names.

    Formats divide ranges by Python numbers, as ModelOpt 0.47 does (export/quant_utils.py, `get_scaling_factor`), not
    by tensors. On a GPU torch multiplies by the rounded inverse of a number: scales are ModelOpt's to the last bit on
    the same device, and may differ in that bit from those that either of them makes on another.

    Args:
        weight: `[rows, cols]`, bf16, fp16 or fp32.
        calibration: ranges of this shard's blocks, of the whole tensor, and of its input.
        format: how to quantise.
        writer: the checkpoint format.
        whole: shape of the whole weight, if `weight` is a shard.
        where: the layer's name, for messages.

    Returns:
        by suffix; contiguous, on the weight's device.

    Raises:
        FormatError: the writer does not know the format, the weight does not fit it or is not finite.
        CalibrationError: a range is missing, superfluous, misshapen, zero, negative or not finite.
    """
    format.check_shape(writer, tuple(weight.shape), where=where)
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise FormatError("the weight is no floating-point matrix", where=where, got=weight.dtype)
    known = check_calibration(calibration, format, weight, where=where)
    try:
        parts = format.quantize(weight.detach(), known)
    except FormatError as error:
        raise FormatError(error.what, where=where, expected=error.expected, got=error.got, fix=error.fix) from error
    return encode_parts(parts, format=format, writer=writer, whole=whole or tuple(weight.shape))


def unpack(
    stored: Mapping[str, Tensor],
    *,
    format: Format,
    writer: Writer,
    dtype: torch.dtype = torch.float32,
    where: object = None,
) -> Tensor:
    """The values that packed tensors stand for: `[rows, cols]`, computed in fp32 and rounded once to `dtype`.

    With a `pre_quant_scale` these are weights for the *scaled* input.

    Raises:
        FormatError: a tensor is missing, or has another dtype or shape than the writer gives it.
    """
    return format.dequantize(decode_parts(stored, format=format, writer=writer, where=where), dtype)


def recode(stored: Mapping[str, Tensor], *, format: Format, source: Writer, target: Writer) -> dict[str, Tensor]:
    """The tensors of another writer from those of one. Codes and scales stay what they are.

    Raises:
        FormatError: a writer does not know the format, or the weight does not fit its tensors.
    """
    parts = decode_parts(stored, format=format, writer=source)
    shape = weight_shape(stored, format=format, writer=source)
    format.check_shape(target, shape)
    return encode_parts(parts, format=format, writer=target, whole=shape)


def encode_parts(parts: Parts, *, format: Format, writer: Writer, whole: Shape) -> dict[str, Tensor]:
    """The parts of a format as a writer's tensors."""
    shape = tuple(axis.per * size for axis, size in zip(format.parts["codes"], parts["codes"].shape, strict=True))
    found = {}
    for tensor in format.stored(writer):
        if tensor.part == WHOLE_SHAPE:
            found[tensor.suffix] = whole_shape(whole)
        else:
            encoded = ENCODINGS[tensor.via].encode(parts[tensor.part])
            found[tensor.suffix] = encoded.reshape(tensor.shape(shape)).contiguous()
    return found


def weight_shape(stored: Mapping[str, Tensor], *, format: Format, writer: Writer) -> Shape:
    """Rows and columns of the weight that was packed, from the shape of its codes."""
    tensor = next(tensor for tensor in format.stored(writer) if tensor.part == "codes")
    return tuple(axis.per * size for axis, size in zip(tensor.axes, stored[tensor.suffix].shape, strict=True))


def decode_parts(stored: Mapping[str, Tensor], *, format: Format, writer: Writer, where: object = None) -> Parts:
    """The parts of a format from a writer's tensors.

    Raises:
        FormatError: a tensor is missing, or has another dtype or shape than the writer gives it.
    """
    expected = format.stored(writer)
    missing = [tensor.suffix for tensor in expected if tensor.suffix not in stored]
    if missing:
        raise FormatError(
            f"tensors of {format.title} are missing", where=where, expected=", ".join(missing), got=", ".join(stored)
        )
    shape = weight_shape(stored, format=format, writer=writer)
    parts = {}
    for tensor in expected:
        found = stored[tensor.suffix]
        wanted = getattr(torch, dtype_of(tensor.dtype).torch) if tensor.dtype else found.dtype
        if found.dtype != wanted or tuple(found.shape) != tensor.shape(shape):
            raise FormatError(
                f"a tensor is not what {writer} stores for {format.title}",
                where=tensor.suffix if where is None else f"{where}.{tensor.suffix}",
                expected=f"{wanted} {list(tensor.shape(shape))}",
                got=f"{found.dtype} {list(found.shape)}",
            )
        if tensor.part != WHOLE_SHAPE:
            sizes = tuple(axis.length(shape) for axis in format.parts[tensor.part])
            parts[tensor.part] = ENCODINGS[tensor.via].decode(found).reshape(sizes)
    return parts


def check_calibration(calibration: Calibration, format: Format, weight: Tensor, *, where: object = None) -> Calibration:
    """What a format takes of a calibration: fp32, on the weight's device, in the shapes that it expects.

    Ranges keep their number of elements but not their shape: quantisers hold `[rows, 1]` for `[rows]`.

    Raises:
        CalibrationError: a range is missing, superfluous, misshapen, zero, negative or not finite.
    """
    shape = tuple(weight.shape)
    wanted: dict[str, Shape] = {name: () for name in format.needs if name != "pre_quant_scale"}
    if "pre_quant_scale" in format.needs:
        wanted["pre_quant_scale"] = (cols().length(shape),)
    if format.amax is not None:
        wanted["weight"] = tuple(axis.length(shape) for axis in format.amax)
    found: dict[str, Tensor] = {}
    for field in fields(calibration):
        value, size = getattr(calibration, field.name), wanted.get(field.name)
        label = field.name if where is None else f"{where}, {field.name}"
        if size is None and value is not None:
            raise CalibrationError(
                f"{format.title} does not use this calibration", where=label, expected="none", got=list(value.shape)
            )
        if size is not None:
            found[field.name] = _checked(value, size, label).to(weight.device)
    if "pre_quant_scale" in found:
        # Readers multiply inputs of the model's dtype with it.
        found["pre_quant_scale"] = found["pre_quant_scale"].to(weight.dtype)
    return Calibration(**found)


def _checked(value: Tensor | None, shape: Shape, label: str) -> Tensor:
    if value is None:
        raise CalibrationError(
            "a layer was not calibrated",
            where=label,
            expected=f"a range of shape {list(shape)}",
            got="none",
            fix="calibrate with inputs that reach this layer, or choose a policy for uncalibrated layers",
        )
    found = value.detach().float()
    sizes = tuple(size for size in value.shape if size != 1)
    if sizes != tuple(size for size in shape if size != 1):
        raise CalibrationError(
            "a calibration has the wrong shape", where=label, expected=list(shape), got=list(value.shape)
        )
    if not bool((torch.isfinite(found) & (found > 0)).all()):
        raise CalibrationError(
            "a calibration is zero, negative or not finite",
            where=label,
            expected="positive numbers",
            got=f"{found.min().item():g} to {found.max().item():g}",
            fix="calibrate with inputs that reach this layer; an all-zero weight cannot be quantised by its range",
        )
    return found.reshape(shape)

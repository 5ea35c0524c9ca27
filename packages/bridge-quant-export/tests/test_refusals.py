"""What cannot be packed is refused, with the place, what would be right, and what to do."""

from dataclasses import replace

import pytest
import torch
from quant_cases import PAIRS, calibration, weights

from bridge_quant_export.errors import CalibrationError, FormatError
from bridge_quant_export.formats import FORMATS, format_of
from bridge_quant_export.formats.format import Calibration
from bridge_quant_export.formats.kv_cache import pack_kv
from bridge_quant_export.formats.packing import pack, unpack

RANGES = [
    (name, writer, field)
    for name, writer in PAIRS
    for field in ("weight", *sorted(FORMATS[name].needs))
    if field != "weight" or FORMATS[name].amax is not None
]


@pytest.mark.parametrize(("bad", "said"), [(0.0, "0"), (-1.0, "-1"), (float("nan"), "nan"), (float("inf"), "inf")])
@pytest.mark.parametrize(("name", "writer", "field"), RANGES)
def test_a_range_that_is_no_positive_number(name, writer, field, bad, said):
    format = format_of(name)
    weight = weights(128, 256)
    known = calibration(format, weight)
    broken = getattr(known, field).clone()
    broken.view(-1)[-1] = bad
    with pytest.raises(CalibrationError, match="zero, negative or not finite") as caught:
        pack(
            weight, replace(known, **{field: broken}), format=format, writer=writer, where="model.layers.3.mlp.up_proj"
        )
    assert f"model.layers.3.mlp.up_proj, {field}" in str(caught.value)
    assert said in str(caught.value.got)


@pytest.mark.parametrize(("name", "writer", "field"), RANGES)
def test_a_range_that_is_missing(name, writer, field):
    format = format_of(name)
    weight = weights(128, 256)
    known = replace(calibration(format, weight), **{field: None})
    with pytest.raises(CalibrationError, match="not calibrated"):
        pack(weight, known, format=format, writer=writer)


@pytest.mark.parametrize(("name", "writer", "field"), RANGES)
def test_a_range_of_another_shape(name, writer, field):
    format = format_of(name)
    weight = weights(128, 256)
    known = replace(calibration(format, weight), **{field: torch.ones(3, 5)})
    with pytest.raises(CalibrationError, match="wrong shape"):
        pack(weight, known, format=format, writer=writer)


def test_a_range_that_the_format_has_no_use_for():
    # An input scale that is dropped would be a checkpoint that computes something else than was calibrated.
    weight = weights(128, 256)
    known = Calibration(weight=weight.float().abs().max(), input=torch.tensor(2.0))
    with pytest.raises(CalibrationError, match="does not use"):
        pack(weight, known, format=format_of("w4a16_nvfp4"), writer="modelopt")
    smooth = replace(calibration(format_of("int4"), weight), pre_quant_scale=torch.ones(256))
    with pytest.raises(CalibrationError, match="does not use"):
        pack(weight, smooth, format=format_of("int4"), writer="compressed-tensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "writer"), PAIRS)
def test_a_weight_that_is_not_finite(name, writer, bad):
    format = format_of(name)
    weight = weights(128, 256)
    known = calibration(format, weight)
    weight[100, 77] = bad
    with pytest.raises(FormatError, match="not finite") as caught:
        pack(weight, known, format=format, writer=writer, where="model.layers.3.mlp.up_proj")
    assert caught.value.where == "model.layers.3.mlp.up_proj"


def test_large_finite_weights_are_not_taken_for_infinite():
    weight = torch.full((128, 256), 3e38)
    known = calibration(format_of("fp8"), weight)
    packed = pack(weight, known, format=format_of("fp8"), writer="modelopt")
    assert (packed["weight"].float() == 448).all()


@pytest.mark.parametrize(("name", "writer"), PAIRS)
def test_sizes_that_do_not_divide(name, writer):
    format = format_of(name)
    for dim, grain in enumerate(format.granularity(writer)):
        if grain == 1 or (name == "fp8_block" and writer == "compressed-tensors"):
            continue
        shape = [256, 256]
        shape[dim] -= 1
        weight = weights(*shape)
        with pytest.raises(FormatError, match="into blocks") as caught:
            pack(weight, Calibration(), format=format, writer=writer)
        assert str(grain) in str(caught.value.expected)
        with pytest.raises(FormatError, match="into blocks"):
            format.tensors(writer, tuple(shape))


def test_what_is_no_matrix_or_no_float():
    format = format_of("mxfp8")
    for weight in (torch.randn(32), torch.randn(2, 32, 32), torch.randn(0, 32)):
        with pytest.raises(FormatError, match="only matrices"):
            pack(weight, Calibration(), format=format, writer="modelopt")
    for dtype in (torch.int8, torch.float64, torch.float8_e4m3fn):
        with pytest.raises(FormatError, match="no floating-point matrix"):
            pack(torch.zeros(32, 32).to(dtype), Calibration(), format=format, writer="modelopt")


def test_a_writer_without_tensors_for_a_format():
    with pytest.raises(FormatError, match="compressed-tensors has no tensors for INT4 AWQ"):
        format_of("int4_awq").tensors("compressed-tensors", (128, 128))


@pytest.mark.parametrize(("name", "writer"), PAIRS)
def test_reading_what_was_not_written(name, writer):
    format = format_of(name)
    weight = weights(128, 256)
    packed = pack(weight, calibration(format, weight), format=format, writer=writer)
    for suffix in packed:
        less = {other: tensor for other, tensor in packed.items() if other != suffix}
        with pytest.raises(FormatError, match="missing"):
            unpack(less, format=format, writer=writer)
    scale = packed["weight_scale"]
    for wrong in (scale.to(torch.float64), torch.cat([scale.reshape(-1).float(), torch.ones(1)]).to(scale.dtype)):
        with pytest.raises(FormatError, match="is not what"):
            unpack({**packed, "weight_scale": wrong}, format=format, writer=writer, where="layer")


def test_formats_by_name():
    assert format_of("int4", 64) is format_of("int4", 64)
    assert format_of("int4", 64).granularity("compressed-tensors") == (1, 64)
    with pytest.raises(FormatError, match="no such format"):
        format_of("nvfp5")
    with pytest.raises(FormatError, match="fixed group size"):
        format_of("nvfp4", 32)
    for size in (0, -8, 12):
        with pytest.raises(FormatError, match="group size"):
            format_of("int4_awq", size)


@pytest.mark.parametrize("bad", [[0.0], [-1.0], [float("nan")], [float("inf")], [1.0, 2.0]])
def test_a_kv_range_that_is_no_positive_number(bad):
    with pytest.raises(CalibrationError, match="KV cache"):
        pack_kv(torch.tensor(bad), where="model.layers.0.self_attn")

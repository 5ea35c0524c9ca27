"""Packed tensors against compressed-tensors' own compressors: the same bytes, and the same values back."""

import pytest
import torch
from quant_cases import PAIRS, calibration, same_bytes, weights

from bridge_quant_export.configs.compressed_tensors import SCHEMES, scheme_of
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.packing import pack, unpack

compressors = pytest.importorskip(
    "compressed_tensors.compressors", reason="needs the extra bridge-quant-export[compressed-tensors]"
)
quantization = pytest.importorskip("compressed_tensors.quantization")

NAMES = [name for name, writer in PAIRS if writer == "compressed-tensors"]


def compressor(name):
    """Their compressor and scheme for one of our formats."""
    scheme = quantization.QuantizationScheme(**scheme_of(format_of(name), targets=["Linear"]))
    return compressors.BaseCompressor.get_value_from_registry(SCHEMES[name].format), scheme


def float_scales(name, stored):
    """The scales as compressed-tensors has them before it compresses: floats."""
    found = {suffix: tensor for suffix, tensor in stored.items() if suffix not in ("weight", "weight_packed")}
    found.pop("weight_shape", None)
    scale = found["weight_scale"]
    found["weight_scale"] = torch.exp2(scale.float() - 127) if name.endswith(("mxfp4", "mxfp8")) else scale.float()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_their_compressor(name):
    format, (theirs, scheme) = format_of(name), compressor(name)
    weight = weights(256, 512, dtype=torch.float32)
    ours = pack(weight, calibration(format, weight), format=format, writer="compressed-tensors")
    made = theirs.compress({"weight": weight.clone(), **float_scales(name, ours)}, scheme)
    assert sorted(made) == sorted(ours)
    for suffix, tensor in ours.items():
        other = made[suffix]
        if suffix == "weight_packed" and "fp4" in name:
            # Difference: a small negative number is -0 in theirs and in ModelOpt's NVFP4; an exact zero is +0 in ours.
            assert not (weight == 0).any()
        assert same_bytes(tensor, other), suffix


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_that_they_read(name):
    format, (theirs, scheme) = format_of(name), compressor(name)
    weight = weights(256, 512, dtype=torch.float32)
    ours = pack(weight, calibration(format, weight), format=format, writer="compressed-tensors")
    values = unpack(ours, format=format, writer="compressed-tensors")
    read = theirs.decompress(dict(ours), scheme)["weight"]
    if "fp4" in name or name == "mxfp8":
        # They compute in bf16: half a unit in the last of its 8 bits, twice.
        torch.testing.assert_close(values, read.float(), rtol=2**-7, atol=0)
    else:
        torch.testing.assert_close(values, read.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_of_a_layer_of_theirs(name):
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.initialize")
    format, (theirs, scheme) = format_of(name), compressor(name)
    layer = torch.nn.Linear(512, 256, bias=False)
    lifecycle.initialize_module_for_quantization(layer, scheme)
    expected = {suffix for suffix, _ in layer.named_parameters() if suffix.startswith("input_")}
    expected |= set(theirs.compression_param_names(scheme))
    specs = {spec.suffix: spec for spec in format.tensors("compressed-tensors", (256, 512))}
    assert set(specs) == expected - {"input_zero_point"}
    for suffix, parameter in layer.named_parameters():
        if suffix.endswith("scale"):
            assert tuple(parameter.shape) == specs[suffix].shape, suffix


def test_a_last_block_that_is_cut_short():
    format, (theirs, scheme) = format_of("fp8_block"), compressor("fp8_block")
    weight = weights(200, 300, dtype=torch.float32)
    ours = pack(weight, calibration(format, weight), format=format, writer="compressed-tensors")
    assert ours["weight_scale"].shape == (2, 3)
    made = theirs.compress({"weight": weight.clone(), "weight_scale": ours["weight_scale"]}, scheme)
    assert same_bytes(ours["weight"], made["weight"])

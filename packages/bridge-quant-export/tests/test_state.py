"""Which format a layer is in, and its ranges: read from layers that ModelOpt quantised."""

import copy

import pytest
import torch
from quant_cases import same_bytes, weights
from torch import nn

from bridge_quant_export.errors import CalibrationError, FormatError
from bridge_quant_export.formats import FORMATS
from bridge_quant_export.formats.packing import pack
from bridge_quant_export.state import read_kv_ranges, read_layer

mtq = pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")
quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")

CONFIGS = {
    "FP8_DEFAULT_CFG": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8_channel",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "fp8_block",
    "NVFP4_DEFAULT_CFG": "nvfp4",
    "W4A16_NVFP4_CFG": "w4a16_nvfp4",
    "MXFP4_DEFAULT_CFG": "mxfp4",
    "W4A8_MXFP4_FP8_CFG": "w4a8_mxfp4_fp8",
    "MXFP8_DEFAULT_CFG": "mxfp8",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "int4",
    "INT4_AWQ_CFG": "int4_awq",
    "W4A8_AWQ_BETA_CFG": "w4a8_awq",
    "INT8_DEFAULT_CFG": "int8",
    "INT8_SMOOTHQUANT_CFG": "int8_smoothquant",
    "INT8_WEIGHT_ONLY_CFG": "int8_weight_only",
}
REFUSED = ("W4A8_NVFP4_FP8_CFG", "MXINT8_DEFAULT_CFG", "MXFP6_DEFAULT_CFG")


def quantized(config, *, calibrate=True):
    layer = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    layer.weight.data = weights(256, 512)
    inputs = torch.randn(32, 512, generator=torch.Generator().manual_seed(7)).bfloat16()
    forward = (lambda model: model(inputs)) if calibrate else None
    return mtq.quantize(nn.Sequential(layer), copy.deepcopy(getattr(mtq, config)), forward)[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_layers_of_every_configuration(config):
    layer = quantized(config)
    found = read_layer(layer)
    assert found is not None
    assert found.format is FORMATS[CONFIGS[config]]
    ours = pack(layer.weight, found.calibration, format=found.format, writer="modelopt")
    scale = quant_utils.get_weight_scaling_factor(layer)
    theirs = quant_utils.to_quantized_weight(
        layer.weight.detach().clone(),
        scale,
        quant_utils.get_quantization_format(layer),
        quant_utils.get_weight_scaling_factor_2(layer),
        quant_utils.get_weight_block_size(layer),
    )
    assert torch.equal(ours["weight_scale"].float().flatten(), scale.float().flatten())
    if "mxfp4" not in config.lower():  # ties and zeros: test_against_modelopt.py
        assert same_bytes(ours["weight"], theirs)


@pytest.mark.parametrize("config", REFUSED)
def test_what_no_format_stores(config):
    layer = quantized(config, calibrate=False)
    with pytest.raises(FormatError, match="no format stores") as caught:
        read_layer(layer, where="decoder.layers.3.mlp.linear_fc1")
    assert "num_bits" in str(caught.value)
    assert caught.value.where == "decoder.layers.3.mlp.linear_fc1"


def test_layers_that_are_not_quantised():
    assert read_layer(nn.Linear(4, 4)) is None
    layer = quantized("FP8_DEFAULT_CFG")
    layer.weight_quantizer.disable()
    assert read_layer(layer) is None


def test_an_input_without_calibration_is_told_when_packing():
    layer = quantized("FP8_DEFAULT_CFG", calibrate=False)
    found = read_layer(layer)
    with pytest.raises(CalibrationError, match="not calibrated"):
        pack(layer.weight, found.calibration, format=found.format, writer="modelopt")


def test_scaled_inputs_of_another_format_are_refused():
    layer = quantized("NVFP4_DEFAULT_CFG")
    layer.input_quantizer.pre_quant_scale = torch.ones(512)
    with pytest.raises(FormatError, match="scaled first"):
        read_layer(layer)


def test_a_quantised_output_is_refused():
    layer = quantized("FP8_DEFAULT_CFG")
    layer.output_quantizer.enable()
    with pytest.raises(FormatError, match="output"):
        read_layer(layer)


def test_grouped_weights_have_quantisers_of_their_own():
    first, second = quantized("FP8_DEFAULT_CFG"), quantized("FP8_DEFAULT_CFG")
    second.weight_quantizer.amax = torch.tensor(0.5)
    grouped = nn.Module()
    grouped.weight0, grouped.weight1 = first.weight, second.weight
    grouped.weight_quantizer = mtq.nn.GroupedQuantizer(first.weight_quantizer, second.weight_quantizer)
    grouped.input_quantizer = first.input_quantizer
    found = [read_layer(grouped, weight=f"weight{index}", index=index) for index in (0, 1)]
    assert found[0].calibration.weight == first.weight_quantizer.amax
    assert found[1].calibration.weight == 0.5
    with pytest.raises(FormatError, match="a quantiser for each"):
        read_layer(grouped, weight="weight0")


def test_ranges_of_another_weight():
    layer = quantized("INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
    layer.weight = nn.Parameter(layer.weight[:128])
    with pytest.raises(CalibrationError, match="do not fit"):
        read_layer(layer)


def test_kv_ranges():
    attention = nn.Module()
    assert read_kv_ranges(attention) is None
    for which, value in (("k", 3.0), ("v", 700.0)):
        quantizer = mtq.nn.TensorQuantizer(mtq.config.QuantizerAttributeConfig(num_bits=(4, 3), axis=None))
        quantizer.amax = torch.tensor(value)
        setattr(attention, f"{which}_bmm_quantizer", quantizer)
    assert {which: float(amax) for which, amax in read_kv_ranges(attention).items()} == {"k": 3.0, "v": 700.0}
    attention.v_bmm_quantizer.disable()
    with pytest.raises(CalibrationError, match="together"):
        read_kv_ranges(attention)

"""Packed tensors against those of ModelOpt: real quantisers, calibrated by ModelOpt, packed by its own functions.

Where bytes differ, the test states by how much and shows that ModelOpt's are the ones that are off.
"""

import copy
from contextlib import nullcontext

import pytest
import quantising
import torch
from quant_cases import same_bytes, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bridge_quant_export.errors import CalibrationError
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.format import Calibration
from bridge_quant_export.formats.packing import pack, unpack

mtq = pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")
quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")

ROWS, COLS = 256, 512
CONFIGS = quantising.CONFIGS | {"int8_smoothquant": "INT8_SMOOTHQUANT_CFG"}
EXACT = [name for name in CONFIGS if "mxfp4" not in name]


@pytest.fixture(scope="module")
def quantized():
    """A linear layer that ModelOpt quantised and calibrated, by format and dtype."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            layer = nn.Linear(COLS, ROWS, bias=False, dtype=dtype)
            layer.weight.data = weights(ROWS, COLS, dtype=dtype)
            inputs = torch.randn(32, COLS, generator=torch.Generator().manual_seed(7)).to(dtype)
            inputs[:, ::37] *= 9  # features of very different size, so that AWQ and SmoothQuant have work to do
            config = copy.deepcopy(getattr(mtq, CONFIGS[name]))
            model = mtq.quantize(nn.Sequential(layer), config, lambda model: model(inputs))
            made[name, dtype] = model[0]
        return made[name, dtype]

    return get


def ranges(name, layer):
    """The calibration of a layer, read from its quantisers."""
    quantizer = layer.weight_quantizer
    first, second = (quantizer[0], quantizer[1]) if name == "w4a8_awq" else (quantizer, None)
    format = format_of(name)
    amax = None if format.amax is None else first._amax
    if amax is not None and format.amax:
        sizes = tuple(axis.length((ROWS, COLS)) for axis in format.amax)
        amax = amax.reshape(sizes)
    return Calibration(
        weight=amax,
        weight_2=None if second is None else second._amax,
        input=layer.input_quantizer._amax if "input" in format.needs else None,
        pre_quant_scale=layer.input_quantizer._pre_quant_scale if "pre_quant_scale" in format.needs else None,
    )


def by_modelopt(layer):
    """What ModelOpt's own export functions make of a layer."""
    scale = quant_utils.get_weight_scaling_factor(layer)
    scale_2 = quant_utils.get_weight_scaling_factor_2(layer)
    found = {
        "weight": quant_utils.to_quantized_weight(
            layer.weight.detach().clone(),
            scale,
            quant_utils.get_quantization_format(layer),
            scale_2,
            quant_utils.get_weight_block_size(layer),
        ),
        "weight_scale": scale,
        "weight_scale_2": scale_2,
        "input_scale": quant_utils.get_activation_scaling_factor(layer),
        "pre_quant_scale": quant_utils.get_prequant_scaling_factor(layer),
    }
    return {suffix: tensor for suffix, tensor in found.items() if tensor is not None}


def by_us(name, layer):
    return pack(layer.weight, ranges(name, layer), format=format_of(name), writer="modelopt")


def codes(tensor):
    """The bits of FP8 codes as integers in the order of their values."""
    bits = tensor.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", EXACT)
def test_tensors_are_equal_byte_for_byte(quantized, name, dtype):
    layer = quantized(name, dtype)
    theirs, ours = by_modelopt(layer), by_us(name, layer)
    if name == "fp8":
        theirs["weight_scale"] = theirs["weight_scale"].squeeze()  # as its Megatron exporter does before it writes
    assert sorted(ours) == sorted(theirs)
    for suffix, tensor in theirs.items():
        assert same_bytes(ours[suffix], tensor), suffix


class DividesAsAGpu(TorchDispatchMode):
    """A GPU multiplies by the rounded inverse of a number, and divides by tensors (torch 2.13, BinaryDivTrueKernel.cu).

    Here inverses are rounded to bf16, so that no value hides which of the two was done.
    """

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and isinstance(args[1], float | int):
            self.seen += 1
            return args[0] * torch.tensor(1 / args[1]).bfloat16().float()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", [name for name in EXACT if format_of(name).amax is not None])
def test_ranges_are_divided_as_modelopt_does_on_the_same_device(quantized, name):
    layer = quantized(name, torch.float32)
    with DividesAsAGpu() as gpu:
        theirs = by_modelopt(layer)
        seen = gpu.seen
        ours = by_us(name, layer)
    assert 0 < seen < gpu.seen
    for suffix, tensor in theirs.items():
        assert same_bytes(ours[suffix].flatten(), tensor.flatten()), suffix


def test_fp8_of_a_bf16_weight_is_rounded_once(quantized):
    # Difference: ModelOpt's Megatron exporter drops the scale's dim before it packs. torch then divides a bf16 weight
    # in bf16, and the quotient is rounded again to FP8. Where its codes differ from ours they are as far from the
    # quotient or farther, never nearer.
    layer = quantized("fp8", torch.bfloat16)
    ours, scale = by_us("fp8", layer), quant_utils.get_weight_scaling_factor(layer)
    theirs = quant_utils.to_quantized_weight(layer.weight.detach().clone(), scale.squeeze(), "fp8")
    differ = codes(ours["weight"]) != codes(theirs)
    assert 0.01 < differ.float().mean() < 0.04
    assert (codes(ours["weight"]) - codes(theirs)).abs().max() == 1
    quotient = layer.weight.detach().double() / ours["weight_scale"].double()
    error_ours = (ours["weight"].double() - quotient).abs()[differ]
    error_theirs = (theirs.double() - quotient).abs()[differ]
    assert (error_ours <= error_theirs).all()
    assert (error_ours < error_theirs).float().mean() > 0.5


@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "fp8_block"])
def test_what_is_out_of_range_is_clipped(quantized, name):
    layer = quantized(name, torch.float32)
    known = ranges(name, layer)
    tight = Calibration(weight=known.weight * 0.5, input=known.input)
    ours = pack(layer.weight, tight, format=format_of(name), writer="modelopt")["weight"]
    assert (ours.float().abs() == 448).sum() > 0
    theirs = quant_utils.to_quantized_weight(
        layer.weight.detach().clone(),
        tight.weight / 448,
        quant_utils.get_quantization_format(layer),
        None,
        quant_utils.get_weight_block_size(layer),
    )
    # Difference, with versions of torch whose cast does not clip: ModelOpt's codes are NaN beyond 464.
    kept = ~theirs.float().isnan()
    assert torch.equal(ours.float()[kept], theirs.float()[kept])


def test_an_uncalibrated_range_is_refused_and_not_replaced(quantized):
    # Difference: ModelOpt warns and takes the largest code for the range, which makes the scale 1 (0.47,
    # TensorQuantizer._sanitize_export_amax).
    layer = copy.deepcopy(quantized("fp8", torch.float32))
    layer.input_quantizer._amax.zero_()
    with pytest.warns(UserWarning, match="zero or NaN"):
        assert quant_utils.get_activation_scaling_factor(layer).item() == 1.0
    with pytest.raises(CalibrationError, match="zero, negative or not finite"):
        by_us("fp8", layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mxfp4", "w4a8_mxfp4_fp8"])
def test_mxfp4_differs_in_ties_only(quantized, name, dtype):
    # Difference: ModelOpt rounds ties towards zero; the OCP text has ties go to even codes, as its own NVFP4 does.
    layer = quantized(name, dtype)
    theirs, ours = by_modelopt(layer), by_us(name, layer)
    assert same_bytes(ours["weight_scale"], theirs["weight_scale"])
    scale = torch.exp2(ours["weight_scale"].double() - 127).repeat_interleave(32, dim=1)
    quotient = (layer.weight.detach().double() / scale).abs()
    ties = torch.isin(quotient, torch.tensor([0.75, 1.75, 3.5], dtype=torch.double))
    format = format_of(name)
    mine = unpack(ours, format=format, writer="modelopt").double() / scale
    other = qtensor.MXFP4QTensor(layer.weight.shape, torch.float32, theirs["weight"])
    other = other.dequantize(torch.float32, scale=theirs["weight_scale"], block_sizes={-1: 32}).double() / scale
    assert torch.equal(mine[~ties], other[~ties])
    assert (mine[ties].abs() > other[ties].abs()).all()
    if dtype == torch.bfloat16:
        assert ties.any()


def test_a_block_of_zeros_is_zero(quantized):
    weight = weights(32, 64, dtype=torch.bfloat16)
    weight[3, 32:] = 0
    weight[5] = 0
    for name, quantizer in (("nvfp4", qtensor.NVFP4QTensor), ("mxfp8", qtensor.MXFP8QTensor)):
        format = format_of(name)
        known = Calibration(
            weight=weight.float().abs().max() if format.amax is not None else None,
            input=torch.tensor(1.0) if "input" in format.needs else None,
        )
        ours = pack(weight, known, format=format, writer="modelopt")
        packed, scale, *_ = quantizer.quantize(weight.clone(), *((16,) if name == "nvfp4" else ()))
        assert same_bytes(ours["weight"], packed._quantized_data)
        assert same_bytes(ours["weight_scale"], scale)
    # Difference: in MXFP4 ModelOpt's zero is -0 (code 8); ours is +0, in a block of zeros and elsewhere.
    ours = pack(weight, Calibration(), format=format_of("mxfp4"), writer="modelopt")
    packed, scale = qtensor.MXFP4QTensor.quantize(weight.clone(), 32)
    assert same_bytes(ours["weight_scale"], scale.reshape(32, 2))
    assert (ours["weight"][5] == 0).all()
    assert (packed._quantized_data[5] == 0x88).all()


@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "fp8_block", "int4", "int4_awq", "int8", "int8_smoothquant"])
def test_values_are_those_of_the_fake_quantised_weight(quantized, name):
    # FP8: the quantiser multiplies by 448 / range where export divides by range / 448, so that a few quotients
    # round to the other side of a tie.
    layer = quantized(name, torch.float32)
    values = unpack(by_us(name, layer), format=format_of(name), writer="modelopt")
    fake = layer.weight_quantizer(layer.weight.detach())
    off = ~torch.isclose(values, fake, rtol=1e-6, atol=0)
    assert off.float().mean() < (1e-3 if name.startswith("fp8") else 1e-9)


def test_w4a8_values_are_those_of_both_quantisers(quantized):
    layer = quantized("w4a8_awq", torch.float32)
    values = unpack(by_us("w4a8_awq", layer), format=format_of("w4a8_awq"), writer="modelopt")
    fake = layer.weight_quantizer(layer.weight.detach())
    off = ~torch.isclose(values, fake, rtol=1e-6, atol=0)
    assert off.float().mean() < 1e-3  # ties, as above


@pytest.mark.parametrize(("name", "tensor"), [("nvfp4", "NVFP4QTensor"), ("mxfp8", "MXFP8QTensor")])
def test_values_are_those_that_modelopt_reads_back(quantized, name, tensor):
    layer = quantized(name, torch.float32)
    ours = by_us(name, layer)
    reader = getattr(qtensor, tensor)(layer.weight.shape, torch.float32, ours["weight"])
    theirs = reader.dequantize(
        torch.float32, scale=ours["weight_scale"], double_scale=ours.get("weight_scale_2"), block_sizes={-1: 16}
    )
    assert torch.equal(unpack(ours, format=format_of(name), writer="modelopt"), theirs)


@pytest.mark.parametrize("divides", [None, DividesAsAGpu])
@pytest.mark.parametrize("clamp", [True, False])
def test_kv_scales(clamp, divides):
    from bridge_quant_export.formats.kv_cache import kv_tensor, pack_kv

    attention = nn.Module()
    amax = {"k": 17.25, "v": 1031.5}
    for which, value in amax.items():
        quantizer = mtq.nn.TensorQuantizer(mtq.config.QuantizerAttributeConfig(num_bits=(4, 3), axis=None))
        quantizer.amax = torch.tensor(value)
        setattr(attention, f"{which}_bmm_quantizer", quantizer)
    with divides() if divides else nullcontext():
        theirs = quant_utils.get_kv_cache_scaling_factor(attention, clamp_fp8_scales=clamp)
        ours = [pack_kv(torch.tensor(value), at_least_one=clamp) for value in amax.values()]
    for which, mine, scale in zip(amax, ours, theirs, strict=True):
        assert torch.equal(mine, scale.reshape(1))
        # The names that ModelOpt's Hugging Face export gives to the same quantisers.
        renamed = quant_utils._KV_CACHE_REPLACEMENTS[f"{which}_bmm_quantizer._amax"]
        assert kv_tensor(which, "modelopt").suffix == renamed

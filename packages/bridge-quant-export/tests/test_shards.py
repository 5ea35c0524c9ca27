"""Packed shards are the parts of the packed whole that the formats say they are, for every cut that they admit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import PAIRS, calibration, same_bytes, weights

from bridge_core.dtypes import dtype_of
from bridge_core.geometry import Box
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.format import COLS, ROWS, Calibration
from bridge_quant_export.formats.packing import pack, recode, unpack


def part(known, format, shape, box):
    """The part of a calibration that belongs to a region of the weight."""
    cut = tuple(slice(start, start + extent) for start, extent in zip(box.start, box.shape, strict=True))
    weight = known.weight
    if weight is not None and format.amax:
        spans = []
        for axis in format.amax:
            start, extent = box.start[axis.dim], box.shape[axis.dim]
            spans.append(slice(start // axis.per, -(-(start + extent) // axis.per)))
        weight = weight[tuple(spans)]
    scale = None if known.pre_quant_scale is None else known.pre_quant_scale[cut[COLS]]
    return Calibration(weight=weight, weight_2=known.weight_2, input=known.input, pre_quant_scale=scale)


@st.composite
def cuts(draw):
    """A format, a writer, a shape, and a cut of both dims into shards that the format admits."""
    name, writer = draw(st.sampled_from(PAIRS))
    format = format_of(name)
    grain = format.granularity(writer)
    sizes, sides = [], []
    for dim in (ROWS, COLS):
        blocks = draw(st.integers(1, 6 if grain[dim] < 100 else 3))
        size = blocks * max(grain[dim], 4)
        ragged = name == "fp8_block" and writer == "compressed-tensors" and draw(st.booleans())
        size -= draw(st.integers(1, grain[dim] - 1)) if ragged else 0
        inner = draw(st.sets(st.integers(1, 5))) if blocks > 1 else set()
        steps = max(grain[dim], 4)
        sides.append([0, *sorted(at * steps for at in inner if at * steps < size), size])
        sizes.append(size)
    return name, writer, tuple(sizes), sides


@settings(max_examples=150)
@given(cuts(), st.integers(0, 99))
def test_shards_join_to_the_whole(cut, seed):
    name, writer, shape, sides = cut
    format = format_of(name)
    weight = weights(*shape, seed=seed)
    known = calibration(format, weight)
    whole = pack(weight, known, format=format, writer=writer)
    joined = {suffix: torch.zeros_like(tensor) for suffix, tensor in whole.items()}
    covered = {suffix: torch.zeros(tensor.shape, dtype=torch.int) for suffix, tensor in whole.items()}
    for top, bottom in zip(sides[ROWS], sides[ROWS][1:], strict=False):
        for left, right in zip(sides[COLS], sides[COLS][1:], strict=False):
            box = Box((top, left), (bottom - top, right - left))
            format.check_cut(writer, shape, box)
            shard = weight[top:bottom, left:right]
            packed = pack(shard, part(known, format, shape, box), format=format, writer=writer, whole=shape)
            specs = {spec.suffix: spec for spec in format.tensors(writer, box.shape)}
            for tensor in format.stored(writer):
                at = tensor.box(box)
                assert tuple(packed[tensor.suffix].shape) == at.shape == specs[tensor.suffix].shape
                where = tuple(slice(start, start + size) for start, size in zip(at.start, at.shape, strict=True))
                joined[tensor.suffix][where] = packed[tensor.suffix]
                covered[tensor.suffix][where] += 1
    for suffix, tensor in whole.items():
        assert same_bytes(joined[suffix], tensor), suffix
        assert (covered[suffix] > 0).all(), suffix


@pytest.mark.parametrize(("name", "writer"), PAIRS)
def test_cuts_through_blocks_are_refused(name, writer):
    format = format_of(name)
    shape = (512, 512)
    for dim, grain in enumerate(format.granularity(writer)):
        if grain == 1:
            continue
        for start, stop in ((0, grain // 2), (grain // 2, 512), (0, 512 - 1)):
            at, extent = [0, 0], [512, 512]
            at[dim], extent[dim] = start, stop - start
            with pytest.raises(FormatError, match="splits blocks") as caught:
                format.check_cut(writer, shape, Box(tuple(at), tuple(extent)), where="layer")
            assert f"multiples of {grain}" in str(caught.value)


@pytest.mark.parametrize(("name", "writer"), PAIRS)
def test_the_manifest_is_what_is_packed(name, writer):
    format = format_of(name)
    for dtype, label in ((torch.bfloat16, "BF16"), (torch.float32, "F32")):
        weight = weights(128, 384, dtype=dtype)
        packed = pack(weight, calibration(format, weight), format=format, writer=writer)
        specs = format.tensors(writer, (128, 384), label)
        assert [spec.suffix for spec in specs] == list(packed)
        for spec in specs:
            found = packed[spec.suffix]
            assert (dtype_of(spec.dtype).torch, spec.shape) == (str(found.dtype)[6:], tuple(found.shape))
            assert found.is_contiguous()


@pytest.mark.parametrize("name", sorted({name for name, _ in PAIRS if (name, "compressed-tensors") in PAIRS}))
def test_writers_hold_the_same_values(name):
    format = format_of(name)
    weight = weights(128, 512)
    known = calibration(format, weight)
    ours = {w: pack(weight, known, format=format, writer=w) for w in ("modelopt", "compressed-tensors")}
    for source, target in (("modelopt", "compressed-tensors"), ("compressed-tensors", "modelopt")):
        made = recode(ours[source], format=format, source=source, target=target)
        assert sorted(made) == sorted(ours[target])
        for suffix, tensor in ours[target].items():
            if "global_scale" in suffix or (name == "nvfp4" and suffix in ("weight_scale_2", "input_scale")):
                torch.testing.assert_close(made[suffix], tensor, rtol=2**-23, atol=0)  # a reciprocal and back
            else:
                assert same_bytes(made[suffix], tensor), suffix
        values = [unpack(ours[w], format=format, writer=w) for w in (source, target)]
        torch.testing.assert_close(*values, rtol=2**-22, atol=0)


@pytest.mark.parametrize(("name", "writer"), PAIRS)
def test_values_are_near_the_weight(name, writer):
    # Half of the widest step between codes, relative to the range of the block or row that shares a scale.
    bound = {"fp8": 16, "mxfp8": 32, "int8": 0.51, "int4": 0.51, "w4a8": 1.0}
    format = format_of(name)
    weight = weights(128, 512, dtype=torch.float32)
    known = calibration(format, weight)
    values = unpack(pack(weight, known, format=format, writer=writer), format=format, writer=writer)
    error = (values - weight).abs()
    if "fp4" in name:
        reach = weight.abs().view(128, -1, 16 if "nv" in name else 32).amax(-1, keepdim=True)
        # The widest step is from 4 to 6; scales of powers of two leave up to half of the codes unused.
        assert (error.view(128, reach.shape[1], -1) <= (0.18 if "nv" in name else 0.34) * reach).all()
        return
    largest = {"fp8": 448, "mxfp8": 448, "int8": 127, "int4": 7, "w4a8": 7}
    kind = next(kind for kind in sorted(bound, key=len, reverse=True) if name.startswith(kind))
    assert error.max() <= bound[kind] / largest[kind] * weight.abs().max() * 1.001


def test_the_whole_is_longer_than_a_run_of_rows():
    # Longer than the rows that are packed at a time, and with a last run that is shorter.
    weight = weights(150, 2048)
    for name, writer in PAIRS:
        if name == "fp8_block" and writer == "modelopt":
            continue
        format = format_of(name)
        known = calibration(format, weight)
        whole = pack(weight, known, format=format, writer=writer)
        top = Box((0, 0), (128, 2048))
        first = pack(weight[:128], part(known, format, weight.shape, top), format=format, writer=writer)
        key = "weight_packed" if "weight_packed" in whole else "weight"
        assert same_bytes(first[key], whole[key][: len(first[key])])


def test_packing_leaves_the_weight_alone():
    for name, writer in PAIRS:
        format = format_of(name)
        weight = weights(128, 256, dtype=torch.float32)
        before = weight.clone()
        pack(weight, calibration(format, weight), format=format, writer=writer)
        assert torch.equal(weight, before), name


def test_a_weight_that_is_no_contiguous_tensor():
    for name, writer in PAIRS:
        format = format_of(name)
        for wide in (weights(256, 128).T, weights(128, 512, dtype=torch.float32)[:, 128:384]):
            assert not wide.is_contiguous()
            known = calibration(format, wide)
            ours = pack(wide, known, format=format, writer=writer)
            plain = pack(wide.contiguous(), known, format=format, writer=writer)
            assert all(same_bytes(ours[suffix], plain[suffix]) for suffix in plain), name

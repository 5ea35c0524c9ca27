"""Number codes against their definitions: every code, every tie, every neighbour of one."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from bridge_quant_export.codes import e2m1, e4m3, e8m0
from bridge_quant_export.codes.rows import block_amax, row_runs
from bridge_quant_export.formats.encodings import ENCODINGS

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(value):
    """The code of a number, by exact arithmetic: least distance, then the even code."""
    size = min(abs(Fraction(value)), Fraction(6))
    index = min(range(8), key=lambda code: (abs(size - Fraction(FP4[code])), code % 2))
    return index + (8 if value < 0 else 0)


def test_e2m1_at_codes_ties_and_their_neighbours():
    points = [*FP4, *((low + high) / 2 for low, high in pairwise(FP4)), 6.5, 7.0, 1e30, 1e-45]
    points = torch.tensor(points)
    infinity = torch.tensor(math.inf)
    values = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity).clamp(min=0)])
    values = torch.cat([values, -values])
    values = torch.cat([values, values.new_zeros(-len(values) % 2)])
    expected = [nearest(value) for value in values.tolist()]
    packed = e2m1.encode(values.clone()[None])
    assert e2m1.unpair(packed)[0].tolist() == expected


def test_e2m1_of_every_bf16_number():
    bits = torch.arange(0x7F80, dtype=torch.int32)  # all that are finite and not negative
    values = (bits << 16).view(torch.float32)
    codes = e2m1.unpair(e2m1.encode(values.clone()[None]))[0]
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    above = torch.bucketize(values, bounds, right=False)  # a bound itself counts for the code below it
    up = torch.isin(values, bounds[[1, 3, 5]])  # ... unless the one above is even
    assert torch.equal(codes.long(), above + up)


def test_e2m1_there_and_back():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    values = e2m1.decode(packed)
    assert values.shape == (4, 128)
    assert values[0, :8].tolist() == [0, 0, 0.5, 0, 1, 0, 1.5, 0]  # the first of a pair is the low half
    again = e2m1.encode(values.clone())
    negative_zero = (packed & 0xF) == 8, (packed >> 4) == 8
    plain = ~(negative_zero[0] | negative_zero[1])
    assert torch.equal(again[plain], packed[plain])


def test_e8m0_is_the_least_power_of_two_that_fits():
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.cat([1 + torch.rand(200, generator=generator), torch.tensor([1.0, 1.5, 1.75])])
    mantissas = torch.cat([mantissas, mantissas.nextafter(torch.tensor(2.0)), mantissas.nextafter(torch.tensor(0.0))])
    for largest in (6.0, 448.0):
        for exponent in (-126, -60, -1, 0, 1, 60, 126):
            amax = torch.ldexp(mantissas, torch.tensor(exponent))
            amax = amax[torch.isfinite(amax)]
            codes = e8m0.encode_range(amax, largest).tolist()
            for value, code in zip(amax.tolist(), codes, strict=True):
                assert Fraction(value) <= Fraction(largest) * Fraction(2) ** (code - 127), (value, code)
                assert code == 0 or Fraction(value) > Fraction(largest) * Fraction(2) ** (code - 128), (value, code)


def test_e8m0_codes():
    values = e8m0.decode(torch.arange(256, dtype=torch.uint8))
    assert values[:255].double().tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert math.isnan(values[255])
    assert e8m0.encode_range(torch.zeros(1), 6.0).tolist() == [0]


def test_e4m3_clips():
    values = torch.tensor([448.0, 464.0, 465.0, 1e38, -500.0, 2.0**-10, 1.0625, 1.1875])
    codes = e4m3.encode(values).float()
    assert codes.tolist() == [448, 448, 448, 448, -448, 0, 1.0, 1.25]  # ties to even codes


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name.startswith(("row", "words"))])
def test_integer_encodings_lose_nothing(name):
    low, high = (-128, 128) if name == "words of 8" else (-8, 8)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(low, high, (6, 40), generator=generator, dtype=torch.int8)
    codes.view(-1)[: high - low] = torch.arange(low, high)[: codes.numel()]
    encoded = ENCODINGS[name].encode(codes)
    assert encoded.numel() * encoded.element_size() == codes.numel() // (1 if name == "words of 8" else 2)
    assert torch.equal(ENCODINGS[name].decode(encoded), codes)


@pytest.mark.parametrize("size", [16, 32])
def test_block_amax(size):
    values = torch.randn(5, 4 * size, generator=torch.Generator().manual_seed(2))
    assert torch.equal(block_amax(values, size), values.abs().view(5, 4, size).amax(-1))


@pytest.mark.parametrize("shape", [(1, 16), (3, 70000), (2049, 64), (100, 2048)])
def test_runs_of_rows_cover_a_weight_once(shape):
    weight = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    spans, runs = zip(*row_runs(weight, step=2), strict=True)
    assert torch.equal(torch.cat(runs), weight)
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert all(span.start % 2 == 0 for span in spans)

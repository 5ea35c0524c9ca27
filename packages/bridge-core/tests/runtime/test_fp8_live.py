"""Quantising in torch, whole and by parts, against quantising in numpy: equal to the bit."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="live weights are torch's")

from fp8_folders import quantise as whole  # noqa: E402 - after the skip
from fp8_folders import same  # noqa: E402

from bridge_core.checkpoint.fp8 import encode  # noqa: E402
from bridge_core.codecs import Fp8Blocks  # noqa: E402
from bridge_core.dtypes import numpy_dtype  # noqa: E402
from bridge_core.errors import CheckpointError, GeometryError  # noqa: E402
from bridge_core.geometry import Piece, View  # noqa: E402
from bridge_core.runtime.fp8 import quantise, quantised  # noqa: E402


def weight(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(-20, 2, shape[1])
    values[:16, :12] = 0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(40, 30), (16, 12), (5, 70)])
def test_torch_and_numpy_quantise_alike(shape, dtype):
    codec = Fp8Blocks(16, 12)
    values = weight(shape, dtype)
    name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    array = values.view(torch.uint8).numpy().view(numpy_dtype(name)).reshape(shape)
    codes, scales = quantise(values, codec, where="x")
    theirs, grid = encode(array, codec, where="x")
    assert codes.view(torch.uint8).numpy().tobytes() == theirs.tobytes()
    assert scales.numpy().tobytes() == grid.tobytes()
    assert all(same(a, b) for a, b in zip((codes, scales), whole(values, (16, 12)), strict=True))


def test_a_strided_part_has_the_codes_of_the_whole():
    """Columns of every second row, as a rank might hold them."""
    codec, values = Fp8Blocks(16, 12), weight((40, 30), torch.float32)
    codes, scales = whole(values, (16, 12))
    part = values[1::2, 7:20]
    memory = part.contiguous().view(-1)
    piece = Piece((20, 13), View("part", 0, (13, 1)), View("x", 37, (60, 1)))
    found, back = quantised(memory, piece, (40, 30), scales, codec)
    assert torch.equal(found.view(torch.uint8), codes[1::2, 7:20].contiguous().view(torch.uint8).view(-1))
    assert back.target == piece.target


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_quantised(bad):
    values = weight((40, 30), torch.float32)
    values[20, 20] = bad
    with pytest.raises(CheckpointError, match=r"infinite or undefined[\s\S]*model\.y"):
        quantise(values, Fp8Blocks(16, 12), where="model.y")


def test_axes_that_run_over_the_ends_of_rows_are_refused():
    piece = Piece((40,), View("part", 0, (1,)), View("x", 5, (1,)))
    with pytest.raises(GeometryError):
        quantised(torch.zeros(40), piece, (4, 12), torch.ones(1, 1), Fp8Blocks())

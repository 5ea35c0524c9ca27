"""Pieces and views against numpy's own indexing."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from bridge_core.errors import GeometryError
from bridge_core.geometry import (
    Box,
    Piece,
    View,
    coalesce,
    dim_steps,
    restrict,
    row_major,
    run_length,
    runs,
    tiling_error,
    whole,
)

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def look(flat: np.ndarray, shape, view: View) -> np.ndarray:
    """numpy's own idea of a strided view; an empty tail of `flat` is never reached."""
    return as_strided(flat[view.offset :], shape, [s * flat.itemsize for s in view.strides])


def apply(piece: Piece, source: np.ndarray, target: np.ndarray) -> None:
    look(target, piece.shape, piece.target)[...] = look(source, piece.shape, piece.source)


@st.composite
def fused(draw):
    """A tensor whose rows are interleaved groups of parts, as in linear_qkv, and the piece of one part."""
    groups, rows, width = (draw(st.integers(1, 4)) for _ in range(3))
    before, after = (draw(st.integers(0, 3)) for _ in range(2))
    slots = before + rows + after
    piece = Piece(
        (groups, rows, width),
        View("hf", 0, (rows * width, width, 1)),
        View("megatron", before * width, (slots * width, width, 1)),
    )
    return piece, (groups * slots, width), (groups * rows, width)


@st.composite
def boxes(draw, shape):
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True))
    return Box(start, extent)


@given(shapes)
def test_row_major_is_numpys(shape):
    assert row_major(shape) == tuple(s // 8 for s in np.zeros(shape, np.int64).strides)


@given(st.data())
def test_restricting_a_piece_copies_what_slicing_the_result_gives(data):
    piece, shape, hf_shape = data.draw(fused())
    box = data.draw(boxes(shape))
    source = np.arange(1, prod(hf_shape) + 1)
    full = np.zeros(prod(shape), np.int64)
    apply(piece, source, full)
    expected = full.reshape(shape)[tuple(slice(s, s + n) for s, n in zip(*box, strict=True))]
    local = np.zeros(box.numel, np.int64)
    for part in restrict(piece, "target", shape, box, box.shape, (0, 0)):
        apply(part, source, local)
    assert np.array_equal(local.reshape(box.shape), expected)


@given(st.data())
def test_restricting_by_a_tiling_loses_and_doubles_nothing(data):
    piece, shape, hf_shape = data.draw(fused())
    cut = data.draw(st.integers(1, shape[0]))
    halves = [Box((0, 0), (cut, shape[1])), Box((cut, 0), (shape[0] - cut, shape[1]))]
    parts = [p for box in halves if box.numel for p in restrict(piece, "target", shape, box, box.shape, (0, 0))]
    assert sum(part.numel for part in parts) == piece.numel
    assert tiling_error(hf_shape, [(part.shape, part.source) for part in parts]) is None


@given(st.data())
def test_restricting_by_source_and_by_target_is_the_same_on_an_inverse(data):
    piece, shape, _ = data.draw(fused())
    box = data.draw(boxes(shape))
    by_target = restrict(piece, "target", shape, box, box.shape, (0, 0))
    by_source = restrict(piece.inverse(), "source", shape, box, box.shape, (0, 0))
    assert [part.inverse() for part in by_source] == by_target


@given(st.data())
def test_runs_copy_what_the_piece_copies(data):
    piece, shape, hf_shape = data.draw(fused())
    source = np.arange(1, prod(hf_shape) + 1)
    expected, got = np.zeros(prod(shape), np.int64), np.zeros(prod(shape), np.int64)
    apply(piece, source, expected)
    for run in runs(piece):
        assert run.length == run_length(piece)
        got[run.target : run.target + run.length] = source[run.source : run.source + run.length]
    assert np.array_equal(got, expected)


@given(st.permutations(range(3)), st.tuples(*[st.integers(1, 4)] * 3))
def test_runs_of_a_transposition(order, shape):
    """The target is the source with its dims permuted: runs may be single elements, never wrong."""
    target_shape = tuple(shape[d] for d in order)
    strides = dict(zip(order, row_major(target_shape), strict=True))
    piece = Piece(shape, View("a", 0, row_major(shape)), View("b", 0, tuple(strides[d] for d in range(3))))
    source = np.arange(prod(shape))
    got = np.full(prod(shape), -1)
    for run in runs(piece):
        got[run.target : run.target + run.length] = source[run.source : run.source + run.length]
    assert np.array_equal(got.reshape(target_shape), source.reshape(shape).transpose(order))


@given(shapes)
def test_a_contiguous_copy_coalesces_to_one_run(shape):
    piece = Piece(shape, View("a", 3, row_major(shape)), View("b", 5, row_major(shape)))
    assert [tuple(run) for run in runs(piece)] == [(3, 5, prod(shape))]
    assert len(coalesce(piece).shape) <= 1


@given(st.data())
def test_tiling_error_agrees_with_counting(data):
    """Random boxes tile a tensor exactly when counting the cover of every element says so."""
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    chosen = data.draw(st.lists(boxes(shape), min_size=1, max_size=4))
    counts = np.zeros(shape, int)
    for box in chosen:
        counts[tuple(slice(s, s + n) for s, n in zip(*box, strict=True))] += 1
    strides = row_major(shape)
    views = [(b.shape, View("t", sum(s * t for s, t in zip(b.start, strides, strict=True)), strides)) for b in chosen]
    assert (tiling_error(shape, views) is None) == bool((counts == 1).all())


def test_tiling_error_says_what_is_wrong():
    row = View("t", 0, (1,))
    assert tiling_error((4,), [((3,), row)]) == "3 of 4 elements are covered"
    assert "covered more than once" in str(tiling_error((4,), [((3,), row), ((2,), View("t", 2, (1,)))]))
    assert tiling_error((2, 2), [((2, 2), View("t", 0, (1,)))]) == "a view of shape (2, 2) has 1 strides"
    assert "leaves the tensor" in str(tiling_error((4,), [((4,), View("t", 1, (1,)))]))
    assert "reaches an element twice" in str(tiling_error((4,), [((2, 3), View("t", 0, (1, 1)))]))


def test_interleaved_columns_tile():
    """gpt-oss keeps gate and up in every other row: two views of step 2."""
    gate, up = ((3, 2), View("t", 0, (4, 1))), ((3, 2), View("t", 2, (4, 1)))
    assert tiling_error((6, 2), [gate, up]) is None


def test_a_stride_that_moves_along_no_dim_is_refused():
    with pytest.raises(GeometryError, match=r"moves along no single dim[\s\S]*stride 5"):
        dim_steps(View("t", 0, (5,)), (2,), (4, 3, 2))


def test_strides_and_boxes_of_whole_tensors():
    assert row_major((2, 3, 4)) == (12, 4, 1)
    assert row_major((2, 0, 3)) == (3, 3, 1)  # as torch has it
    assert whole((2, 3)) == Box((0, 0), (2, 3))

"""Boxes either tile a tensor exactly once or are refused; counted by brute force as oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_core.geometry import Box, View, box_tiling_error, row_major, tiling_error

# Four bars around a hole: no cut along one axis separates them.
PINWHEEL = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]


def counts(shape, boxes):
    total = np.zeros(shape, int)
    for offsets, sizes in boxes:
        total[tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))] += 1
    return total


@st.composite
def tilings(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[axis]))
        for low, high in ((0, cut), (cut, sizes[axis])):
            at = tuple(o + low if i == axis else o for i, o in enumerate(offsets))
            boxes.append((at, tuple(high - low if i == axis else s for i, s in enumerate(sizes))))
    return shape, draw(st.permutations(boxes))


@given(tilings())
def test_tilings_are_accepted(tiling):
    assert box_tiling_error(*tiling) is None


@given(tilings(), st.data())
def test_damaged_tilings_are_refused(tiling, data):
    shape, boxes = tiling
    boxes = list(boxes)
    number = data.draw(st.integers(0, len(boxes) - 1))
    match data.draw(st.sampled_from(["drop", "double", "shift"])):
        case "drop":
            boxes.pop(number)
        case "double":
            boxes.append(boxes[number])
        case "shift":
            offsets, sizes = boxes[number]
            boxes[number] = (tuple(max(0, offset - 1) for offset in offsets), sizes)
    error = box_tiling_error(shape, boxes)
    assert (error is None) == bool((counts(shape, boxes) == 1).all()), error
    assert error is None or "overlap" in error or "are covered" in error


@given(tilings())
def test_boxes_and_their_views_are_judged_alike(tiling):
    """The two arithmetics agree where both apply; views have no extent 0."""
    shape, boxes = tiling
    strides = row_major(shape)
    for chosen in (boxes, boxes[1:]):
        full = [Box(*box) for box in chosen if 0 not in box[1]]
        views = [(box.shape, View("w", sum(map(int.__mul__, box.start, strides)), strides)) for box in full]
        assert (box_tiling_error(shape, chosen) is None) == (tiling_error(shape, views) is None)


def test_interlocked_boxes():
    assert box_tiling_error((3, 3), PINWHEEL) is None
    assert box_tiling_error((3, 3), PINWHEEL[:-1]) == "8 of 9 elements are covered"
    assert "overlap" in str(box_tiling_error((3, 3), [*PINWHEEL[:-1], ((1, 1), (1, 2))]))


@pytest.mark.parametrize(
    ("shape", "box", "message"),
    [
        ((4, 4), ((0, 0), (4, 5)), "leaves the tensor"),
        ((4, 4), ((2, 0), (4, 4)), "leaves the tensor"),
        ((4, 4), ((0,), (4,)), "another number of dims"),
        ((4, 4), ((-1, 0), (4, 4)), "leaves the tensor"),
        ((), ((0,), (1,)), "another number of dims"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(shape, box, message):
    assert message in str(box_tiling_error(shape, [box]))


def test_empty_tensors_and_scalars():
    assert box_tiling_error((), [((), ())]) is None
    assert box_tiling_error((0, 3), []) is None
    assert box_tiling_error((0, 3), [((0, 0), (0, 3))]) is None
    assert "overlap" in str(box_tiling_error((), [((), ()), ((), ())]))
    assert box_tiling_error((), []) == "0 of 1 elements are covered"


def test_large_grids_are_fast_enough_to_check_always():
    boxes = [((layer, expert, 0), (1, 1, 4)) for layer in range(160) for expert in range(128)]
    assert box_tiling_error((160, 128, 4), boxes) is None


def test_the_work_does_not_grow_with_the_extents_that_a_file_claims():
    huge = 10**18
    assert box_tiling_error((huge, 2), [((0, 0), (huge - 1, 2)), ((huge - 1, 0), (1, 2))]) is None

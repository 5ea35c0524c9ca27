"""Boxes either tile a tensor exactly once or are refused; counted by brute force as oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_core.checkpoint.tiling import check_tiling
from bridge_core.errors import CheckpointError

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
    check_tiling(*tiling, where="w")


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
    if (counts(shape, boxes) == 1).all():
        check_tiling(shape, boxes, where="w")
    else:
        with pytest.raises(CheckpointError, match=r"overlap|do not cover"):
            check_tiling(shape, boxes, where="w")


def test_interlocked_boxes():
    check_tiling((3, 3), PINWHEEL, where="w")
    with pytest.raises(CheckpointError, match="do not cover"):
        check_tiling((3, 3), PINWHEEL[:-1], where="w")
    with pytest.raises(CheckpointError, match="overlap"):
        check_tiling((3, 3), [*PINWHEEL[:-1], ((1, 1), (1, 2))], where="w")


@pytest.mark.parametrize(
    ("shape", "box", "message"),
    [
        ((4, 4), ((0, 0), (4, 5)), "leaves its tensor"),
        ((4, 4), ((2, 0), (4, 4)), "leaves its tensor"),
        ((4, 4), ((0,), (4,)), "another number of axes"),
        ((4, 4), ((-1, 0), (4, 4)), "leaves its tensor"),
        ((), ((0,), (1,)), "another number of axes"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(shape, box, message):
    with pytest.raises(CheckpointError, match=rf"{message}(?s:.*)layers\.w"):
        check_tiling(shape, [box], where="layers.w")


def test_empty_tensors_and_scalars():
    check_tiling((), [((), ())], where="w")
    check_tiling((0, 3), [], where="w")
    check_tiling((0, 3), [((0, 0), (0, 3))], where="w")
    with pytest.raises(CheckpointError, match="overlap"):
        check_tiling((), [((), ()), ((), ())], where="w")
    with pytest.raises(CheckpointError, match="do not cover"):
        check_tiling((), [], where="w")


def test_large_grids_are_fast_enough_to_check_always():
    boxes = [((layer, expert, 0), (1, 1, 4)) for layer in range(160) for expert in range(128)]
    check_tiling((160, 128, 4), boxes, where="w")

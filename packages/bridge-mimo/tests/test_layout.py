"""Layouts of components: ranks are shared out, and then checked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_core.errors import LayoutError
from bridge_mimo.layout import ComponentLayout as C
from bridge_mimo.layout import auto_fill_layout, check_layouts, draw_ranks


def ranks(filled):
    return {name: (layout.ranks.start, layout.ranks.stop) for name, layout in filled.items()}


def test_ranks_are_shared_equally():
    filled = auto_fill_layout({"language": C(tp=4, pp=2), "images": C(tp=2)}, 16)
    assert ranks(filled) == {"language": (0, 8), "images": (8, 16)}
    assert [layout.dp for layout in filled.values()] == [1, 4]


def test_without_a_world_as_few_as_are_needed():
    filled = auto_fill_layout({"images": C(tp=2), "language": C(tp=2, ep=4, etp=1)})
    assert ranks(filled) == {"images": (0, 2), "language": (2, 6)}
    assert filled["language"].dp == 2  # 4 experts' ranks over tp=2


def test_given_values_stay_and_the_rest_goes_around_them():
    given_ = {
        "audio": C(tp=2),
        "language": C(tp=2, pp=2, dp=1, rank_offset=2),
        "images": C(tp=1, dp=2),
    }
    filled = auto_fill_layout(given_, 12)
    assert ranks(filled) == {"audio": (6, 12), "language": (2, 6), "images": (0, 2)}
    assert filled["audio"].dp == 3
    assert filled["language"] == given_["language"]


def test_colocated_components_have_all_ranks():
    filled = auto_fill_layout({"language": C(tp=4), "images": C(tp=2)}, 8, colocated=True)
    assert ranks(filled) == {"language": (0, 8), "images": (0, 8)}
    assert [layout.dp for layout in filled.values()] == [2, 4]
    assert check_layouts(filled, 8, colocated=True) == 8
    with pytest.raises(LayoutError, match="components overlap"):
        check_layouts(filled, 8)


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(1, 3)), min_size=1, max_size=4
    ),
    kept=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_whatever_is_left_out_is_filled_in_again(sizes, kept, seed):
    """Layouts that tile a world, with some numbers taken away and in another order, tile it again."""
    names = ["language", "images", "audio", "video"][: len(sizes)]
    whole, first = {}, 0
    for name, (tp, pp, dp) in zip(names, sizes, strict=True):
        whole[name] = C(tp=tp, pp=pp, dp=dp, rank_offset=first)
        first = whole[name].ranks.stop
    open_ = {
        # With all sizes known, places may go; a lone open size is what is left.
        name: C(tp=layout.tp, pp=layout.pp, dp=layout.dp if dp or number else None, rank_offset=layout.rank_offset)
        for number, ((name, layout), (dp, _)) in enumerate(zip(whole.items(), kept, strict=False))
    }
    random.Random(seed).shuffle(order := list(open_))
    assert auto_fill_layout({name: open_[name] for name in order}, first) == {name: whole[name] for name in order}
    placeless = {name: C(tp=layout.tp, pp=layout.pp, dp=layout.dp) for name, layout in open_.items()}
    again = auto_fill_layout({name: placeless[name] for name in order}, first)
    held = sorted(rank for layout in again.values() for rank in layout.ranks)
    assert held == list(range(first))
    assert {name: layout.dp for name, layout in again.items()} == {name: layout.dp for name, layout in whole.items()}


# --- Refusals ---------------------------------------------------------------------------------------


def refusal(layouts, world=None, **options):
    with pytest.raises(LayoutError) as caught:
        auto_fill_layout(layouts, world, **options)
    return caught.value


def test_an_overlap_is_drawn():
    error = refusal({"language": C(tp=4, dp=1, rank_offset=2), "images": C(tp=4, dp=1, rank_offset=0)}, 8)
    assert "overlap" in error.what
    drawn = "ranks 0 to 7 language ..####.. 2-5: tp=4 dp=1 images ####.... 0-3: tp=4 dp=1 !! ??"
    assert str(error.got).split() == drawn.split()


def test_idle_ranks_are_drawn():
    error = refusal({"language": C(tp=4, dp=1), "images": C(tp=2, dp=1)}, 8)
    assert "no component" in error.what
    assert "####...." in str(error.got)
    assert str(error.got).rstrip().endswith("??")


def test_ranks_outside_of_the_world():
    error = refusal({"language": C(tp=4, dp=1), "images": C(tp=4, dp=2)}, 8)
    assert "outside" in error.what
    assert "4-11" in str(error.got)
    assert "++++" in str(error.got)


def test_shares_that_do_not_divide_say_the_numbers():
    error = refusal({"language": C(tp=4, pp=2), "images": C()}, 12)
    assert error.where == "language"
    assert "= 8" in str(error.expected)
    assert "6 of 12" in str(error.got)
    error = refusal({"language": C(), "images": C(), "audio": C(dp=4)}, 9)
    assert "9 ranks - 4 of components with dp = 5" in str(error.got)


def test_shares_that_do_not_divide_are_drawn():
    error = refusal({"language": C(tp=4, pp=2), "images": C(tp=2)}, 12)
    drawn = "6 of 12 ranks ranks 0 to 11 language ######...... 0-5: tp=4 pp=2 images ......###### 6-11: tp=2"
    assert str(error.got).split() == drawn.split()
    error = refusal({"language": C(tp=4), "images": C(tp=3)}, 8, colocated=True)
    drawn = "8 of 8 ranks ranks 0 to 7 language ######## 0-7: tp=4 images ######## 0-7: tp=3"
    assert str(error.got).split() == drawn.split()
    error = refusal({"language": C(), "images": C(), "audio": C(tp=4, dp=1)}, 9)
    drawn = "9 ranks - 4 of components with dp = 5 ranks 0 to 8 audio ####..... 0-3: tp=4 dp=1 ?????"
    assert str(error.got).split() == drawn.split()


def test_experts_that_do_not_divide_name_their_component():
    error = refusal({"images": C(), "language": C(ep=4)}, 12)
    assert "expert grid does not divide the 6 ranks" in error.what
    assert str(error.where).startswith("component language")


def test_language_is_needed():
    assert "language" in refusal({"images": C()}).what


def test_colocated_components_are_in_one_place_and_have_no_pipeline():
    layouts = {"language": C(tp=2, dp=2), "images": C(tp=2, dp=1)}
    assert "same ranks" in refusal(layouts, 4, colocated=True).what
    assert "pipeline" in refusal({"language": C(pp=2), "images": C()}, 2, colocated=True).what


@pytest.mark.parametrize("world", [0, -1, 2.0, True])
def test_a_world_without_ranks(world):
    for colocated in (False, True):
        assert refusal({"language": C()}, world, colocated=colocated).where == "world_size"


@pytest.mark.parametrize("options", [{"rank_offset": -1}, {"rank_offset": True}, {"tp": 0}, {"vpp": 2}])
def test_numbers_that_are_none(options):
    with pytest.raises(LayoutError):
        C(**options)


def test_a_large_world_is_drawn_in_a_line():
    layouts = {"language": C(tp=8, dp=100, rank_offset=0), "images": C(tp=8, dp=28, rank_offset=800)}
    lines = draw_ranks(layouts, 1024).splitlines()
    assert lines[0] == "ranks     0 to 1023, 16 per column"
    assert lines[1].split()[1] == "#" * 50 + "." * 14
    assert lines[2].split()[1] == "." * 50 + "#" * 14
    assert len(lines) == 3


def test_ranks_that_are_meant_to_be_shared_are_not_marked():
    layouts = auto_fill_layout({"language": C(tp=2), "images": C()}, 2, colocated=True)
    assert "!" not in draw_ranks(layouts, 2, colocated=True)
    assert draw_ranks(layouts, 2).splitlines()[-1].strip() == "!!"

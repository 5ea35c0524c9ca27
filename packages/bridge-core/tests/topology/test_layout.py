"""`ParallelLayout`: what it derives, what it refuses and how it says so. No megatron needed."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_core.errors import LayoutError
from bridge_core.topology import ParallelLayout, RankCoords, RankGrid, expert_range

sizes = st.integers(1, 4)
orders = st.permutations(("tp", "cp", "ep", "dp")).map(lambda axes: "-".join((*axes, "pp")))


def test_one_rank_by_default():
    layout = ParallelLayout()
    assert (layout.world_size, layout.etp, layout.dp, layout.expert_dp, layout.vpp) == (1, 1, 1, 1, 1)
    assert layout.coords(0) == RankCoords(tp=0, cp=0, dp=0, pp=0, etp=0, ep=0, expert_dp=0)


def test_expert_sizes_follow_megatron_defaults():
    assert ParallelLayout(tp=4).etp == 4
    # etp*ep = 8 expert ranks do not fit into tp = 4: two data-parallel ranks are the least.
    layout = ParallelLayout(tp=4, pp=2, ep=8, etp=1)
    assert (layout.dp, layout.expert_dp, layout.world_size) == (2, 1, 16)
    assert ParallelLayout(tp=4, ep=2, etp=1).expert_dp == 2


@settings(deadline=None)
@given(tp=sizes, pp=sizes, cp=sizes, ep=sizes, etp=sizes, times=st.integers(1, 3), order=orders, data=st.data())
def test_rank_of_undoes_coords(tp, pp, cp, ep, etp, times, order, data):
    smallest = ParallelLayout(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, order=order)
    layout = dataclasses.replace(smallest, dp=times * smallest.dp)
    rank = data.draw(st.integers(0, layout.world_size - 1))
    at = layout.coords(rank)
    assert layout.rank_of(tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp) == rank
    for axis, place in (("tp", at.etp), ("ep", at.ep), ("dp", at.expert_dp), ("pp", at.pp)):
        (group,) = (ranks for ranks in layout.groups(axis, is_expert=True) if rank in ranks)
        assert group[place] == rank


def test_16k_ranks_have_16k_different_coordinates():
    layout = ParallelLayout(tp=8, pp=16, cp=2, dp=64, ep=64, etp=1)
    assert layout.world_size == 16_384
    assert len({layout.coords(rank) for rank in range(layout.world_size)}) == 16_384


def test_groups_cut_the_world_into_equal_parts():
    layout = ParallelLayout(tp=2, pp=2, cp=2, dp=2, ep=4, etp=1)
    assert layout.groups("tp")[:2] == [[0, 1], [2, 3]]
    assert layout.groups("ep", is_expert=True)[0] == [0, 1, 2, 3]
    for axes, is_expert in (("tp", False), ("tp-pp", False), ("dp-cp", False), ("tp-ep-pp", True), ("dp", True)):
        groups = layout.groups(axes, is_expert=is_expert)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


def test_json_round_trip_and_equality():
    layout = ParallelLayout(tp=2, pp=4, vpp=2, ep=4, etp=1, num_layers_in_first_pipeline_stage=2)
    assert ParallelLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert ParallelLayout.from_dict({"tp": 2}) == ParallelLayout(tp=2, etp=2, dp=1)
    assert hash(copy.copy(layout)) == hash(layout)
    thawed = pickle.loads(pickle.dumps(layout))
    assert thawed == layout
    assert thawed.coords(5) == layout.coords(5)


def test_replace_keeps_or_derives_again():
    layout = ParallelLayout(tp=2, ep=4, etp=1)
    assert layout.dp == 2
    assert dataclasses.replace(layout, tp=4).dp == 2
    assert dataclasses.replace(layout, tp=4, dp=None).dp == 1


def test_layout_string_sets_vpp():
    layout = ParallelLayout(pp=2, pipeline_model_parallel_layout="Et|t|t|tL")
    assert layout.vpp == 2
    assert ParallelLayout(pp=2, vpp=2, pipeline_model_parallel_layout="Et|t|t|tL") == layout
    assert ParallelLayout(pp=4, pipeline_model_parallel_layout="Et|t|t|tL").vpp == 1


def test_text_shows_sizes_and_what_is_not_default():
    assert str(ParallelLayout(tp=2, pp=2)) == "ParallelLayout(tp=2, pp=2, vpp=1, ep=1, etp=2, cp=1, dp=1)"
    layout = ParallelLayout(pp=2, order="tp-pp-dp", account_for_loss_in_pipeline_split=True)
    assert str(layout).endswith("dp=1, order='tp-pp-dp', account_for_loss_in_pipeline_split=True)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 0}, r"tp is not a positive integer\n.*\n.*int >= 1\n.*got: +0"),
        ({"pp": True}, r"pp is not a positive integer[\s\S]*got: +True"),
        ({"etp": "2"}, r"etp is not a positive integer[\s\S]*got: +'2'"),
        ({"dp": -1}, r"dp is not a positive integer[\s\S]*got: +-1"),
        ({"num_layers_in_last_pipeline_stage": 0}, r"num_layers_in_last_pipeline_stage is not a positive integer"),
        ({"order": None}, r"order is not a string[\s\S]*got: +None"),
        ({"pipeline_model_parallel_layout": [["E"]]}, r"pipeline_model_parallel_layout is not a string"),
        (
            {"tp": 2, "pp": 3, "dp": 3, "ep": 4, "etp": 1},
            r"does not divide the 18 ranks[\s\S]*etp\*ep\*pp = 12[\s\S]*2\*1\*3\*3 = 18",
        ),
        ({"vpp": 2}, r"vpp=2 needs more than one pipeline rank[\s\S]*pp=1"),
        ({"tp": 2, "order": "cp-dp"}, r"order 'cp-dp'[\s\S]*left out with size > 1: 'tp'"),
        ({"ep": 2, "order": "tp-dp"}, r"order 'tp-dp'[\s\S]*left out with size > 1: .*'ep'"),
        ({"order": "tp-tp"}, r"named twice: 'tp'"),
        ({"order": "tp-gtp_remat"}, r"unknown: 'gtp_remat'"),
        (
            {"tp": 2, "pp": 2, "etp": 1, "order": "tp-pp-dp"},
            r"different pipeline stages[\s\S]*dp=1, expert_dp=2, strides 2 \(dense\) and 1 \(expert\)",
        ),
        (
            {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "order": "tp-pp-ep-dp"},
            r"different pipeline stages[\s\S]*dp=1, expert_dp=1, strides 2 \(dense\) and 1 \(expert\)",
        ),
        (
            {"num_layers_in_first_pipeline_stage": 1, "account_for_loss_in_pipeline_split": True},
            r"exclude each other[\s\S]*first_pipeline_stage, account_for_loss",
        ),
        (
            {"pipeline_model_parallel_layout": "EtL", "account_for_embedding_in_pipeline_split": True},
            r"exclude each other[\s\S]*account_for_embedding_in_pipeline_split, pipeline_model_parallel_layout",
        ),
        (
            {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1},
            r"one pipeline rank cannot be given two numbers",
        ),
        (
            {"pp": 2, "vpp": 2, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2},
            r"Megatron cannot build[\s\S]*pp=2 and vpp=2[\s\S]*leave num_layers_in_last_pipeline_stage out",
        ),
        (
            {"pp": 2, "vpp": 3, "pipeline_model_parallel_layout": "Et|t|t|tL"},
            r"vpp=3 contradicts[\s\S]*vpp=2: 4 chunks over pp=2",
        ),
        ({"pipeline_model_parallel_layout": "Et|tL"}, r"vpp=2 needs more than one pipeline rank"),
    ],
)
def test_contradictions_are_refused_with_their_numbers(options, message):
    with pytest.raises(LayoutError, match=message):
        ParallelLayout.from_dict(options)


def test_errors_travel_between_processes():
    with pytest.raises(LayoutError) as caught:
        ParallelLayout(vpp=2)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_unknown_option_and_places_that_do_not_exist():
    with pytest.raises(LayoutError, match=r"unknown layout option\(s\): tensor[\s\S]*names among tp, pp, vpp, ep"):
        ParallelLayout.from_dict({"tensor": 2})
    layout = ParallelLayout(tp=2, dp=2)
    with pytest.raises(LayoutError, match=r"rank 4 does not exist[\s\S]*0 <= rank < 4"):
        layout.coords(4)
    with pytest.raises(LayoutError, match=r"rank -1 does not exist"):
        layout.coords(-1)
    with pytest.raises(LayoutError, match=r"index 2 does not exist on axis 'tp'[\s\S]*0 <= index < 2"):
        layout.rank_of(tp=2)
    with pytest.raises(LayoutError, match=r"no mesh axis 'etp'[\s\S]*tp, cp, ep, dp, pp"):
        layout.groups("etp")
    with pytest.raises(LayoutError, match=r"no mesh axis 'etp'"):
        RankGrid((("tp", 2),)).stride("etp")


def test_experts_are_equal_contiguous_ranges():
    assert [list(expert_range(8, ep=4, ep_rank=rank)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(LayoutError, match=r"10 experts do not divide over ep=4[\s\S]*num_experts=10, ep=4"):
        expert_range(10, ep=4, ep_rank=0)
    with pytest.raises(LayoutError, match=r"rank 4 does not exist[\s\S]*0 <= ep_rank < 4"):
        expert_range(8, ep=4, ep_rank=4)
    with pytest.raises(LayoutError, match="ep=0"):
        expert_range(8, ep=0, ep_rank=0)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, bridge_core.topology\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Rank arithmetic equals megatron-core's `RankGenerator`, and `initialize_model_parallel` on fake process groups."""

import itertools
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_core.errors import LayoutError
from bridge_core.topology import ParallelLayout, RankGrid

parallel_state = pytest.importorskip("megatron.core.parallel_state")

AXES = ("tp", "cp", "ep", "dp", "pp")
sizes = st.integers(1, 4)
orders = st.permutations(AXES).map("-".join)
tokens = st.lists(st.sampled_from(AXES), min_size=1, max_size=3).map("-".join)
quick = settings(deadline=None, max_examples=150)


@contextmanager
def fake_ranks(*, rank: int, world_size: int):
    """A process group that exists in name only: enough for `initialize_model_parallel` to number the ranks."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def initialize(layout: dict, order: str) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"] if layout["vpp"] > 1 else None,
        context_parallel_size=layout["cp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        order=order,
        create_gloo_process_groups=False,
    )


def named_sizes(**sizes: int) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in ("tp", "pp", "dp", "ep", "cp")}


@quick
@given(tp=sizes, pp=sizes, dp=sizes, cp=sizes, order=orders, leave_out=st.sets(st.sampled_from(AXES)), token=tokens)
def test_groups_equal_those_of_rank_generator(tp, pp, dp, cp, order, leave_out, token):
    order = "-".join(axis for axis in order.split("-") if axis not in leave_out) or "tp"
    try:
        theirs = parallel_state.RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    except RuntimeError:
        with pytest.raises(LayoutError, match="left out with size > 1"):
            RankGrid.from_order(order, named_sizes(tp=tp, pp=pp, dp=dp, cp=cp))
        return
    ours = RankGrid.from_order(order, named_sizes(tp=tp, pp=pp, dp=dp, cp=cp))
    assert ours.size == theirs.world_size
    assert ours.groups(token) == theirs.get_ranks(token)


@quick
@given(tp=sizes, ep=sizes, pp=sizes, dp=sizes, order=orders, token=tokens)
def test_expert_groups_equal_those_of_rank_generator(tp, ep, pp, dp, order, token):
    theirs = parallel_state.RankGenerator(tp=tp, ep=ep, dp=dp, pp=pp, cp=1, order=order.upper())
    ours = RankGrid.from_order(order.upper(), named_sizes(tp=tp, pp=pp, dp=dp, ep=ep))
    assert ours.groups(token) == theirs.get_ranks(token)


@pytest.mark.parametrize("order", ["tp-cp-xp", "tp--dp", "tp-cp-ep-dp-pp-"])
def test_orders_that_rank_generator_cannot_read_are_refused(order):
    with pytest.raises(KeyError):
        parallel_state.RankGenerator(tp=2, ep=1, dp=1, pp=1, cp=1, order=order)
    with pytest.raises(LayoutError, match="unknown"):
        ParallelLayout(tp=2, order=order)


@settings(deadline=None, max_examples=200)
@given(
    tp=sizes,
    pp=st.integers(1, 3),
    vpp=st.integers(1, 2),
    cp=st.integers(1, 2),
    dp=sizes,
    ep=sizes,
    etp=st.none() | sizes,
    order=st.just("tp-cp-ep-dp-pp") | orders,
    data=st.data(),
)
def test_layout_equals_initialize_model_parallel(order, data, **options):
    """Same layouts accepted, same coordinates and groups; refused there means refused here."""
    world_size = options["tp"] * options["cp"] * options["dp"] * options["pp"]
    rank = data.draw(st.integers(0, world_size - 1), label="rank")
    with fake_ranks(rank=rank, world_size=world_size):
        try:
            initialize(options, order)
        except (RuntimeError, AssertionError):
            with pytest.raises(LayoutError, match="expected:"):
                ParallelLayout(**options, order=order)
            return
        layout = ParallelLayout(**options, order=order)
        coords = layout.coords(rank)
        assert coords.tp == parallel_state.get_tensor_model_parallel_rank()
        assert coords.pp == parallel_state.get_pipeline_model_parallel_rank()
        assert coords.cp == parallel_state.get_context_parallel_rank()
        assert coords.dp == parallel_state.get_data_parallel_rank()
        assert coords.ep == parallel_state.get_expert_model_parallel_rank()
        assert coords.etp == parallel_state.get_expert_tensor_parallel_rank()
        assert coords.expert_dp == parallel_state.get_expert_data_parallel_rank()
        assert layout.expert_dp == parallel_state.get_expert_data_parallel_world_size()
        check_groups(layout, rank)


def check_groups(layout: ParallelLayout, rank: int) -> None:
    from torch.distributed import get_process_group_ranks

    for axes, is_expert, group in (
        ("tp", False, parallel_state.get_tensor_model_parallel_group()),
        ("pp", False, parallel_state.get_pipeline_model_parallel_group()),
        ("dp", False, parallel_state.get_data_parallel_group()),
        ("dp-cp", False, parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ("tp-pp", False, parallel_state.get_model_parallel_group()),
        ("ep", True, parallel_state.get_expert_model_parallel_group()),
        ("tp", True, parallel_state.get_expert_tensor_parallel_group()),
        ("tp-ep", True, parallel_state.get_expert_tensor_and_model_parallel_group()),
        ("dp", True, parallel_state.get_expert_data_parallel_group()),
    ):
        (mine,) = [ranks for ranks in layout.groups(axes, is_expert=is_expert) if rank in ranks]
        assert mine == get_process_group_ranks(group), (axes, is_expert)


def test_smallest_dp_is_what_megatron_needs():
    """One data-parallel rank less, and Megatron refuses the world size."""
    for tp, cp, ep, etp in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2)):
        layout = ParallelLayout(tp=tp, cp=cp, ep=ep, etp=etp)
        for dp in range(1, layout.dp + 1):
            with fake_ranks(rank=0, world_size=tp * cp * dp):
                if dp == layout.dp:
                    initialize(layout.to_dict(), layout.order)
                else:
                    with pytest.raises(RuntimeError, match="not divisible"):
                        initialize(layout.to_dict(), layout.order)

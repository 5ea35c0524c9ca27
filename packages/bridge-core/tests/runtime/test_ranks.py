"""The pool of ranks, and process groups of a layout."""

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_core.errors import BridgeError, LayoutError
from bridge_core.runtime.groups import group_ranks
from bridge_core.testing.ranks import FirstRanks, RankError, RankPool
from bridge_core.topology import ParallelLayout

dist = pytest.importorskip("torch.distributed")

# Jobs: they run in the rank processes, which find them by this file.


def place():
    return dist.get_rank(), dist.get_world_size()


def total(number):
    import torch

    value = torch.tensor([number + dist.get_rank()])
    dist.all_reduce(value)
    return value.item()


def fail_on(rank):
    if dist.get_rank() == rank:
        raise KeyError("not here")
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)
    dist.barrier()


def return_lambda():
    return lambda: None


def threads():
    import torch

    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def groups_by_size(**layout):
    from bridge_core.testing.rank_worker import groups

    first, second = groups(**layout), groups(**layout)
    return first is second, dist.get_process_group_ranks(first.tp), first.dp is first.dp_cp


def refuse(layout):
    from bridge_core.runtime.groups import pg_collection

    try:
        pg_collection(**layout)
    except LayoutError as error:
        return str(error)
    return None


def part_of_the_world(ranks):
    """All ranks make the groups; only the members of `ranks` have them and talk."""
    import torch

    from bridge_core.runtime.groups import pg_collection

    pg = pg_collection(tp=2, ranks=ranks)
    if dist.get_rank() not in ranks:
        assert not any(vars(pg).values())
        return None
    value = torch.tensor([dist.get_rank()])
    dist.all_reduce(value, group=pg.tp)
    return value.item()


def compare_with_mcore(layouts):
    """Our groups and parallel_state's for each layout: field -> ranks, ours and theirs."""
    from dataclasses import fields

    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge_core.runtime.groups import pg_collection
    from bridge_core.runtime.host import host_backend

    def members(collection):
        found = {field.name: getattr(collection, field.name, None) for field in fields(collection)}
        return {name: None if group is None else dist.get_process_group_ranks(group) for name, group in found.items()}

    pairs = []
    for layout in layouts:
        before = {name: value for name, value in vars(parallel_state).items() if name.startswith("_")}
        ours = members(pg_collection(**layout))
        after = {name: value for name, value in vars(parallel_state).items() if name.startswith("_")}
        assert before == after, "pg_collection changed parallel_state"
        with host_backend():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.get("tp", 1),
                pipeline_model_parallel_size=layout.get("pp", 1),
                context_parallel_size=layout.get("cp", 1),
                expert_model_parallel_size=layout.get("ep", 1),
                expert_tensor_parallel_size=layout.get("etp"),
                create_gloo_process_groups=False,
            )
            theirs = members(ProcessGroupCollection.use_mpu_process_groups())
            parallel_state.destroy_model_parallel()
        pairs.append((ours, theirs))
    return pairs


def device_facts():
    import os

    import torch

    return os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.is_available()


def sum_on_gpu():
    import torch
    import torch.distributed as dist

    ones = torch.ones(2, device="cuda")
    dist.all_reduce(ones)
    return {"backend": dist.get_backend_config(), "tensors": [ones]}


# Tests of the pool.


def test_every_rank_answers_in_rank_order(rank_pool):
    assert rank_pool.run(place) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert rank_pool.run(total, 10) == [46] * 4
    assert rank_pool.run(threads) == [(1, "1")] * 4


def test_a_job_on_some_ranks_has_a_world_of_its_own(rank_pool):
    assert rank_pool.run(place, ranks=[3, 1]) == [(0, 2), (1, 2)]
    assert rank_pool.run(total, 0, ranks=[3, 1]) == [1, 1]
    assert rank_pool.run(total, 0) == [6] * 4


def test_an_exception_reaches_the_caller_with_its_traceback(rank_pool):
    with pytest.raises(RankError, match="KeyError: 'not here'") as caught:
        rank_pool.run(fail_on, 2)
    assert caught.value.rank == 2
    assert 'raise KeyError("not here")' in caught.value.traceback_text
    assert isinstance(caught.value.__cause__, KeyError)
    assert rank_pool.started, "living processes are kept"
    assert rank_pool.run(total, 0) == [6] * 4, "and the next job does not meet the failed one's collectives"


def test_a_result_that_cannot_be_pickled_is_an_error(rank_pool):
    with pytest.raises(RankError, match="cannot be pickled"):
        rank_pool.run(return_lambda)


def test_a_function_that_ranks_cannot_find_is_refused_before_anything_runs(rank_pool):
    with pytest.raises(ValueError, match="not a top-level function"):
        rank_pool.run(lambda: None)
    with pytest.raises(ValueError, match="distinct ranks"):
        rank_pool.run(place, ranks=[0, 0])


@pytest.mark.slow
@pytest.mark.ranks
def test_a_dead_or_hung_rank_is_an_error_and_the_pool_starts_anew():
    with RankPool(2) as pool:
        with pytest.raises(RankError, match="exit code 7") as dead:
            pool.run(die_on, 1)
        assert dead.value.rank == 1
        assert not pool.started
        assert pool.run(total, 0) == [1, 1]
        with pytest.raises(RankError, match="did not answer within 2 s") as hung:
            pool.run(hang_on, 1, timeout_s=2)
        assert "in hang_on" in hung.value.traceback_text, "it says where the rank hangs"
        assert not pool.started


def test_nccl_without_a_gpu_per_rank_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BridgeError, match="a GPU for each rank"):
        RankPool(2, backend="nccl").run(place)


class NamedPool:
    """Stands in for a pool: its jobs answer with its name."""

    def __init__(self, name, size):
        self.name, self.size = name, size

    def run(self, fn, *, ranks, **options):
        return [f"{self.name} {rank}" for rank in ranks]


def test_a_job_runs_where_each_of_its_ranks_has_a_process():
    gpus, cpus = NamedPool("gpu", 2), NamedPool("cpu", 8)
    first = FirstRanks(4, gpus, cpus)
    assert first.run(place, ranks=[1, 0]) == ["gpu 1", "gpu 0"]
    assert first.run(place) == ["cpu 0", "cpu 1", "cpu 2", "cpu 3"]
    assert first.run(place, ranks=[2]) == ["cpu 2"]


def test_ranks_on_gloo_see_no_gpu(rank_pool):
    assert rank_pool.run(device_facts, ranks=[0]) == [("", False)]


@pytest.mark.gpu
def test_ranks_on_gpus_speak_nccl_and_answer_with_tensors_on_the_cpu(device_ranks):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    (answer,) = device_ranks.run(sum_on_gpu, ranks=[0])
    assert answer["backend"] == "cpu:gloo,cuda:nccl"
    assert answer["tensors"][0].device.type == "cpu"
    assert answer["tensors"][0].tolist() == [1.0, 1.0]


# Tests of process groups.


def test_groups_are_made_once_per_world(rank_pool):
    # Singleton groups of the same ranks are one process group: at cp = 1, dp and dp_cp are.
    assert rank_pool.run(groups_by_size, tp=2, dp=2) == [(True, [r // 2 * 2, r // 2 * 2 + 1], True) for r in range(4)]


def test_a_layout_may_use_some_ranks_only(rank_pool):
    assert rank_pool.run(part_of_the_world, [1, 3]) == [None, 4, None, 4]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 2, "ranks": [1, 0]}, "ascending"),
        ({"tp": 2, "ranks": [0, 1, 2]}, "does not fit"),
        ({"tp": 4, "dp": 2}, "outside the world"),
        ({"vpp": 2}, "more than one pipeline rank"),
        ({"ep": 3, "dp": 2}, "expert grid"),
        ({"ep": 0}, "not a positive integer"),
        ({"tp": 0}, "not a positive integer"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(rank_pool, layout, message):
    assert all(message in str(answer) for answer in rank_pool.run(refuse, layout, ranks=[0, 1]))


LAYOUTS = [
    {"tp": 2, "pp": 2},
    {"tp": 2, "dp": 2, "ep": 2, "etp": 1},
    {"tp": 1, "dp": 4, "ep": 2, "etp": 2},
    {"tp": 2, "cp": 2, "ep": 4, "etp": 1},
    {"pp": 4},
    {"pp": 2, "dp": 2, "ep": 2},
    {"dp": 4},
]


def test_groups_are_those_of_parallel_state_on_every_rank(rank_pool):
    pytest.importorskip("megatron.core")
    for rank, pairs in enumerate(rank_pool.run(compare_with_mcore, LAYOUTS)):
        for layout, (ours, theirs) in zip(LAYOUTS, pairs, strict=True):
            assert ours == theirs, (rank, layout)


small = st.sampled_from([1, 2, 3, 4])


@given(tp=small, cp=small, dp=small, pp=small, ep=small, etp=small)
def test_group_ranks_are_those_of_mcores_rank_generator(tp, cp, dp, pp, ep, etp):
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    world = tp * cp * dp * pp
    if world % (etp * ep * pp):
        with pytest.raises(LayoutError):
            group_ranks(ParallelLayout(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp))
        return
    order = "tp-cp-ep-dp-pp"
    dense = parallel_state.RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    expert = parallel_state.RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order=order)
    ours = group_ranks(ParallelLayout(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp))
    for name, generator, token in [
        ("tp", dense, "tp"),
        ("cp", dense, "cp"),
        ("dp", dense, "dp"),
        ("pp", dense, "pp"),
        ("mp", dense, "tp-pp"),
        ("tp_cp", dense, "tp-cp"),
        ("dp_cp", dense, "dp-cp"),
        ("tp_dp_cp", dense, "tp-dp-cp"),
        ("expt_tp", expert, "tp"),
        ("ep", expert, "ep"),
        ("expt_dp", expert, "dp"),
        ("tp_ep", expert, "tp-ep"),
        ("tp_ep_pp", expert, "tp-ep-pp"),
    ]:
        assert sorted(map(list, ours[name])) == sorted(generator.get_ranks(token)), name


def test_idle_ranks_leave_a_world_that_others_leave():
    """Before the next job begins: NCCL lets no rank go while others stay."""
    with RankPool(3) as pool:
        assert pool.run(total, 0) == [3] * 3
        assert pool.run(total, 0, ranks=[0, 1]) == [1, 1]
        assert set(pool._world_of) == {0, 1}
        assert pool.run(total, 0, ranks=[2, 0]) == [1, 1]
        assert set(pool._world_of) == {0, 2}
        assert pool.run(total, 0) == [3] * 3

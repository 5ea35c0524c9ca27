"""What the tests of all packages share: one pool of ranks for the whole session, and one more where GPUs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


class Ranks:
    """The first `size` ranks of some pools, as if they were all that there is.

    A job runs in the first pool that has a rank for each of its own: on GPUs where there are enough of them.
    """

    def __init__(self, size: int, pools: Sequence[Any]) -> None:
        self.size, self.pools = size, pools

    def pool_of(self, job: Sequence[int]) -> Any:
        """Where a job of these ranks runs."""
        return next(pool for pool in self.pools if max(job) < pool.size)

    def run(self, function, *args, ranks=None, **options):
        """`RankPool.run`, on these ranks where none are named."""
        job = range(self.size) if ranks is None else ranks
        return self.pool_of(job).run(function, *args, ranks=job, **options)


@pytest.fixture(scope="session")
def cpu_pool():
    """Eight gloo ranks that see no GPU, started by the first test that runs a job on any of them."""
    pytest.importorskip("torch", reason="real ranks need torch")
    pytest.importorskip("megatron.core", reason="real ranks need megatron-core")
    from bridge_core.testing.ranks import RankPool

    with RankPool(8, timeout_s=300) as pool:
        yield pool


@pytest.fixture(scope="session")
def gpu_pool(cpu_pool):
    """NCCL ranks, one per GPU and eight at most; None on a machine without any."""
    import torch

    from bridge_core.testing.ranks import RankPool

    if not (devices := min(8, torch.cuda.device_count())):
        yield None
        return
    with RankPool(devices, "nccl", timeout_s=300) as pool:
        yield pool


@pytest.fixture(scope="session")
def eight_ranks(cpu_pool, gpu_pool):
    """Eight ranks: on NCCL, with Transformer Engine if it is installed, where each has a GPU; on gloo elsewhere."""
    return Ranks(8, [gpu_pool, cpu_pool] if gpu_pool else [cpu_pool])


@pytest.fixture(scope="session")
def rank_pool(eight_ranks):
    """Four of them, which is what most jobs need."""
    return Ranks(4, eight_ranks.pools)


@pytest.fixture(scope="session")
def cpu_ranks(cpu_pool):
    """Four ranks on gloo, on every machine: for what is about the CPU."""
    return Ranks(4, [cpu_pool])


def pytest_collection_modifyitems(items):
    """Whatever uses a pool is marked `ranks`."""
    for item in items:
        if "cpu_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)

"""What the tests of all packages share: one pool of ranks for the session, one more where GPUs are; none is timed."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The first example of a property may pay for importing torch; a deadline would blame the property.
settings.register_profile("bridge", deadline=None)
settings.load_profile("bridge")


@pytest.fixture(scope="session")
def eight_ranks():
    """Eight gloo ranks that see no GPU, started by the first test that runs a job on any of them."""
    pytest.importorskip("torch", reason="real ranks need torch")
    pytest.importorskip("megatron.core", reason="real ranks need megatron-core")
    from bridge_core.testing.ranks import RankPool

    with RankPool(8, timeout_s=300) as pool:
        yield pool


@pytest.fixture(scope="session")
def rank_pool(eight_ranks):
    """Four of them, which is what most jobs need."""
    from bridge_core.testing.ranks import FirstRanks

    return FirstRanks(4, eight_ranks)


@pytest.fixture(scope="session")
def eight_device_ranks(eight_ranks):
    """Eight ranks, with NCCL (and Transformer Engine, if it is installed) in jobs that have a GPU for each rank.

    Without a GPU, or with too few of them for a job, it runs on gloo.
    """
    import torch

    from bridge_core.testing.ranks import FirstRanks, RankPool

    if not (devices := min(8, torch.cuda.device_count())):
        yield FirstRanks(8, eight_ranks)
        return
    with RankPool(devices, "nccl", timeout_s=300) as pool:
        yield FirstRanks(8, pool, eight_ranks)


@pytest.fixture(scope="session")
def device_ranks(eight_device_ranks):
    """Four of them."""
    from bridge_core.testing.ranks import FirstRanks

    return FirstRanks(4, *eight_device_ranks.pools)


def pytest_collection_modifyitems(items):
    """Whatever uses a pool is marked `ranks`."""
    for item in items:
        if "eight_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)

"""What the tests of all packages share: one pool of ranks for the whole session, and no test that is timed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

# The first example of a property may pay for importing torch; a deadline would blame the property.
settings.register_profile("bridge", deadline=None)
settings.load_profile("bridge")


class FirstRanks:
    """The first `size` ranks of a pool, as if they were all that it has."""

    def __init__(self, pool: Any, size: int) -> None:
        self.pool, self.size = pool, size

    def run(self, function, *args, ranks=None, **options):
        """`RankPool.run`, on these ranks where none are named."""
        return self.pool.run(function, *args, ranks=range(self.size) if ranks is None else ranks, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)


@pytest.fixture(scope="session")
def eight_ranks():
    """Eight gloo ranks on this machine, started by the first test that runs a job on any of them."""
    pytest.importorskip("torch", reason="real ranks need torch")
    pytest.importorskip("megatron.core", reason="real ranks need megatron-core")
    from bridge_core.testing.ranks import RankPool

    with RankPool(8, timeout_s=300) as pool:
        yield pool


@pytest.fixture(scope="session")
def rank_pool(eight_ranks):
    """Four of them, which is what most jobs need."""
    return FirstRanks(eight_ranks, 4)


def pytest_collection_modifyitems(items):
    """Whatever uses the pool is marked `ranks`."""
    for item in items:
        if {"rank_pool", "eight_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)

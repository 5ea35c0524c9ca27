"""Fixtures and settings of all tests of bridge-peft."""

import sys
from pathlib import Path

import pytest

# Jobs are imported by name, here and in the rank processes, which inherit this path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def rank_pool():
    """Four gloo ranks on this machine, started by the first test that runs a job on them."""
    pytest.importorskip("torch")
    from bridge_core.testing.ranks import RankPool

    with RankPool(4) as pool:
        yield pool


# Whole grids of layouts on real ranks: minutes each.
SLOW = ("test_export", "test_parallel", "test_quantised")


def pytest_collection_modifyitems(items):
    """Whatever uses the pool is marked `ranks`; the modules of `SLOW` are marked so."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
        if "rank_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)

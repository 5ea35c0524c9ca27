"""Fixtures and settings of all tests of bridge-mimo."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Jobs are imported by name, here and in the rank processes, which inherit this path.
sys.path.insert(0, str(Path(__file__).parent))

# The first example of a property may pay for an import; a deadline would blame the property.
settings.register_profile("bridge", deadline=None)
settings.load_profile("bridge")


@pytest.fixture(scope="session")
def rank_pool():
    """Eight gloo ranks on this machine, started by the first test that runs a job on them."""
    pytest.importorskip("torch")
    from bridge_core.testing.ranks import RankPool

    with RankPool(8) as pool:
        yield pool


def pytest_collection_modifyitems(items):
    """Whatever uses the pool is marked `ranks`."""
    for item in items:
        if "rank_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)

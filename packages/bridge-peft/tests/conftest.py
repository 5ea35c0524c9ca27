"""Fixtures and settings of all tests of bridge-peft."""

import sys
from pathlib import Path

import pytest

# Jobs are imported by name, here and in the rank processes, which inherit this path.
sys.path.insert(0, str(Path(__file__).parent))


# Whole grids of layouts on real ranks: minutes each.
SLOW = ("test_export", "test_parallel", "test_quantised")


def pytest_collection_modifyitems(items):
    """The modules of `SLOW` are marked so."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)

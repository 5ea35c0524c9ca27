"""Settings of all tests of bridge-quant-export."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Helpers are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

# The first example of a property may pay for importing torch; a deadline would blame the property.
settings.register_profile("bridge", deadline=None)
settings.load_profile("bridge")

pytest.importorskip("torch", reason="packing needs the extra bridge-quant-export[torch]")

# Imported once, before the ranks are forked from the process that did.
_PRELOAD = (
    *("torch", "torch.distributed", "megatron.core.models.gpt", "megatron.core.dist_checkpointing"),
    "modelopt.torch.quantization",
)


@pytest.fixture(scope="session")
def rank_pool():
    """Four gloo ranks on this machine, started by the first test that runs a job on them."""
    pytest.importorskip("megatron.core", reason="live models need megatron-core")
    from bridge_core.testing.ranks import RankPool

    with RankPool(4, timeout_s=300, preload=_PRELOAD) as pool:
        yield pool


def pytest_collection_modifyitems(items):
    """Whatever uses the pool is marked `ranks`."""
    for item in items:
        if "rank_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)

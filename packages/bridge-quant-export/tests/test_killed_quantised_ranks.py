"""A rank that dies in an export: every other rank is told within seconds, and nothing looks finished."""

from __future__ import annotations

import pytest
from quant_kill_jobs import PLACES, die_in
from quant_models import make
from runtime.kill_jobs import check_told

from bridge_core.testing.ranks import RankError, RankPool

pytest.importorskip("megatron.core", reason="live models need megatron-core")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")

QUICK = ["ranges"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3") / "hf")


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[] if place in QUICK else pytest.mark.slow) for place in PLACES]
)
def test_all_others_are_told(folder, tmp_path, place):
    """In a pool of its own: the dead process must not be one of the session's. Who is told stays alive, and silent.

    Four replicas: all ranks are one group wherever some of them agree.
    """
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    with RankPool(4) as pool, pytest.raises(RankError, match="died"):
        pool.run(die_in, str(folder), {"dp": 4}, place, str(out), str(notes), timeout_s=300)
    check_told(notes, 3, 4)
    assert not out.exists()

"""A rank that dies: every other rank is told within seconds, by its own connection, and nothing looks finished."""

from __future__ import annotations

import pytest
from runtime.kill_jobs import VERBS, check_told, die_in

from bridge_core.testing.hf_models import make_model, save_model
from bridge_core.testing.ranks import RankError, RankPool

pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="weights are transformers'")

QUICK = [("load from one reader", "bytes"), ("save", 0.4)]
CASES = [(verb, place) for verb in VERBS for place in ("bytes", 0.4, 0.7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("qwen3") / "hf")


@pytest.mark.parametrize(
    ("verb", "place"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("victim", [3])
def test_all_others_are_told(folder, tmp_path, verb, place, victim):
    """In a pool of its own: the dead process must not be one of the session's. Who is told stays alive, and silent."""
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    job = (str(folder), {"tp": 2, "dp": 2}, verb, place, victim, str(out), str(notes))
    with RankPool(4) as pool, pytest.raises(RankError, match="died"):
        pool.run(die_in, *job, timeout_s=90)
    check_told(notes, victim, 4)
    assert not out.exists()

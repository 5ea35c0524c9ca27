"""A rank that dies while adapters travel: every other rank is told within seconds, and nothing looks finished."""

import pytest
from adapter_kill_jobs import PLACES, die_in

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("megatron.core", reason="real models need megatron-core")

from hf_cases import peft_adapter  # noqa: E402 - after the skips
from runtime.kill_jobs import check_told  # noqa: E402

from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402
from bridge_core.testing.ranks import RankError, RankPool  # noqa: E402

QUICK = [("save", "layers"), ("load", "patterns")]
CASES = [(verb, place) for verb, places in PLACES.items() for place in places]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return peft_adapter(folder, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize(
    ("verb", "place"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_all_others_are_told(folder, adapter, tmp_path, verb, place):
    """In a pool of its own: the dead process must not be one of the session's. Who is told stays alive, and silent.

    Stages in a row, so that all four ranks are one group wherever some of them agree.
    """
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    job = (str(folder), str(adapter), {"pp": 4}, verb, place, str(out), str(notes))
    with RankPool(4) as pool, pytest.raises(RankError, match="died"):
        pool.run(die_in, *job, timeout_s=90)
    check_told(notes, 3, 4)
    assert not out.exists() or not any(out.iterdir())

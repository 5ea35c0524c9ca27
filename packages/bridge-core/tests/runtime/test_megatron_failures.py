"""A rank that fails or dies inside of megatron-core's own save or load: all end with an error, nothing looks done."""

from __future__ import annotations

import pytest
from runtime.megatron_jobs import fail, load, save

from bridge_core.testing.hf_models import make_model, save_model
from bridge_core.testing.ranks import RankError, RankPool

pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the model is transformers'")

LAYOUT = {"tp": 2, "pp": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """HF folder of a model."""
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("qwen3") / "hf")


@pytest.fixture
def notes(tmp_path):
    """Where ranks note what they were told."""
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def check(texts, words: str) -> None:
    for text in texts:
        seconds, told = text.split("\n", 1)
        assert words in told
        assert float(seconds) < 30


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["save", "load"])
@pytest.mark.parametrize("place", ["start", "moving"])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_on_one_rank_is_raised_on_all(device_ranks, folder, notes, tmp_path, verb, place, rank):
    run = tmp_path / "run"
    if verb == "load":
        device_ranks.run(save, str(folder), LAYOUT, str(run))
    told = device_ranks.run(fail, str(folder), LAYOUT, verb, place, rank, str(run), str(notes), timeout_s=90)
    check(told, "No space left on device")
    if verb == "save":
        assert not list(run.glob("*"))
        assert not list(run.glob(".*"))


def test_a_save_after_a_failed_one_reports_its_own_bytes(device_ranks, folder, notes, tmp_path):
    """What ranks wrote before another one failed is forgotten: megatron-core would take it for the next save's."""
    device_ranks.run(fail, str(folder), LAYOUT, "save", "moving", 2, str(tmp_path / "failed"), str(notes), timeout_s=90)
    other = {"tp": 2, "dp": 2}
    device_ranks.run(save, str(folder), other, str(tmp_path / "run"))
    device_ranks.run(load, str(folder), other, str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["save", "load"])
def test_a_killed_rank_ends_the_others_with_an_error(folder, notes, tmp_path, verb):
    """A pool of its own: the dead process must not be one of the session's."""
    run = tmp_path / "run"
    with RankPool(4) as pool:
        if verb == "load":
            pool.run(save, str(folder), LAYOUT, str(run))
        with pytest.raises(RankError):
            pool.run(fail, str(folder), LAYOUT, verb, "killed", 3, str(run), str(notes), timeout_s=90)
    check([(notes / str(rank)).read_text() for rank in range(3)], "lost")
    assert verb == "load" or not [path for path in run.glob("*") if not path.name.startswith(".")]

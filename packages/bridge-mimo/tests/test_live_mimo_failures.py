"""One rank's failure is everybody's, with its message; what cannot be is refused with the numbers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core.models.mimo.comm", reason="live components need megatron-core 0.17")
pytest.importorskip("transformers", reason="the models are transformers'")

from failure_jobs import (  # noqa: E402
    build_recomputing,
    fail_on_one_rank,
    refuse_a_spoiled_model,
    refuse_other_ranks,
    refuse_to_build,
)
from live_mimo_jobs import settings_stay  # noqa: E402

from bridge_core.testing.hf_layouts import save_published  # noqa: E402
from bridge_core.testing.hf_models import make_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_published(make_model("qwen3_5"), tmp_path_factory.mktemp("models") / "hf")


@pytest.mark.parametrize("failing", [0, 2], ids=["language", "images"])
def test_one_rank_ends_all(rank_pool, folder, tmp_path, failing):
    layouts = {"language": {"tp": 2, "dp": 1}, "images": {"dp": 1}}
    told = rank_pool.run(fail_on_one_rank, str(folder), layouts, str(tmp_path), failing, ranks=range(3))
    for step in ("load", "save", "checkpoint"):
        assert all(f"no memory left on rank {failing}" in one[step] for one in told), [one[step] for one in told]
    assert told[failing]["stream"] == f"no memory left on rank {failing}"
    for rank in {0, 1, 2} - {failing}:
        assert f"rank {failing} failed" in told[rank]["stream"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and ".partial" not in str(path)]


UNBUILDABLE = {
    "vpp": (
        {"language": {"pp": 2, "vpp": 2, "dp": 1}, "images": {"dp": 1}},
        ("no virtual pipeline stages", "language: vpp=2", "plans and offline conversions take it"),
    ),
    "heads": ({"language": {"dp": 1}, "images": {"tp": 3, "dp": 1}}, ("attention heads do not divide", "4 heads")),
    "layers": ({"language": {"dp": 1}, "images": {"pp": 3, "dp": 1}}, ("pp=3", "2")),
    "images cp": (
        {"language": {"dp": 1}, "images": {"cp": 2, "dp": 1}},
        ("cut by heads and layers only", "'context_parallel_size': 2"),
    ),
    "colocated cp": ({"language": {"cp": 2, "dp": 1}, "images": {}}, ("colocated components", "cp=1")),
}


@pytest.mark.parametrize("kind", UNBUILDABLE)
def test_layouts_that_a_model_cannot_be_in(rank_pool, folder, kind):
    layouts, words = UNBUILDABLE[kind]
    ranks = {"vpp": 3, "heads": 4, "layers": 4, "images cp": 3}.get(kind, 2)
    together = kind.startswith("colocated")
    for text in rank_pool.run(refuse_to_build, str(folder), layouts, colocated=together, ranks=range(ranks)):
        assert all(part in text for part in words), text


@pytest.mark.parametrize(
    ("name", "said"), [("qwen3_5", "no error"), ("qwen3_vl", "fed by deepstack cannot recompute whole layers")]
)
def test_whole_layers_are_recomputed_where_nothing_is_added_to_them(rank_pool, name, said):
    config = make_model(name).config.to_dict()
    for text in rank_pool.run(build_recomputing, config, ranks=range(2)):
        assert said in text


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (False, ("expected: 5 ranks", "got:      2 ranks", "start 5 processes")),
        (True, ("other layouts than the provider's", "make_groups()")),
    ],
)
def test_ranks_that_are_not_those_of_the_layouts(rank_pool, folder, built, words):
    for text in rank_pool.run(refuse_other_ranks, str(folder), built=built, ranks=range(2)):
        assert all(part in text for part in words), text


SPOILED = {
    "groups": ("does not know the process groups", "make_groups(layouts)"),
    "component": ("does not have a component that its groups say", "component images"),
    "parameter": ("the plan lacks 1", "language_model.extra"),
    "carried": ("no folder to carry tensors from", "mtp."),
}


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("groups", "load"),
        ("groups", "save"),
        ("groups", "stream"),
        ("groups", "save checkpoint"),
        ("groups", "load checkpoint"),
        ("component", "load"),
        ("parameter", "load"),
        ("carried", "save"),
    ],
)
def test_what_is_wrong_on_one_rank_is_told_on_all(rank_pool, folder, tmp_path, kind, step):
    out = str(tmp_path / "out")
    for text in rank_pool.run(refuse_a_spoiled_model, str(folder), kind, step, out, ranks=range(2), timeout_s=60):
        assert all(words in text for words in SPOILED[kind]), text
    assert step == "load checkpoint" or not list(tmp_path.iterdir())


def test_building_leaves_the_provider_as_it_is(rank_pool, folder):
    """What `MimoModel` has no place for is still there for a plain model."""
    assert rank_pool.run(settings_stay, str(folder), ranks=range(3)) == [(True, False, True)] * 3

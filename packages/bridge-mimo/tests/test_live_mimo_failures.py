"""One rank's failure is everybody's, with its message; what cannot be is refused with the numbers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the models are transformers'")

from live_mimo_jobs import fail_on_one_rank, refuse, settings_stay  # noqa: E402

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


REFUSED = {
    "ranks": ("expected: 5 ranks", "got:      2 ranks"),
    "vpp": ("no virtual pipeline stages", "language: vpp=2"),
    "heads": ("attention heads do not divide", "4 heads"),
    "layers": ("pp=3", "2"),
    "groups": ("does not know the process groups", "make_groups(layouts)"),
    "component": ("does not have a component that its groups say", "component images"),
    "parameter": ("the plan lacks 1", "language_model.extra"),
    "carried": ("no folder to carry tensors from", "mtp."),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_on_all_ranks(rank_pool, folder, kind):
    ranks = {"vpp": 3, "heads": 4, "layers": 4}.get(kind, 2)
    for text in rank_pool.run(refuse, str(folder), kind, ranks=range(ranks)):
        assert all(words in text for words in REFUSED[kind]), text


def test_building_leaves_the_provider_as_it_is(rank_pool, folder):
    """What `MimoModel` has no place for is still there for a plain model."""
    assert rank_pool.run(settings_stay, str(folder), ranks=range(3)) == [(True, False, True)] * 3

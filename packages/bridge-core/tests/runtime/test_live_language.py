"""The language model of a vision-language one, live: its tower is left out by name, and nothing else."""

from __future__ import annotations

import pytest
from runtime.live_jobs import round_trip
from runtime.test_live import TOKENS, check_steps

from bridge_core import ParallelLayout, verify
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

VISUAL = ("model.visual.*",)
CASES = [
    ("qwen3_vl", {"tp": 2}),
    ("qwen3_vl", {"pp": 2}),
    ("qwen3_vl_moe", {"ep": 2, "dp": 2}),
    ("qwen3_vl_moe", {"tp": 2, "ep": 2, "etp": 1}),
]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_a_language_model_is_loaded_run_saved_and_streamed(rank_pool, tmp_path, name, layout):
    model = make_model(name)
    folder = save_published(model, tmp_path / "hf")
    with torch.no_grad():
        logits = model(TOKENS).logits
    ranks = range(ParallelLayout(**layout).world_size)
    out = tmp_path / "out"
    results = rank_pool.run(round_trip, str(folder), layout, "host", str(out), TOKENS, ranks=ranks, ignore=VISUAL)
    assert all(name.startswith("model.visual.") for name in results[0]["loaded"].ignored)
    found = verify(folder, out, names=["model.language_model.*", "lm_head.*"])
    assert found.ok, found
    check_steps(results, folder, logits, layout, ignore=VISUAL)

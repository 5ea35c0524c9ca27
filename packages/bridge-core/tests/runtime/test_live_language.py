"""The language model of a vision-language one, live: its tower is left out by name, and nothing else."""

from __future__ import annotations

import pytest
from runtime.live_jobs import round_trip
from runtime.test_checkpoints_on_ranks import assert_equal_parameters, compare_logits, expected_parameters
from runtime.test_live import TOKENS, check_steps

from bridge_core import AutoBridge, ParallelLayout, import_ckpt, verify
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model
from bridge_core.testing.mcore_jobs import load_and_run

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
def test_a_language_model_is_loaded_run_saved_and_streamed(device_ranks, tmp_path, name, layout):
    model = make_model(name)
    folder = save_published(model, tmp_path / "hf")
    with torch.no_grad():
        logits = model(TOKENS).logits
    ranks = range(ParallelLayout(**layout).world_size)
    out = tmp_path / "out"
    results = device_ranks.run(round_trip, str(folder), layout, "host", str(out), TOKENS, ranks=ranks, ignore=VISUAL)
    assert all(name.startswith("model.visual.") for name in results[0]["loaded"].ignored)
    found = verify(folder, out, names=["model.language_model.*", "lm_head.*"])
    assert found.ok, found
    check_steps(results, folder, logits, layout, ignore=VISUAL)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=str)
def test_mcore_loads_the_language_model_of_an_imported_checkpoint(device_ranks, tmp_path, layout):
    """A checkpoint that holds the tower as well does no harm to mcore's own loading of the rest."""
    name = "qwen3_vl_moe" if "ep" in layout else "qwen3_vl"
    model = make_model(name)
    folder = save_published(model, tmp_path / "hf")
    import_ckpt(folder, tmp_path / "megatron")
    with torch.no_grad():
        logits = model(TOKENS).logits
    bridge = AutoBridge.from_hf_pretrained(folder, ignore=VISUAL)
    wanted = ParallelLayout(**layout)
    checkpoint = str(tmp_path / "megatron" / "iter_0000000")
    ranks = range(wanted.world_size)
    results = device_ranks.run(load_and_run, bridge.fields, layout, checkpoint, TOKENS, spec="host", ranks=ranks)
    hf = open_hf(folder)
    for rank, (params, _, _) in enumerate(results):
        assert_equal_parameters(params, expected_parameters(bridge, hf, wanted, rank), spec="host")
    compare_logits(results, logits, wanted)

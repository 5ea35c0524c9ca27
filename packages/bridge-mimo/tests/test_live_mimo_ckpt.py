"""MIMO checkpoints from live components: equal to an offline import, loaded in other layouts."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core.models.mimo.comm", reason="live components need megatron-core 0.17")
pytest.importorskip("transformers", reason="the oracle is transformers")

from live_mimo_jobs import load_checkpoint, save_checkpoint  # noqa: E402

from bridge_core.checkpoint.dcp import read_dcp  # noqa: E402
from bridge_core.testing.hf_layouts import save_published  # noqa: E402
from bridge_core.testing.hf_models import make_model  # noqa: E402
from bridge_mimo import MegatronMIMOBridge  # noqa: E402
from bridge_mimo.checkpoint.convert import verify  # noqa: E402

STRINGS = [{"pipeline_model_parallel_layout": string} for string in ("Ettt|tL", "Et|ttL")]
CASES = {
    "qwen3_5": ((3, {"language": {"tp": 2, "dp": 1}, "images": {"dp": 1}}), (2, {"images": {"tp": 2}, "language": {}})),
    "qwen3_vl_moe": (
        (4, {"language": {"ep": 2, "dp": 2}, "images": {"tp": 2}}),
        (4, {"language": {"pp": 2, "dp": 1}, "images": {"pp": 2, "num_layers_in_first_pipeline_stage": 2}}),
    ),
    "qwen3_vl cp": (
        (4, {"language": {"cp": 2, "dp": 1}, "images": {"dp": 2}}),
        (4, {"language": STRINGS[0] | {"pp": 2, "dp": 1}, "images": STRINGS[1] | {"pp": 2, "dp": 1}}),
    ),
    "qwen3_vl hf-tower": (
        (3, {"language": {"dp": 1}, "images": {"tp": 2, "dp": 1}}),
        (2, {"language": {"tp": 2}, "images": {}}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_that_of_an_import_and_loads_elsewhere(rank_pool, tmp_path, name):
    (ranks, layouts), (others, elsewhere) = CASES[name]
    folder = save_published(make_model(name.split()[0]), tmp_path / "hf")
    towers = ("images",) if name.endswith("hf-tower") else ()
    job = (save_checkpoint, str(folder), layouts, str(tmp_path / "run"))
    saved = rank_pool.run(*job, hf_towers=towers, ranks=range(ranks))
    assert [report.iteration for report, _ in saved] == [7] * ranks
    compare(folder, tmp_path, towers)

    out = tmp_path / "out"
    together = all("dp" not in sizes for sizes in elsewhere.values())
    job = (load_checkpoint, str(folder), elsewhere, str(tmp_path / "run"), str(out))
    loaded = rank_pool.run(*job, colocated=together, hf_towers=towers, ranks=range(others))
    assert [report.iteration for report, _ in loaded] == [7] * others
    assert not any(reads for _, reads in [*saved, *loaded])
    assert (folder / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def compare(folder, tmp_path, towers):
    """The live checkpoint holds the keys, shapes and bytes of an offline import, and exports without its source."""
    MegatronMIMOBridge.import_ckpt(folder, tmp_path / "imported", hf_towers=towers)
    live, imported = (read_dcp(next((tmp_path / run).glob("iter_*"))) for run in ("run", "imported"))
    shapes = [{key: tensor.shape for key, tensor in dcp.tensors.items()} for dcp in (live, imported)]
    padded = {key for key in shapes[0] if key.endswith(("word_embeddings.weight", "output_layer.weight"))}
    # An import has the norm before experts under the local spec's key as well.
    other_spec = {key for key in shapes[1].keys() - shapes[0].keys() if key.endswith(".linear_fc1.layer_norm_weight")}
    assert shapes[0].keys() == shapes[1].keys() - other_spec
    assert all(shape == shapes[1][key] for key, shape in shapes[0].items() if key not in padded)
    found = verify(tmp_path / "run", tmp_path / "imported")
    assert found.ok, found
    bridge = MegatronMIMOBridge.from_hf_config(MegatronMIMOBridge.from_hf_pretrained(folder).config)
    bridge.export_ckpt(tmp_path / "run", tmp_path / "exported")
    found = verify(folder, tmp_path / "exported")
    assert found.ok, found

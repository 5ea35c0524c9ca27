"""Megatron checkpoints of live models: saved at one layout, loaded at another, exported to the original."""

from __future__ import annotations

import pytest
from runtime.megatron_jobs import load, load_refused, save, save_unequally

from bridge_core import AutoBridge, ParallelLayout

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

CASES = [
    ("llama", {"tp": 2}, {"pp": 2}),
    ("llama-tied", {"pp": 2}, {"tp": 2, "pp": 2}),
    ("qwen3", {"pp": 2, "vpp": 2}, {"dp": 2}),
    ("llama", {"pp": 2, "pipeline_model_parallel_layout": "Ettt|tL"}, {"tp": 2}),
    (
        "qwen3",
        {"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "Et|t|t|tL"},
        {"pp": 2, "pipeline_model_parallel_layout": "E|ttttL"},
    ),
    ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}, {"pp": 2, "ep": 2, "dp": 2}),
]


def ranks(layout):
    return range(ParallelLayout(**layout).world_size)


@pytest.mark.parametrize(("name", "saved_at", "loaded_at"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_save_reshard_and_export(device_ranks, folders, tmp_path, name, saved_at, loaded_at):
    folder, run = folders(name), tmp_path / "run"
    reports = device_ranks.run(save, str(folder), saved_at, str(run), iteration=7, ranks=ranks(saved_at))
    assert {report.folder for report in reports} == {run / "iter_0000007"}
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert not list(run.glob(".*"))
    reports = device_ranks.run(load, str(folder), loaded_at, str(run), ranks=ranks(loaded_at))
    assert {report.iteration for report in reports} == {7}
    AutoBridge.from_hf_pretrained(folder).export_ckpt(run, tmp_path / "hf")
    for file in sorted(folder.glob("*.safetensors*")):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_run_config_is_enough_to_export(device_ranks, folders, tmp_path):
    """Without the HF folder: config.json comes from run_config.yaml."""
    from bridge_core import export_ckpt, verify

    folder, run = folders("llama"), tmp_path / "run"
    device_ranks.run(save, str(folder), {"tp": 2}, str(run), ranks=[0, 1])
    export_ckpt(run, tmp_path / "hf")
    verify(folder, tmp_path / "hf").raise_if_different()
    with pytest.raises(Exception, match="already holds something"):
        device_ranks.run(save, str(folder), {"tp": 2}, str(run), ranks=[0, 1])
    device_ranks.run(save, str(folder), {"tp": 2}, str(run), overwrite=True, ranks=[0, 1])
    for text in device_ranks.run(load_refused, str(folder), {"num_layers": 5}, {"tp": 2}, str(run), ranks=[0, 1]):
        assert "has another shape than the configuration says" in text, text
        assert "where:    decoder.layers.self_attention.linear_qkv.layer_norm_weight" in text, text
        assert "expected: (5, 64)\n  got:      (4, 64)" in text, text
    heads = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16}  # of as many rows
    for text in device_ranks.run(load_refused, str(folder), heads, {"tp": 2}, str(run), ranks=[0, 1]):
        assert "the checkpoint is of a model with other settings" in text, text
        assert "run_config.yaml: num_attention_heads, num_query_groups, kv_channels" in text, text


@pytest.mark.parametrize(
    ("iterations", "words"),
    [
        ([8, 9], ["different iterations", "rank 0 and ranks 1 differ"]),
        ([-1, -1], ["not the number of an iteration", "at least 0", "-1"]),
        (["7", "7"], ["not the number of an iteration", "'7'"]),
    ],
    ids=["different", "negative", "text"],
)
def test_an_iteration_is_one_number_on_all_ranks(device_ranks, folders, tmp_path, iterations, words):
    """Else every rank would write a folder of its own, and the first one's would look finished."""
    results = device_ranks.run(save_unequally, str(folders("llama")), iterations, str(tmp_path / "run"), ranks=[0, 1])
    for text in results:
        assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


def test_linears_that_all_ranks_hold_whole_are_told_which_rank_they_are_on():
    """Transformer Engine's have no group; what they say of themselves is read while the state is made."""
    from types import SimpleNamespace

    from bridge_core.runtime.megatron_state import sharded_chunk

    class Duplicated(torch.nn.Module):
        parallel_mode = _tp_group = None

    class Cut(torch.nn.Module):
        parallel_mode, _tp_group = "column", None

    class Chunk(torch.nn.Module):
        share_embeddings_and_output_weights = False
        config = SimpleNamespace(mtp_num_layers=None)

        def __init__(self):
            super().__init__()
            self.down, self.up, self.norm = Duplicated(), Cut(), torch.nn.Identity()

        def sharded_state_dict(self, prefix, metadata):
            return {"down": self.down._tp_group, "up": self.up._tp_group}

    chunk = Chunk()
    assert sharded_chunk(chunk, SimpleNamespace(tp="tp", dp_cp="dp", pp=None)) == {"down": "tp", "up": None}
    assert chunk.down._tp_group is None

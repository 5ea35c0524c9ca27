"""Live models that are not the checkpoint's: refused on all ranks, by name, before any byte is copied or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime.refusal_jobs import refuse

from bridge_core.testing.hf_models import make_model, save_model

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

EXPERT_PARALLEL = {"ep": 2, "dp": 2}
RUN = {"ranks": [0, 1], "timeout_s": 60}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HF folder of each model, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = save_model(make_model(name), tmp_path_factory.mktemp(name) / "hf")
        return made[name]

    return make


def check(results, words, *, verbs=("load", "save", "stream")) -> None:
    for told, same in results:
        assert same, "bytes were copied"
        for verb in verbs:
            for word in words:
                assert word in told[verb], (verb, told[verb])


@pytest.mark.parametrize("ranks", [[0, 1], [1]], ids=["all", "one"])
def test_a_model_without_memory_is_refused(device_ranks, folders, tmp_path, ranks):
    """Also if that is so on one rank alone. All have the message of the first."""
    out = tmp_path / "out"
    results = device_ranks.run(refuse, str(folders("qwen3")), {}, {"tp": 2}, str(out), meta_on=ranks, **RUN)
    check(results, [f"rank {ranks[0]}: embedding.word_embeddings.weight", "meta device", "to_empty"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "layout", "words"),
    [
        ("qwen3", {"hidden_size": 128}, {"tp": 2}, ["another shape", "word_embeddings", "(66, 64)", "(66, 128)"]),
        ("qwen3_moe", {"hidden_size": 32}, EXPERT_PARALLEL, ["another shape", "word_embeddings", "64)", "32)"]),
        # Of every rank's four experts, two are not there; or four are that nobody knows.
        (
            "qwen3_moe",
            {"num_moe_experts": 4},
            EXPERT_PARALLEL,
            ["model lacks 16", "layers.0.mlp.experts.linear_fc1.weight2", "plan lacks 0: none"],
        ),
        (
            "qwen3_moe",
            {"num_moe_experts": 16},
            EXPERT_PARALLEL,
            ["model lacks 0: none", "plan lacks 32", "layers.0.mlp.experts.linear_fc1.weight4"],
        ),
    ],
    ids=["hidden-size", "hidden-size-of-experts", "fewer-experts", "more-experts"],
)
def test_a_model_of_other_sizes_is_refused(device_ranks, folders, tmp_path, name, changes, layout, words):
    results = device_ranks.run(refuse, str(folders(name)), changes, layout, str(tmp_path / "out"), **RUN)
    check(results, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16},
            ["num_attention_heads=8, num_query_groups=4, kv_channels=8", "num_attention_heads=4"],
        ),
        ({"layernorm_zero_centered_gamma": True}, ["gamma=False", "gamma=True"]),
    ],
    ids=["heads", "norms-around-zero"],
)
def test_a_model_of_equal_shapes_and_other_meaning_is_refused(device_ranks, folders, tmp_path, changes, words):
    """Eight heads of 8 have the rows of four of 16, and a norm around zero the elements of one around one."""
    results = device_ranks.run(refuse, str(folders("llama")), changes, {"tp": 2}, str(tmp_path / "out"), **RUN)
    check(results, ["built with other settings", *words])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "words"),
    [(3, ["experts.3.up_proj.weight"]), (8, ["experts.8.up_proj.weight"])],
    ids=["missing", "unknown"],
)
def test_a_folder_of_other_experts_is_refused(device_ranks, folders, tmp_path, number, words):
    """One expert of one layer lacks a tensor, or is one more than config.json says."""
    from safetensors.torch import load_file, save_file

    source, folder = folders("qwen3_moe"), tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors, at = load_file(Path(source) / "model.safetensors"), "model.layers.2.mlp.experts.{}.up_proj.weight"
    if number == 8:
        tensors[at.format(8)] = tensors[at.format(3)] + 1
    else:
        del tensors[at.format(3)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = str(tmp_path / "out")
    check(device_ranks.run(refuse, str(folder), {}, EXPERT_PARALLEL, out, **RUN), words, verbs=["load"])

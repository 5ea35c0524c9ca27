"""Providers: settings that do not exist, groups of other sizes, and what is read of mcore's global state."""

from __future__ import annotations

import pytest
from runtime.provider_jobs import READ_BY_MCORE, built_without_global_state, on_global_groups, on_groups

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.errors import ConfigError
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model, save_model

pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")


def test_unknown_overrides_are_refused_and_none_is_set():
    provider = AutoBridge.from_hf_config(make_model("qwen3").config).to_megatron_provider(spec="host")
    before = dict(vars(provider)["_settings"])
    given = {"tensor_model_parallel_size": 2, "tensor_parallel": 2, "hidden_dropout": 0.5, "a_setting": 1}
    with pytest.raises(ConfigError, match="a_setting, tensor_parallel") as raised:
        provider.apply_overrides(given)
    assert raised.value.got == "a_setting=1, tensor_parallel=2"
    assert "HybridModel" in str(raised.value.expected)
    assert "megatron-core" in str(raised.value.fix)
    assert vars(provider)["_settings"] == before
    assert provider.tensor_model_parallel_size == 1
    provider.apply_overrides({"tensor_model_parallel_size": 2, "hidden_dropout": 0.5})
    assert provider.finalize().tensor_model_parallel_size == 2


def test_an_activation_function_is_known_by_its_name_or_refused():
    provider = AutoBridge.from_hf_config(make_model("qwen3").config).to_megatron_provider(spec="host")
    provider.activation_func = "gelu_tanh"
    with pytest.raises(ConfigError, match="no activation function") as raised:
        provider.finalize()
    error = raised.value
    assert (error.where, error.expected, error.got) == ("activation_func", "silu or gelu or squared_relu", "gelu_tanh")
    assert "the function itself" in str(error.fix)
    provider.activation_func = str.upper
    assert provider.finalize().activation_func is str.upper


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder for each model, made once by name; with prediction layers where the family has such."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = save_published(make_model(name), tmp_path_factory.mktemp(name) / "hf")
        return str(made[name])

    return make


# Sizes that the provider is set to, the groups it gets, and the words of the refusal; `dp` may be any.
OTHER_GROUPS = {
    "tp": ({"tp": 2}, {"dp": 2}, ["tp, expt_tp", "tp=2 (tensor_model_parallel_size)", "tp=1, etp=1"]),
    "pp": ({}, {"pp": 2}, ["pp=1 (pipeline_model_parallel_size)", "pp=2"]),
    "cp": ({"cp": 2}, {"dp": 2}, ["cp=2 (context_parallel_size)", "cp=1"]),
    "ep": ({"ep": 2}, {"dp": 2}, ["pg_collection, ep", "ep=2 (expert_model_parallel_size)", "ep=1"]),
    "ep-of-groups": ({}, {"dp": 2, "ep": 2}, ["ep=1 (expert_model_parallel_size)", "ep=2"]),
    "etp": ({"tp": 2}, {"tp": 2, "etp": 1}, ["pg_collection, expt_tp", "etp=2 (expert_tensor_parallel_size)", "etp=1"]),
}


@pytest.mark.parametrize("axis", OTHER_GROUPS)
def test_groups_of_other_sizes_are_refused(rank_pool, published, axis):
    sizes, layout, words = OTHER_GROUPS[axis]
    for text in rank_pool.run(on_groups, published("qwen3_moe"), sizes, layout, ranks=[0, 1]):
        assert "process groups differ from the settings" in text
        assert all(word in text for word in [*words, "pg_collection of the sizes set"]), text


def test_a_group_that_is_not_there_is_named(rank_pool, published):
    """mcore would read its global state instead."""
    for text in rank_pool.run(on_groups, published("qwen3_moe"), {}, {"dp": 2}, left_out="cp", ranks=[0, 1]):
        assert "pg_collection, cp" in text
        assert "cp=no group" in text


def test_any_number_of_replicas_is_taken(rank_pool, published):
    layout = {"ep": 2, "dp": 4}
    assert rank_pool.run(on_groups, published("qwen3_moe"), layout, layout, ranks=range(4)) == ["no error"] * 4


BUILDS = [
    ("qwen3", {"tp": 2}, True),
    ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}, True),
    ("qwen3", {"cp": 2}, True),
    ("qwen3", {"pp": 2, "vpp": 2}, False),
    ("llama-tied", {"pp": 2}, False),
    ("qwen3", {"pp": 2, "num_layers_in_first_pipeline_stage": 1}, False),
    ("qwen3", {"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "Et|t|t|tL"}, False),
    ("qwen3_5-text", {"tp": 2}, False),
    ("qwen3_5-text", {"pp": 2}, False),
    ("nemotron_h-latent", {"tp": 2, "ep": 2, "etp": 1}, True),
    ("nemotron_h-latent", {"pp": 2}, False),
    ("nemotron_h-latent", {"pp": 2, "vpp": 2}, False),
]


@pytest.mark.parametrize(("name", "layout", "wrapped"), BUILDS, ids=lambda value: str(value).replace(" ", ""))
def test_a_build_reads_nothing_of_mcores_global_state(rank_pool, published, name, layout, wrapped):
    """GPT and hybrid models; those with prediction layers, which mcore places by its global state, as well."""
    if name in ("qwen3_5-text", "nemotron_h-latent"):
        pytest.importorskip("megatron.core.models.hybrid", reason="megatron-core 0.16 cannot build it")
    results = rank_pool.run(built_without_global_state, published(name), layout, wrapped, ranks=[0, 1])
    predicting = []
    for reads, untouched, names in results:
        assert {read.partition(": ")[2] for read in reads} <= READ_BY_MCORE
        assert {read.partition(": ")[0] for read in reads} <= {"tensor_parallel.layers"}
        assert untouched
        assert names
        predicting.append(any(name.startswith("mtp.") for name in names))
    if name in ("qwen3_5-text", "nemotron_h-latent"):
        assert predicting == [layout.get("pp", 1) == 1, True]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3", {"tp": 2, "pp": 2}),
        ("llama-tied", {"pp": 2, "dp": 2}),
        ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}),
        ("qwen3_moe", {"pp": 2, "ep": 2, "dp": 2}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_model_on_the_groups_of_mcores_global_state(device_ranks, tmp_path, name, layout):
    folder, out = save_model(make_model(name), tmp_path / "hf", max_shard_size="300KB"), tmp_path / "out"
    sizes = ParallelLayout(**layout)
    for result in device_ranks.run(on_global_groups, str(folder), layout, str(out), ranks=range(sizes.world_size)):
        assert result["own"]
        assert result["sizes"] == {axis: getattr(sizes, axis) for axis in ("tp", "pp", "dp", "ep")}
    for file in sorted(folder.glob("*.safetensors*")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_gpu_without_random_states_is_told_what_to_call(monkeypatch):
    """On a machine that says it has a GPU; megatron-core would fail in the middle of a layer."""
    from types import SimpleNamespace
    from typing import Any

    from bridge_core.runtime.provider import _check_seeded

    unseeded = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("megatron.core.tensor_parallel.get_cuda_rng_tracker", lambda: unseeded)
    filling: Any = {"perform_initialization": True, "use_cpu_initialization": False}
    with pytest.raises(ConfigError, match="model_parallel_cuda_manual_seed"):
        _check_seeded(SimpleNamespace(**filling))
    for otherwise in ({"perform_initialization": False}, {"use_cpu_initialization": True}):
        _check_seeded(SimpleNamespace(**filling | otherwise))

"""Providers: settings that do not exist, and models on the groups of mcore's global state."""

from __future__ import annotations

import pytest
from runtime.provider_jobs import on_global_groups

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.errors import ConfigError
from bridge_core.testing.hf_models import make_model, save_model

pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")


def test_unknown_overrides_are_refused_and_none_is_set():
    provider = AutoBridge.from_hf_config(make_model("qwen3").config).to_megatron_provider(spec="host")
    before = dict(vars(provider)["_settings"])
    given = {"tensor_model_parallel_size": 2, "tensor_parallel": 2, "hidden_dropout": 0.5, "a_setting": 1}
    with pytest.raises(ConfigError, match="a_setting, tensor_parallel"):
        provider.apply_overrides(given)
    assert vars(provider)["_settings"] == before
    assert provider.tensor_model_parallel_size == 1
    provider.apply_overrides({"tensor_model_parallel_size": 2, "hidden_dropout": 0.5})
    assert provider.finalize().tensor_model_parallel_size == 2


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

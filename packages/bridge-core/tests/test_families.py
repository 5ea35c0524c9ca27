"""Families against transformers: its configurations are translated both ways, its models hold the planned tensors."""

from __future__ import annotations

import pytest
from hf_folders import write_hf
from simulation import CONFIGS

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt
from bridge_core.errors import ConfigError
from bridge_core.families import all_families, family_for
from bridge_core.testing.hf_models import MODELS, make_model, save_model

torch = pytest.importorskip("torch", reason="the oracle is transformers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

# Published sizes; models are made on the meta device, so that none of them takes memory.
PUBLISHED = {
    "Llama-2-7b": transformers.LlamaConfig(num_hidden_layers=32, rms_norm_eps=1e-5),
    "Llama-3.1-8B": transformers.LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Qwen2.5-7B": transformers.Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Qwen3-0.6B": transformers.Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_planned_tensors_are_those_of_transformers_model(name):
    config = PUBLISHED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")  # shares its memory with the embedding, and is not saved
    plan = AutoBridge.from_hf_config(config).plan(ParallelLayout(tp=2, pp=2))
    assert plan.audit(shapes).hf_tensors == len(shapes)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_holds_the_planned_tensors(tmp_path, name):
    folder = save_model(make_model(name), tmp_path / "hf")
    bridge = AutoBridge.from_hf_pretrained(folder)
    hf = {tensor.name: tensor.shape for tensor in bridge.plan().metadata()}
    assert bridge.plan(ParallelLayout(tp=4)).audit(hf).padding > 0
    assert {tensor.dtype for tensor in bridge.plan().metadata()} == {"F32"}


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_survives_the_way_to_megatron_and_back(name):
    model = make_model(name)
    config = model.config
    config.architectures = [type(model).__name__]
    bridge = AutoBridge.from_hf_config(config)
    rebuilt = bridge.family.to_hf(bridge.fields)
    again = type(config)(**{key: value for key, value in rebuilt.items() if key != "architectures"})
    ours, theirs = again.to_dict(), config.to_dict()
    beside = ("architectures", "dtype", "transformers_version", "_name_or_path", "initializer_range")
    for settings in (ours, theirs):
        if settings.get("head_dim") is None:  # some configurations leave it to be derived
            settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    assert {key: value for key, value in ours.items() if key not in beside} == {
        key: value for key, value in theirs.items() if key not in beside
    }


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"mlp_bias": True}, ["mlp_bias", "False", "True"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["dynamic"]),
        ("qwen2", {"use_sliding_window": True}, ["sliding", "use_sliding_window=True"]),
        ("mixtral", {"sliding_window": 4096}, ["sliding_window", "4096"]),
        ("qwen3", {"brand_new_option": 3}, ["brand_new_option=3", "ignore_options"]),
    ],
)
def test_an_option_that_is_not_translated_is_named(name, changes, words):
    model = make_model(name)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]} | changes
    with pytest.raises(ConfigError) as caught:
        AutoBridge.from_hf_config(config)
    for word in words:
        assert word in str(caught.value)


def test_another_llama3_rope_is_refused_with_the_numbers():
    config = make_model("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    config["rope_parameters"] = config["rope_parameters"] | {"high_freq_factor": 8.0}
    with pytest.raises(ConfigError, match=r"high_freq_factor[\s\S]*4.0[\s\S]*8.0"):
        AutoBridge.from_hf_config(config)


@pytest.mark.parametrize("pattern", ["model.layers.4.*", "mtp.*", "*.mlp.experts.7.*", "*.inv_freq"])
def test_a_pattern_to_leave_out_may_be_a_layer_an_expert_or_no_weight(pattern):
    AutoBridge.from_hf_config(CONFIGS["deepseek_v3"], ignore=[pattern])


def test_a_pattern_that_leaves_out_nothing_is_named(tmp_path):
    """A typing error would leave out nothing."""
    with pytest.raises(ConfigError, match=r"fits no tensor[\s\S]*model.layer.4.\*[\s\S]*got: +no such name") as caught:
        AutoBridge.from_hf_config(CONFIGS["deepseek_v3"], ignore=["model.layers.4.*", "model.layer.4.*"])
    assert "model.layers.4" not in str(caught.value)
    hf = write_hf(tmp_path / "hf", "qwen3")
    with pytest.raises(ConfigError, match="fits no tensor"):
        import_ckpt(hf, tmp_path / "megatron", ignore=["lm_heat.*"])
    import_ckpt(hf, tmp_path / "megatron")
    with pytest.raises(ConfigError, match="fits no tensor"):
        export_ckpt(tmp_path / "megatron", tmp_path / "back", ignore=["lm_heat.*"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_an_unknown_architecture_says_how_to_add_one():
    with pytest.raises(ConfigError, match=r"Gpt9ForCausalLM[\s\S]*write a family[\s\S]*bridge_core.families"):
        family_for({"architectures": ["Gpt9ForCausalLM"]})


def test_every_family_answers_for_its_architectures():
    for family in all_families():
        for architecture in family.architectures:
            assert family_for({"architectures": [architecture]}) is family


def test_a_configuration_that_was_never_saved_is_known_by_its_model_type():
    config = make_model("qwen3").config
    assert config.architectures is None
    assert AutoBridge.from_hf_config(config).family.name == "qwen3"

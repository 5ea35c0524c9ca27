"""Nemotron-H: its configuration, its layouts at full size, and its Mamba mixers cut over tensor-parallel ranks."""

from __future__ import annotations

import json
from math import prod

import pytest
from inventory import PUBLISHED, inventory

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.checkpoint.run_config import RUN_CONFIG, fields_of_args
from bridge_core.errors import ConfigError
from bridge_core.families import recognise
from bridge_core.plan import Plan
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model

torch = pytest.importorskip("torch", reason="the oracle is transformers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

SUPER = PUBLISHED["nemotron-3-super-120b-a12b"]
# As Super, with the proportions of a larger model: 108 layers over 9 stages of 12.
ULTRA = SUPER | {
    "hidden_size": 8192,
    "hybrid_override_pattern": "MEMEMEMEM*E" * 9 + "MEMEMEMEM",
    "num_hidden_layers": 108,
    "intermediate_size": 5120,
    "mamba_num_heads": 256,
    "moe_intermediate_size": 5120,
    "moe_latent_size": 2048,
    "moe_shared_expert_intermediate_size": 10240,
    "num_attention_heads": 64,
    "n_routed_experts": 512,
}


# --- Configuration ----------------------------------------------------------------------------------


def listed(config: dict) -> dict:
    """The configuration as transformers writes it: layers by name, infinity in its own notation."""
    names = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
    rest = {name: value for name, value in config.items() if "hybrid_override_pattern" not in name}
    return rest | {
        "layers_block_type": [names[letter] for letter in config["hybrid_override_pattern"]],
        "mtp_layers_block_type": [names[letter] for letter in config["mtp_hybrid_override_pattern"]],
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }


def test_layers_are_read_in_either_form():
    fields = AutoBridge.from_hf_config(SUPER).fields
    assert fields["hybrid_layer_pattern"] == SUPER["hybrid_override_pattern"] + "/*E"
    assert fields["num_layers"] == 88
    assert AutoBridge.from_hf_config(listed(SUPER)).fields == fields
    older = listed(SUPER)["layers_block_type"]
    older = [{"linear_attention": "mamba", "full_attention": "attention"}.get(kind, kind) for kind in older]
    assert AutoBridge.from_hf_config(listed(SUPER) | {"layers_block_type": older}).fields == fields


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 87}, ["num_hidden_layers", "88", "87"]),
        ({"layers_block_type": ["moe"] * 88}, ["layers_block_type", "EEEE"]),
        ({"layers_block_type": ["rnn"], "hybrid_override_pattern": None}, ["rnn"]),
        ({"hybrid_override_pattern": None}, ["hybrid_override_pattern", "nothing"]),
        ({"hybrid_override_pattern": "MG", "num_hidden_layers": 2}, ["hybrid_override_pattern", "MG"]),
        ({"norm_topk_prob": False}, ["norm_topk_prob", "num_experts_per_tok=22"]),
        ({"n_group": 8, "topk_group": 4}, ["topk_group", "22 // 4"]),
        ({"layer_norm_epsilon": 1e-6, "norm_eps": None}, ["layer_norm_epsilon", "1e-05", "1e-06"]),
        ({"norm_eps": 1e-6}, ["layer_norm_epsilon, norm_eps"]),
        ({"time_step_limit": [0.001, 0.1]}, ["time_step_limit", "0.001"]),
        ({"conv_kernel": 3}, ["conv_kernel", "4", "3"]),
        ({"use_bias": True}, ["use_bias", "False", "True"]),
        ({"mlp_hidden_act": "silu"}, ["mlp_hidden_act", "relu2"]),
        ({"sliding_window": 4096}, ["sliding_window", "4096"]),
        ({"mamba_ngroups_new": 2}, ["mamba_ngroups_new=2"]),
    ],
)
def test_what_megatron_cannot_express_is_an_error(changes, words):
    with pytest.raises(ConfigError) as caught:
        AutoBridge.from_hf_config(SUPER | changes)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_model_without_experts_has_no_fields_of_experts():
    config = SUPER | {"hybrid_override_pattern": "M-M*", "num_hidden_layers": 4, "num_nextn_predict_layers": 0}
    bridge = AutoBridge.from_hf_config(config)
    assert bridge.fields["num_moe_experts"] is None
    assert recognise(bridge.fields) is bridge.family
    assert not [name for name in bridge.family.to_hf(bridge.fields) if "expert" in name and name != "n_shared_experts"]
    assert bridge.plan(ParallelLayout(tp=8)).audit().elements == sum(map(prod, bridge.plan().megatron_tensors.values()))


def test_patterns_of_other_checkpoints_are_one_pattern_without_a_pipeline():
    """Megatron-LM's arguments, old and new, with the stages of the run that saved it."""
    args = {
        "num_attention_heads": 8,
        "hidden_size": 64,
        "norm_epsilon": 1e-5,
        "squared_relu": True,
        "swiglu": False,
        "vocab_size": 131,
        "ffn_hidden_size": 96,
        "untie_embeddings_and_output_weights": True,
        "num_layers": 4,
    }
    new = fields_of_args(args | {"hybrid_layer_pattern": "ME|M*/*E/*E", "mtp_num_layers": 2})
    old = {"hybrid_override_pattern": "MEM*", "mtp_hybrid_override_pattern": "*E", "mtp_num_layers": 2}
    for fields in (new, fields_of_args(args | old)):
        assert fields["hybrid_layer_pattern"] == "MEM*/*E/*E"
        assert fields["activation_func"] == "squared_relu"
        assert recognise(fields).name == "nemotron_h"


# --- Full size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["spelled", "string", "even"])
def test_an_ultra_model_is_planned_at_pp9_ep8(pattern):
    """512 experts over 8 ranks, 108 layers over 9 stages, whichever way they are named."""
    shapes = {key: shape for key, (shape, _) in inventory(ULTRA).items()}
    text = "E" + "|".join(["t" * 12] * 9) + "mL" if pattern == "string" else None
    layout = ParallelLayout(pp=9, ep=8, pipeline_model_parallel_layout=text)
    bridge = AutoBridge.from_hf_config(ULTRA)
    fields = dict(bridge.fields)
    if pattern == "spelled":
        letters = ULTRA["hybrid_override_pattern"]
        fields["hybrid_layer_pattern"] = "|".join(letters[n : n + 12] for n in range(0, 108, 12)) + "/*E"
    plan = Plan(bridge.family, fields, layout)
    found = plan.audit(shapes)
    assert found.hf_tensors == len(shapes)
    assert found.elements == sum(map(prod, shapes.values()))
    stages = [plan.placement.stage(pp) for pp in range(9)]
    assert [stage.decoder_layers for stage in stages] == [tuple(range(n, n + 12)) for n in range(0, 108, 12)]
    assert [stage.has_final_norm for stage in stages] == [False] * 8 + [True]
    last = {shard.name for shard in plan.local_shards(layout.world_size - 1)}
    assert "mtp.layers.0.mtp_model_layer.layers.1.mlp.experts.linear_fc1.weight511" in last
    assert "embedding.word_embeddings.weight" in last
    layers = 1 + ULTRA["hybrid_override_pattern"][96:].count("E")
    assert sum(".mlp.experts.linear_fc1." in name for name in last) == 512 // 8 * layers


def test_prediction_layers_can_be_left_out_by_name():
    bridge = AutoBridge.from_hf_config(SUPER, ignore=["mtp.*"])
    assert bridge.fields["hybrid_layer_pattern"] == bridge.fields["hybrid_layer_pattern"].partition("/")[0]
    plan = bridge.plan(ParallelLayout(tp=2, pp=2))
    shapes = {key: shape for key, (shape, _) in inventory(SUPER).items()}
    found = plan.audit(shapes)
    assert found.elements == 120_668_707_840
    assert not any(name.startswith("mtp.") for name in plan.megatron_tensors)


# --- On disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
@pytest.mark.parametrize("name", ["nemotron_h", "nemotron_h-latent"])
def test_a_real_model_comes_back_to_the_bit_under_either_prefix(tmp_path, name, prefix):
    from safetensors.torch import load_file, save_file

    folder = save_published(make_model(name), tmp_path / "hf")
    weights = folder / "model.safetensors"
    save_file({key.replace("backbone.", prefix): value for key, value in load_file(weights).items()}, weights)
    import_ckpt(folder, tmp_path / "megatron")
    for out, options in (("like", {"source": folder}), ("alone", {})):
        export_ckpt(tmp_path / "megatron", tmp_path / out, **options)
        ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / out, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    said = json.loads((tmp_path / "megatron/iter_0000000" / RUN_CONFIG).read_text())["model"]
    assert said["hybrid_layer_pattern"] == "MEM*-EM*/*E"
    assert said["_target_"].endswith("HybridModelProvider")
    assert said["activation_func"]["_target_"] == "megatron.core.activations.squared_relu"


# --- The mixer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_mixers_of_tensor_parallel_ranks_sum_to_that_of_transformers(tmp_path, tp):
    """Each rank computes with the tensors that the plan gives it, by the definition of Mamba-2."""
    from mamba_reference import mixer, rms_norm
    from runtime.test_checkpoints_on_ranks import expected_parameters

    model = make_model("nemotron_h")
    folder = save_published(model, tmp_path / "hf", mtp=False)
    bridge, hf, layout = AutoBridge.from_hf_pretrained(folder), open_hf(folder), ParallelLayout(tp=tp)
    ranks = [expected_parameters(bridge, hf, layout, rank) for rank in range(tp)]
    hidden = torch.randn(21, 64, generator=torch.Generator().manual_seed(3))  # no multiple of the chunk size, 8
    for layer in (0, 2, 6):
        block = model.model.layers[layer]
        with torch.no_grad():
            expected = block.mixer(block.norm(hidden[None]))[0]
        got = torch.zeros_like(expected)
        for found in ranks:
            own = {
                name.removeprefix(f"decoder.layers.{layer}.mixer."): torch.from_numpy(value)
                for (_, name), value in found.items()
            }
            projected = rms_norm(hidden, own["in_proj.layer_norm_weight"]) @ own["in_proj.weight"].T
            names = ("conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight")
            got += mixer(projected, *(own[name] for name in names), head_dim=16, state=12) @ own["out_proj.weight"].T
        assert expected.abs().max() > 1e-3
        assert (got - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())

"""The DeepSeek-V3 family: configurations both ways, what is refused, and plans of the published model."""

from __future__ import annotations

from collections import Counter

import pytest
from inventory import PUBLISHED
from simulation import CONFIGS, distinct, load_rank, make_plan

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.errors import ConfigError, CoverageError
from bridge_core.families import family_for

V3 = PUBLISHED["deepseek-v3"]
SMALL = CONFIGS["deepseek_v3"]
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}

# 61 layers and the prediction layer on 16 stages.
LAYOUT = ParallelLayout(
    tp=8, pp=16, ep=64, etp=1, dp=8, pipeline_model_parallel_layout="|".join(["Et*3", *["t*4"] * 14, "t*2mL"])
)


def fields_of(config):
    return family_for(config).to_megatron(config)


def test_megatron_is_told_what_it_would_assume_otherwise():
    """Defaults of MLATransformerConfig are DeepSeek-V3's own: a model without yarn must say so."""
    fields = fields_of(V3)
    assert fields["rope_type"] == "yarn"
    assert (fields["rotary_scaling_factor"], fields["mscale"], fields["mscale_all_dim"]) == (40, 1.0, 1.0)
    assert fields["moe_layer_freq"] == [0] * 3 + [1] * 58
    assert fields["moe_shared_expert_intermediate_size"] == 2048
    assert fields["mtp_num_layers"] == 1
    fields = fields_of(PUBLISHED["moonlight-16b-a3b"])
    assert (fields["rope_type"], fields["rotary_scaling_factor"], fields["mscale_all_dim"]) == ("rope", 1.0, 1.0)
    assert fields["q_lora_rank"] is None
    assert fields["mtp_num_layers"] is None


@pytest.mark.parametrize("name", ["deepseek-v3", "moonlight-16b-a3b"])
def test_a_published_configuration_keeps_every_option(name):
    config = PUBLISHED[name]
    family = family_for(config)
    rebuilt = family.to_hf(family.to_megatron(config))
    beside = {"auto_map", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "quantization_config"}
    translated = {key for key in config if key in rebuilt and key not in beside}
    assert translated > {"n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "q_lora_rank"}
    assert {key: rebuilt[key] for key in translated} == {key: config[key] for key in translated}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (YARN, (1.0, 0.0, 32, 1)),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16}, (0.7, 0.9, 16, 1)),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 0}, (1.0, 0, 32, 1)),
    ],
)
def test_yarn_goes_both_ways(scaling, expected):
    config = SMALL | {"rope_scaling": scaling}
    fields = fields_of(config)
    assert tuple(fields[name] for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")) == expected
    family = family_for(config)
    assert family.to_megatron(family.to_hf(fields)) == fields
    new = {"rope_type": "yarn", "rope_theta": SMALL["rope_theta"], **{k: v for k, v in scaling.items() if k != "type"}}
    assert (
        fields_of({key: value for key, value in SMALL.items() if key != "rope_theta"} | {"rope_parameters": new})
        == fields
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", "factor=2.0"]),
        ({"rope_scaling": YARN | {"attention_factor": 0.5}}, ["attention_factor=0.5"]),
        ({"rope_scaling": YARN | {"truncate": False}}, ["truncate=False"]),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, ["mscale=0.7"]),
        ({"rope_scaling": YARN | {"rope_type": "default"}}, ["default", "yarn"]),
        ({"rope_interleave": False}, ["rope_interleave", "False"]),
        ({"scoring_func": "softmax"}, ["scoring_func", "softmax"]),
        ({"topk_method": "greedy"}, ["topk_method", "greedy"]),
        ({"norm_topk_prob": False}, ["norm_topk_prob"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads=8", "num_key_value_heads=4"]),
        ({"n_group": 4, "topk_group": 2}, ["other groups", "topk_group=2"]),
        ({"index_topk": 2048}, ["index_topk=2048"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq"]),
    ],
)
def test_an_option_that_is_not_translated_is_named(changes, words):
    with pytest.raises(ConfigError) as caught:
        fields_of(SMALL | changes)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_missing_rank_of_queries_is_no_default():
    with pytest.raises(ConfigError, match="q_lora_rank"):
        fields_of({key: value for key, value in SMALL.items() if key != "q_lora_rank"})


def test_rotary_buffers_are_left_out_and_named():
    plan = make_plan(SMALL, ParallelLayout())
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    assert plan.audit(plan.hf_tensors | {name: (4,)}).ignored == (name,)


def test_the_prediction_layer_is_on_the_last_stage_with_an_embedding():
    plan = make_plan(SMALL, ParallelLayout(pp=2))
    hf = distinct(plan)
    last = load_rank(plan, 1, hf)
    embedding = hf["model.embed_tokens.weight"].reshape(plan.hf_tensors["model.embed_tokens.weight"])
    assert (last[0, "embedding.word_embeddings.weight"] == embedding).all()
    prediction = [name for _, name in last if name.startswith("mtp.layers.0.")]
    assert "mtp.layers.0.transformer_layer.mlp.router.expert_bias" in prediction
    assert not any(name.startswith("mtp.") for _, name in load_rank(plan, 0, hf))
    bias = plan.entry("mtp.layers.0.transformer_layer.mlp.router.expert_bias")
    assert bias.dtype == "F32"


# --- The published model ----------------------------------------------------------------------------


def test_the_published_model_is_planned_with_its_scales():
    """How long it takes is measured by the benchmark of planning."""
    plan = AutoBridge.from_hf_config(V3).plan(LAYOUT)
    metadata = plan.metadata()
    assert len(metadata) == 91_991
    counts = Counter(meta.dtype for meta in metadata)
    assert counts["F8_E4M3"] == counts["F32"] - 59  # as many scales, and an expert bias in every layer with experts
    found = plan.audit({meta.name: meta.shape for meta in metadata})
    assert (found.hf_tensors, found.elements) == (91_991, 684_531_386_000)


def test_the_experts_of_the_published_model_are_on_1024_ranks_once():
    """TP8 x DP8 are 64 ranks of a stage, and 64 parts of its experts: none of them has a replica."""
    assert LAYOUT.world_size == 1024
    plan = AutoBridge.from_hf_config(V3).plan(LAYOUT)
    holders = Counter()
    for rank in range(LAYOUT.world_size):
        holders.update(shard.name for shard in plan.iter_local_shards(rank) if ".experts." in shard.name)
    weights = [name for name in plan.hf_tensors if ".mlp.experts." in name]
    assert len(weights) == 3 * 256 * 59
    assert set(holders.values()) == {1}
    assert len(holders) == 2 * 256 * 59


def test_scales_that_are_missing_from_an_inventory_are_named():
    plan = AutoBridge.from_hf_config(V3).plan(ParallelLayout(tp=8))
    inventory = {meta.name: meta.shape for meta in plan.metadata()}
    name = "model.layers.60.mlp.experts.255.down_proj.weight_scale_inv"
    del inventory[name]
    with pytest.raises(CoverageError, match=rf"missing 1: {name}"):
        plan.audit(inventory)

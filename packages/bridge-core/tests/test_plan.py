"""Plans over simulated grids, and what they say of themselves."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import CONFIGS, distinct, layouts, load_rank, load_shard, make_plan, save_shard

from bridge_core.errors import ConfigError, CoverageError, LayoutError
from bridge_core.plan import subsets
from bridge_core.topology import ParallelLayout


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25)
@given(data=st.data())
def test_round_trip_over_any_layout_is_exact(name, data):
    """HF -> all ranks -> HF gives every element back; no rank leaves or overwrites any."""
    round_trip(CONFIGS[name], data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=200)
@given(data=st.data())
def test_round_trip_over_two_hundred_layouts(name, data):
    """The same, longer."""
    round_trip(CONFIGS[name], data)


def round_trip(config, data):
    layout = data.draw(layouts(config))
    divisible = data.draw(st.sampled_from([1, 5, 16]))
    plan = make_plan(config, layout, make_vocab_size_divisible_by=divisible)
    plan.audit(plan.hf_tensors)
    hf = distinct(plan)
    back = {tensor: np.full(array.shape, -1) for tensor, array in hf.items()}
    # Replicas are equal shards: the same copies, which give the same values.
    for shard in dict.fromkeys(shard for rank in range(layout.world_size) for shard in plan.local_shards(rank)):
        save_shard(shard, load_shard(shard, hf), back)
    for tensor, array in hf.items():
        assert np.array_equal(array, back[tensor]), tensor


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15)
@given(data=st.data())
def test_costs_count_what_ranks_hold(name, data):
    layout = data.draw(layouts(CONFIGS[name]))
    plan = make_plan(CONFIGS[name], layout)
    for cost in plan.costs():
        shards = plan.local_shards(cost.rank)
        assert cost.tensors == len(shards)
        sizes = [4 if plan.entry(shard.entry).dtype == "F32" else 2 for shard in shards]
        nbytes = sum(size * prod(shard.shape) for size, shard in zip(sizes, shards, strict=True))
        assert cost.nbytes == nbytes == sum(cost.parts.values())


def test_qkv_is_what_reshaping_by_hand_gives():
    """The layout of linear_qkv, written out once with reshapes: per group Q queries, one key, one value."""
    config = CONFIGS["qwen3"]
    plan = make_plan(config, ParallelLayout(tp=2))
    hf = distinct(plan)
    G, Q, H, D = 4, 2, 3, 12
    layer = "model.layers.1.self_attn."
    q = hf[layer + "q_proj.weight"].reshape(G, Q * H, D)
    k = hf[layer + "k_proj.weight"].reshape(G, H, D)
    v = hf[layer + "v_proj.weight"].reshape(G, H, D)
    fused = np.concatenate([q, k, v], axis=1)
    for rank in range(2):
        local = load_rank(plan, rank, hf)[0, "decoder.layers.1.self_attention.linear_qkv.weight"]
        assert np.array_equal(local, fused[2 * rank : 2 * rank + 2].reshape(-1, D))


def test_gated_fc1_keeps_gate_and_up_on_every_rank():
    plan = make_plan(CONFIGS["llama"], ParallelLayout(tp=4))
    hf = distinct(plan)
    gate = hf["model.layers.0.mlp.gate_proj.weight"].reshape(24, 12)
    up = hf["model.layers.0.mlp.up_proj.weight"].reshape(24, 12)
    for rank in range(4):
        local = load_rank(plan, rank, hf)[0, "decoder.layers.0.mlp.linear_fc1.weight"]
        rows = slice(6 * rank, 6 * rank + 6)
        assert np.array_equal(local, np.concatenate([gate[rows], up[rows]]))


def test_tied_embeddings_are_copied_to_the_last_stage():
    plan = make_plan(CONFIGS["llama-tied"], ParallelLayout(pp=2))
    hf = distinct(plan)
    assert "lm_head.weight" not in hf
    first, last = load_rank(plan, 0, hf), load_rank(plan, 1, hf)
    embedding = first[0, "embedding.word_embeddings.weight"]
    assert np.array_equal(last[0, "output_layer.weight"], embedding)
    single = load_rank(make_plan(CONFIGS["llama-tied"], ParallelLayout()), 0, hf)
    assert (0, "output_layer.weight") not in single


def test_metadata_says_all_that_a_receiver_needs():
    plan = make_plan(CONFIGS["qwen3_moe"], ParallelLayout(tp=2, ep=4))
    metadata = plan.metadata()
    assert [m.name for m in metadata] == list(dict.fromkeys(m.name for m in metadata))
    assert {m.name: m.shape for m in metadata} == plan.hf_tensors
    assert all(m.nbytes == 2 * prod(m.shape) and m.dtype == "BF16" for m in metadata)
    groups = Counter(m.group for m in metadata)
    assert groups["decoder.layers.0.self_attention.linear_qkv.weight"] == 3
    assert groups["decoder.layers.3.mlp.experts.linear_fc1.weight7"] == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_a_stream_keep_order_bytes_and_groups(name):
    metadata = make_plan(CONFIGS[name], ParallelLayout()).metadata()
    sizes = {group: sum(m.nbytes for m in metadata if m.group == group) for group in {m.group for m in metadata}}
    for most in (1, max(sizes.values()) - 1, max(sizes.values()) + 100, sum(sizes.values())):
        parts = subsets(metadata, most)
        assert [m for part in parts for m in part] == metadata
        inside = [{m.group for m in part} for part in parts]
        assert sum(map(len, inside)) == len(sizes), "a group is in two parts"
        assert all(
            sum(m.nbytes for m in part) <= most or len(groups) == 1 for part, groups in zip(parts, inside, strict=True)
        )
    assert len(subsets(metadata, sum(sizes.values()))) == 1


@pytest.mark.parametrize("nbytes", [0, -1, "1GB", 1.5])
def test_a_part_has_a_positive_number_of_bytes(nbytes):
    with pytest.raises(ConfigError, match="no positive whole number"):
        subsets([], nbytes)


def test_json_is_plain_data_and_gives_a_ranks_pieces():
    plan = make_plan(CONFIGS["qwen3_moe"], ParallelLayout(tp=2, pp=2, ep=2))
    whole = json.loads(plan.to_json())
    assert whole["family"] == "qwen3_moe"
    assert len(whole["ranks"]) == 8
    shards = json.loads(plan.to_json(rank=3))["shards"]
    assert [shard["param"] for shard in shards] == [shard.param for shard in plan.local_shards(3)]
    copied = 2 * sum(prod(p["shape"]) for s in shards for p in s["pieces"])
    assert copied == plan.cost(3).nbytes - 2 * 12 * _pad(plan, 3)


def _pad(plan, rank) -> int:
    return sum(box.shape[0] for shard in plan.local_shards(rank) for box in shard.pad)


def test_audit_counts_every_element():
    plan = make_plan(CONFIGS["llama"], ParallelLayout(tp=2))
    found = plan.audit()
    assert found.elements == sum(map(prod, plan.hf_tensors.values()))
    assert found.padding == 2 * 12 * (38 - 37)
    assert found.hf_tensors == 4 * 9 + 3
    assert found.megatron_tensors == 4 * 6 + 3


def test_audit_names_what_is_missing_and_what_is_unexpected():
    plan = make_plan(CONFIGS["llama"], ParallelLayout())
    inventory = dict(plan.hf_tensors)
    del inventory["model.layers.2.mlp.up_proj.weight"]
    inventory["model.layers.4.mlp.up_proj.weight"] = (24, 12)
    with pytest.raises(CoverageError) as caught:
        plan.audit(inventory)
    text = str(caught.value)
    assert "missing 1: model.layers.2.mlp.up_proj.weight" in text
    assert "unexpected 1: model.layers.4.mlp.up_proj.weight" in text
    assert "fix:" in text


def test_audit_names_a_wrong_shape():
    plan = make_plan(CONFIGS["llama"], ParallelLayout())
    inventory = dict(plan.hf_tensors) | {"model.layers.0.self_attn.k_proj.weight": (24, 12)}
    with pytest.raises(CoverageError, match=r"another shape[\s\S]*k_proj[\s\S]*\(12, 12\)[\s\S]*\(24, 12\)"):
        plan.audit(inventory)


def test_ignored_tensors_are_reported_not_dropped_in_silence():
    plan = make_plan(CONFIGS["llama"], ParallelLayout())
    name = "model.layers.3.self_attn.rotary_emb.inv_freq"
    assert plan.audit(dict(plan.hf_tensors) | {name: (2,)}).ignored == (name,)


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        ("llama", {"tp": 3}, ["attention heads", "multiple of tp=3", "8 heads"]),
        ("llama", {"tp": 16}, ["attention heads", "tp=16"]),
        ("llama", {"pp": 3}, ["4", "pp=3"]),
        ("llama", {"ep": 2}, ["no experts", "ep=2"]),
        ("qwen3_moe", {"ep": 3, "etp": 1}, ["8", "ep=3"]),
        ("qwen3_moe", {"tp": 1, "etp": 3}, ["linear_fc1", "multiple of 3", "8 % 3 = 2"]),
    ],
)
def test_a_layout_that_does_not_divide_says_the_numbers(config, layout, words):
    with pytest.raises(LayoutError) as caught:
        make_plan(CONFIGS[config], ParallelLayout(**layout)).audit()
    for word in words:
        assert re.search(re.escape(word), str(caught.value)), (word, str(caught.value))


def test_more_tensor_parallel_ranks_than_query_groups():
    """tp = 8 over 4 groups: megatron-core keeps rows evenly cut, in the middle of a group."""
    plan = make_plan(CONFIGS["qwen3"], ParallelLayout(tp=8))
    shard = next(s for s in plan.local_shards(1) if s.param.endswith("linear_qkv.weight"))
    assert shard.shape == (4 * (2 + 2) * 3 // 8, 12)

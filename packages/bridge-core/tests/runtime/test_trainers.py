"""Live ranks in a trainer: weights that change, move and arrive late, and ranks that do not do the same."""

from __future__ import annotations

import pytest
from runtime.trainer_jobs import (
    devices_that_differ,
    late_parameters,
    odd_memory,
    plans_of_exports,
    replaced_otherwise,
    replaced_tensors,
    unequal_streams,
    words_beside_nccl,
)

from bridge_core import export_ckpt, verify
from bridge_core.errors import ConfigError
from bridge_core.runtime.words import default_group

pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the models are transformers'")


def test_a_kept_stream_sends_what_the_model_has_now(rank_pool, folders):
    (found,) = rank_pool.run(replaced_tensors, str(folders("deepseek_v3")), ranks=[0])
    assert found["new bias"] == [pytest.approx(value + 1) for value in found["bias"]]
    assert found["new norm"] == [value * 2 for value in found["norm"]]


def test_a_kept_stream_refuses_what_no_longer_fits(rank_pool, folders):
    (told,) = rank_pool.run(replaced_otherwise, str(folders("qwen3")), ranks=[0])
    words = {"longer": "another shape", "turned": "another shape", "gaps": "no plain memory", "wider": "another dtype"}
    for kind, word in words.items():
        assert word in told[kind], told[kind]
        assert "rank 0: decoder.layers.1.mlp.linear_fc2.weight" in told[kind], told[kind]
    assert "expected: F32\n  got:      F64" in told["wider"], told["wider"]


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2, "dp": 2}])
def test_parameters_that_ddp_gathers_late_are_gathered_first(device_ranks, folders, tmp_path, layout):
    folder = folders("qwen3")
    ranks = range(layout.get("tp", 1) * layout["dp"])
    device_ranks.run(late_parameters, str(folder), layout, str(tmp_path), ranks=ranks)
    verify(folder, tmp_path / "hf").raise_if_different()
    export_ckpt(tmp_path / "megatron", tmp_path / "exported", source=folder)
    verify(folder, tmp_path / "exported").raise_if_different()


@pytest.mark.parametrize(("kind", "word"), [("gaps", "strides (1, 64)"), ("coded", "a Coded")])
def test_a_parameter_that_is_no_plain_memory_is_refused(rank_pool, folders, kind, word):
    (text,) = rank_pool.run(odd_memory, str(folders("qwen3")), kind, ranks=[0])
    assert "no plain memory" in text
    assert "decoder.layers.1.mlp.linear_fc2.weight" in text
    assert word in text


def test_ranks_that_would_stream_different_buckets_are_told(device_ranks, folders):
    for text in device_ranks.run(unequal_streams, str(folders("qwen3")), {"tp": 2}, ranks=[0, 1]):
        assert "in different buckets" in text
        assert "rank 0 and ranks 1 differ" in text


def test_a_second_export_plans_nothing(device_ranks, folders):
    for first, second, other in device_ranks.run(plans_of_exports, str(folders("qwen3")), {"tp": 2}, ranks=[0, 1]):
        assert first == {"__init__", "compile_entries", "_cut", "iter_local_shards", "shards_of", "TensorMeta"}
        assert second == set()
        assert "__init__" in other


def test_words_go_beside_a_default_group_that_is_nccl_alone(rank_pool):
    for said, facts in rank_pool.run(words_beside_nccl, ranks=[0, 1]):
        assert said == [0, 1]
        assert all(facts)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["cpu", "cpu"], ["cpu"]),
        (["cpu", ""], ["cpu"]),  # a rank without parameters
        (["cpu", "cuda"], ["on a CPU and on GPUs", "move the whole model"]),
    ],
)
def test_ranks_agree_on_a_device(rank_pool, folders, kinds, words):
    for text in rank_pool.run(devices_that_differ, str(folders("qwen3")), {"tp": 2}, kinds, ranks=[0, 1]):
        assert all(word in text for word in words), text


def test_a_live_model_without_a_process_group_is_told_to_make_one():
    with pytest.raises(ConfigError, match="init_process_group"):
        default_group()

"""Streams of live weights: subsets in whole groups, bounded collectives, one plan for many passes, hooks that fail."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest
from runtime.stream_jobs import arrivals, export, fail, leave, refused, train_and_stream_again

from bridge_core import ParallelLayout
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model, save_model

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

from fp8_folders import as_read, load, quantise, write_fp8  # noqa: E402 - after the skips

EXPERTS = {"tp": 2, "ep": 2, "etp": 1}
# Patterns, and the tensors that travel with those that they name: one Megatron tensor is made of them.
SUBSETS = [
    (
        "qwen3",
        {"tp": 2, "pp": 2},
        ["*.layers.1.self_attn.q_proj.weight", "*.layers.[23].mlp.up_proj.weight", "lm_head.*"],
        ["*.layers.1.self_attn.[qkv]_proj.weight", "*.layers.[23].mlp.[gu]*_proj.weight", "lm_head.weight"],
    ),
    (
        "qwen2",
        {"tp": 2},
        ["*.layers.0.self_attn.k_proj.bias"],
        ["*.layers.0.self_attn.[qkv]_proj.bias"],
    ),
    (
        "qwen3_moe",
        EXPERTS,
        ["*.experts.5.gate_proj.weight", "*.layers.2.mlp.gate.weight", "model.norm.weight"],
        ["*.experts.5.[gu]*_proj.weight", "*.layers.2.mlp.gate.weight", "model.norm.weight"],
    ),
    (
        "qwen3_moe",
        {"pp": 2},
        ["decoder.layers.[01].mlp.experts.linear_fc2.weight?", "*.layers.3.self_attention.linear_qkv.weight"],
        ["*.layers.[01].mlp.experts.*.down_proj.weight", "*.layers.3.self_attn.[qkv]_proj.weight"],
    ),
]


class Source(NamedTuple):
    """A model as transformers saved it."""

    folder: str
    tensors: dict


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Each model once."""
    from safetensors.torch import load_file

    made = {}

    def make(name, **changes):
        if (name, *changes.items()) not in made:
            folder = save_model(make_model(name, **changes), tmp_path_factory.mktemp(name) / "hf")
            made[name, *changes.items()] = Source(str(folder), load_file(folder / "model.safetensors"))
        return made[name, *changes.items()]

    return make


def equal(got, expected) -> bool:
    """The same names, and the same bits of each."""
    return got.keys() == expected.keys() and all(
        torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)) for name, tensor in got.items()
    )


@pytest.mark.parametrize(("name", "layout", "asked", "whole"), SUBSETS, ids=["dense", "biases", "experts", "groups"])
def test_the_groups_of_the_names_asked_for_arrive_whole_and_alone(device_ranks, sources, name, layout, asked, whole):
    source = sources(name)
    expected = {n: t for n, t in source.tensors.items() if any(fnmatchcase(n, pattern) for pattern in whole)}
    named = {n for n in source.tensors if any(fnmatchcase(n, pattern) for pattern in asked)}
    assert named < expected.keys() < source.tensors.keys()  # no name, where groups are asked for
    ranks = range(ParallelLayout(**layout).world_size)
    for result in device_ranks.run(export, source.folder, layout, asked, 20_000, ranks=ranks):
        assert {meta.name for meta in result["metadata"]} == expected.keys()
        wanted = [meta.name for meta in result["planned"] if meta.name in expected]
        assert [meta.name for meta in result["metadata"]] == wanted == list(result["stream"])
        assert equal(result["stream"], expected)
        assert equal(result["exported"], expected)


@pytest.mark.parametrize(
    ("name", "layout", "bucket"),
    [("qwen3", {"tp": 2}, 30_000), ("qwen2", {"pp": 2}, 1), ("qwen3_moe", EXPERTS, 20_000)],
)
def test_no_group_is_split_over_buckets(device_ranks, sources, name, layout, bucket):
    source = sources(name)
    for result in device_ranks.run(export, source.folder, layout, ["*"], bucket, ranks=[0, 1]):
        assert equal(result["stream"], source.tensors)
        metas, bucket_of = result["metadata"], result["bucket"]
        assert split_one_by_one(metas, bucket), "the buckets are too large for this test: nothing would be split"
        assert None not in bucket_of.values(), "a tensor is no part of what a collective was given"
        buckets_of = {}
        for meta in metas:
            buckets_of.setdefault(meta.group, set()).add(bucket_of[meta.name])
        assert all(len(buckets) == 1 for buckets in buckets_of.values())
        check_sizes(result["sizes"], metas, bucket_of, bucket)


def split_one_by_one(metas, bucket_bytes) -> list[str]:
    """The groups that would be split if a bucket took tensor after tensor until it is full."""
    found, at, number = {}, 0, 0
    for meta in metas:
        if at and at + meta.nbytes > bucket_bytes:
            at, number = 0, number + 1
        found.setdefault(meta.group, set()).add(number)
        at += meta.nbytes
    return [group for group, numbers in found.items() if len(numbers) > 1]


def check_sizes(sizes, metas, bucket_of, bucket_bytes) -> None:
    """A bucket has at most its bytes, and a few that align its tensors; or one group alone."""
    for number, size in enumerate(sizes):
        inside = [meta for meta in metas if bucket_of[meta.name] == number]
        assert sum(meta.nbytes for meta in inside) <= size <= sum(meta.nbytes + 16 for meta in inside)
        assert size <= bucket_bytes or len({meta.group for meta in inside}) == 1


@pytest.mark.parametrize("bucket", [1, 50_000])
@pytest.mark.parametrize("layout", [{"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=str)
def test_a_stack_of_experts_arrives_whole_from_all_ranks(device_ranks, tmp_path, layout, bucket):
    """An HF tensor is made of the experts of two ranks, four each, and is larger than a bucket."""
    from safetensors.torch import load_file

    folder = save_published(make_model("qwen3_vl_moe"), tmp_path / "hf")
    source = load_file(folder / "model.safetensors")
    expected = {name: tensor for name, tensor in source.items() if not name.startswith("model.visual.")}
    stacks = {name for name in expected if ".experts." in name}
    assert stacks
    for name in stacks:
        assert expected[name].shape[0] == 8
        assert expected[name].nbytes > bucket
    told = device_ranks.run(arrivals, str(folder), layout, bucket, ignore=["model.visual.*"], ranks=[0, 1])
    for metas, found in told:
        check_arrivals(metas, found, expected)


@pytest.mark.parametrize("bucket", [1, 20_000])
@pytest.mark.parametrize(("name", "layout"), [("qwen3", {"tp": 2}), ("qwen3_moe", EXPERTS)])
def test_codes_and_their_scales_arrive_together(device_ranks, tmp_path, name, layout, bucket):
    """A bucket of one byte takes a group and no more: codes and scales would be apart if they were two."""
    folder = write_fp8(tmp_path / "fp8", name)
    stored, expected = load(folder), {}
    for key, tensor in as_read(stored).items():
        expected[key] = tensor
        if key + "_scale_inv" in stored:
            expected[key], expected[key + "_scale_inv"] = quantise(tensor)
    for metas, found in device_ranks.run(arrivals, str(folder), layout, bucket, fp8=True, ranks=[0, 1]):
        check_arrivals(metas, found, expected)
        groups = {meta.name: meta.group for meta in metas}
        buckets = {key: number for key, _, number in found}
        order = [key for key, *_ in found]
        scales = [key for key in order if key.endswith("_scale_inv")]
        assert scales
        for key in scales:
            weight = key.removesuffix("_scale_inv")
            assert groups[key] == groups[weight]
            assert buckets[key] == buckets[weight]
            assert order.index(key) == order.index(weight) + 1


def check_arrivals(metas, found, expected) -> None:
    """The bytes expected, under the names and in the order that were told; all of a group from one bucket."""
    assert [meta.name for meta in metas] == [name for name, *_ in found]
    assert {meta.name for meta in metas} == expected.keys()
    buckets = {}
    for meta, (name, data, bucket) in zip(metas, found, strict=True):
        assert torch.equal(data.view(-1), expected[name].contiguous().view(torch.uint8).view(-1)), name
        buckets.setdefault(meta.group, set()).add(bucket)
    assert all(len(numbers) == 1 for numbers in buckets.values())
    assert len(set().union(*buckets.values())) > 1, "one bucket holds everything: nothing could be split"


def test_collectives_are_bounded_by_buckets_also_of_many_tensors(device_ranks, sources):
    """By torch.distributed's account. Two for a bucket and a few for a pass, whatever the number of tensors."""
    few, many = sources("qwen3_moe"), sources("qwen3_moe", num_experts=64, moe_intermediate_size=8)
    assert len(many.tensors) > 5 * len(few.tensors)
    making = set()
    for source, bucket in [(few, 1 << 20), (many, 1 << 20), (many, 1 << 30)]:
        total = sum(tensor.nbytes for tensor in source.tensors.values())
        for result in device_ranks.run(export, source.folder, EXPERTS, ["*"], bucket, ranks=[0, 1]):
            assert equal(result["stream"], source.tensors)
            buckets = len(result["sizes"])
            # Any two buckets that follow one another have more than a bucket's bytes, alignment included.
            assert 0 < buckets <= 2 * (total + 16 * len(source.tensors)) / bucket + 1
            assert 2 * buckets < len(result["running"]) <= 2 * buckets + 3
            making.add(tuple(result["making"]))
    assert len(making) == 1, "making a stream takes collectives that depend on the model"
    assert len(making.pop()) < 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": "model.norm.weight"}, ["several patterns", "['model.norm.weight']"]),
        ({"names": ["model.norm.weight", "model.nrom.*"]}, ["got", "model.nrom.*", "stream.metadata()"]),
        ({"names": []}, ["no tensor of the model"]),
        ({"bucket_bytes": "1GB"}, ["bucket_bytes is no positive whole number", "'1GB'"]),
    ],
)
def test_a_stream_that_cannot_be_is_refused_on_all_ranks(device_ranks, sources, options, words):
    for text in device_ranks.run(refused, sources("qwen3").folder, {"tp": 2}, options, ranks=[0, 1]):
        assert all(word in text for word in words), text


@pytest.mark.parametrize(("name", "layout"), [("qwen3_moe", EXPERTS), ("llama-tied", {"pp": 2})])
def test_a_kept_stream_plans_nothing_and_has_the_weights_of_now(device_ranks, sources, name, layout):
    source = sources(name)
    halved = {name: tensor * 0.5 for name, tensor in source.tensors.items()}
    for result in device_ranks.run(train_and_stream_again, source.folder, layout, ranks=[0, 1]):
        assert "__init__" in result["made"]
        assert result["passes"] == []
        assert equal(result["before"], source.tensors)
        assert equal(result["after"], halved)


HOOKS = [("for", 3), ("for", -1), ("with", 3), ("with", -1), ("source", 3), ("before", 0)]


@pytest.mark.parametrize(("way", "at"), HOOKS)
def test_a_hook_that_fails_on_one_rank_is_heard_by_all(device_ranks, sources, way, at):
    """Nobody hangs, and the ranks are in step afterwards: the next export is whole. In a `with`, all learn why."""
    source = sources("qwen3")
    told = device_ranks.run(leave, source.folder, {"tp": 2, "pp": 2}, way, at, ranks=range(4), timeout_s=60)
    for rank, (text, seen, count, again) in enumerate(told):
        assert count == len(source.tensors)
        assert sorted(again) == sorted(source.tensors)
        if rank == 1:
            assert "HookError: no place for" in text
            assert seen == at % count + 1
        else:
            said = "it left the stream" if way == "for" else "HookError: no place for"
            assert f"rank 1 failed: {said}" in text
            assert seen < count or at < 0


@pytest.mark.parametrize(
    ("way", "own"),
    [
        ("memory", "MemoryError: no memory left on this rank"),
        ("value", "CheckpointError: values do not fit into torch.float16"),
    ],
)
def test_a_rank_that_cannot_fill_a_bucket_says_why_to_all(device_ranks, sources, way, own):
    source = sources("qwen3")
    told = device_ranks.run(fail, source.folder, {"tp": 2, "pp": 2}, way, ranks=range(4), timeout_s=60)
    for rank, (text, seen, again) in enumerate(told):
        assert equal(again, source.tensors)
        assert len(seen) < len(source.tensors)
        if rank == 1:
            assert text.startswith(own)
        else:
            assert text.startswith("WorkerError: rank 1 failed: ")
            assert own.partition(": ")[2] in text
        assert way == "memory" or re.search(r"where: +(model\.|lm_head\.)", text), text

"""Options of loading, saving and streaming: what each does, and which are refused, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from runtime.option_value_jobs import (
    contradict,
    count,
    in_other_groups,
    load_in_threads,
    mixed_dtypes,
    on_a_group_of_gpus,
    pipeline_before_tensor_parallel,
    save,
    save_with_own_option,
    stream_in,
)

from bridge_core.errors import CheckpointError
from bridge_core.runtime.tensors import cast

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

TP2 = {"tp": 2}
RUN = {"ranks": [0, 1], "timeout_s": 60}


class Source(NamedTuple):
    """A model as transformers saved it: its folder, and its tensors."""

    path: str
    tensors: dict


@pytest.fixture(scope="module")
def sources(folders):
    def make(name):
        return Source(str(folders(name)), tensors_of(folders(name)))

    return make


def tensors_of(folder) -> dict:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(got, expected) -> bool:
    """The same names, and of each the same dtype and bits."""
    return got.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(bits(tensor), bits(expected[name]))
        for name, tensor in got.items()
    )


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- Loading -------------------------------------------------------------------------------------------


def test_threads_share_the_parameters_of_a_rank(device_ranks, sources):
    """Three read at the same time; one is the caller's own; there may be more than parameters."""
    meeting = {1: 1, 3: 3, 500: 1}
    for found in device_ranks.run(load_in_threads, sources("qwen3").path, TP2, meeting, **RUN):
        (read,) = {report.bytes_read for report, *_ in found.values()}
        assert read > 0
        for threads, (report, calls, readers, own) in found.items():
            assert calls == report.parameters
            assert own == (threads == 1)
            assert readers <= threads
        assert found[3][2] == 3


def test_one_reader_and_fp8_files_say_what_they_lack(device_ranks, sources, tmp_path):
    out = tmp_path / "out"
    for fp8, node in device_ranks.run(contradict, sources("qwen3").path, TP2, str(out), **RUN):
        assert all(word in fp8 for word in ["fp8, one_writer_per_file", "one of them", "both", "offline"]), fp8
        assert all(word in node for word in ["one reader per node", "node_group", "None"]), node
    assert not list(tmp_path.iterdir())


# --- Saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("load", {"threads": 0}),
        ("load", {"bucket_bytes": 0}),
        ("save", {"max_shard_size": 0}),
        ("save", {"bucket_bytes": "1GB"}),
    ],
)
def test_counts_are_whole_and_positive(device_ranks, folders, tmp_path, verb, options):
    (name,) = options
    for text in device_ranks.run(count, str(folders("qwen3")), TP2, verb, str(tmp_path / "out"), options, **RUN):
        assert f"{name} is no positive whole number" in text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_or_replaced(device_ranks, sources, tmp_path):
    source, out = sources("qwen3"), tmp_path / "out"
    out.mkdir()
    (out / "model-00009-of-00009.safetensors").write_bytes(b"of an older model")
    before = snapshot(out)
    for text in device_ranks.run(save, source.path, TP2, str(out), **RUN):
        assert all(word in text for word in ["already holds something", str(out), "model-00009", "overwrite=True"]), (
            text
        )
    assert snapshot(out) == before
    device_ranks.run(save, source.path, TP2, str(out), overwrite=True, **RUN)
    assert {name: data for name, data in snapshot(out).items() if "safetensors" in name} == {
        name: data for name, data in snapshot(Path(source.path)).items() if "safetensors" in name
    }
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "remains of the folder that was replaced"


@pytest.mark.parametrize("one_writer", [False, True])
def test_a_durable_save_is_on_the_disk_before_it_has_its_name(device_ranks, sources, tmp_path, one_writer):
    """By the calls that ranks make: what is in the folder is synced, it is renamed, its parent is synced."""
    source, out = sources("qwen3"), tmp_path / "out"
    options = {"durable": True, "one_writer_per_file": one_writer}
    first, other = device_ranks.run(save, source.path, TP2, str(out), **options, **RUN)
    renamed = first.index(("renamed", "out"))
    synced = {name for note, name in first[:renamed] + other if note == "synced"}
    assert synced >= {file.name for file in out.iterdir()}
    assert ("synced", tmp_path.name) in first[renamed:]
    assert not [note for note, _ in other if note == "renamed"]


def test_a_save_does_not_wait_for_the_disk_unasked(device_ranks, sources, tmp_path):
    for notes in device_ranks.run(save, sources("qwen3").path, TP2, str(tmp_path / "out"), **RUN):
        assert not [name for note, name in notes if note == "synced"]


@pytest.mark.parametrize(
    ("name", "layout", "one_writer"), [("qwen3", TP2, False), ("qwen3_moe", {"ep": 2, "dp": 2}, True)]
)
def test_without_a_source_files_have_at_most_their_size(device_ranks, sources, tmp_path, name, layout, one_writer):
    """A bridge of a configuration alone saves what transformers loads: files, index and config.json."""
    source, out, most = sources(name), tmp_path / "out", 50_000
    options = {"by_config": True, "max_shard_size": most, "one_writer_per_file": one_writer}
    device_ranks.run(save, source.path, layout, str(out), **options, **RUN)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    assert len(files) > total // most
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file in files:
        held = tensors_of_file(out / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= most or len(held) == 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file in files for name in tensors_of_file(out / file)}
    assert index["metadata"]["total_size"] == total
    assert equal(tensors_of(out), source.tensors)
    assert equal(as_transformers_loads(out), as_transformers_loads(Path(source.path)))


def tensors_of_file(file) -> dict:
    from safetensors.torch import load_file

    return load_file(file)


def as_transformers_loads(folder) -> dict:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("dtype", "one_writer", "by_config"),
    [("bfloat16", False, False), ("float16", True, False), ("bfloat16", True, True)],
)
def test_files_in_another_dtype_have_torchs_values(device_ranks, sources, tmp_path, dtype, one_writer, by_config):
    source, out = sources("qwen3"), tmp_path / "out"
    options = {"dtype": dtype, "one_writer_per_file": one_writer, "by_config": by_config}
    device_ranks.run(save, source.path, TP2, str(out), **options, **RUN)
    assert equal(tensors_of(out), {name: t.to(getattr(torch, dtype)) for name, t in source.tensors.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    ("option", "values", "others"),
    [
        ("max_shard_size", (50_000, 50_000, 60_000, 50_000), {}),
        ("one_writer_per_file", (True, True, False, True), {}),
        ("bucket_bytes", (50_000, 50_000, 60_000, 50_000), {"one_writer_per_file": True}),
    ],
)
def test_ranks_of_other_options_are_refused(device_ranks, sources, tmp_path, option, values, others):
    job = (save_with_own_option, sources("qwen3").path, {"tp": 2, "pp": 2}, str(tmp_path / "out"), option, values)
    for text in device_ranks.run(*job, **others, ranks=range(4), timeout_s=60):
        words = ["lay out the files differently", "rank 0 and ranks 2 differ", "same options everywhere"]
        assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


def test_parameters_of_several_dtypes_are_not_cast_unasked(device_ranks, sources, tmp_path):
    """One norm on one rank differs: all are told what each holds. Asked for, it is cast, and the rest is as it was."""
    source, out = sources("qwen3"), tmp_path / "out"
    for told, asked in device_ranks.run(mixed_dtypes, source.path, {"pp": 2}, str(out), **RUN):
        for text in told:
            words = ["the parameters differ in dtype", "rank 0: F32; rank 1: BF16, F32", "dtype=..."]
            assert all(word in text for word in words), text
        rounded = {"model.norm.weight": source.tensors["model.norm.weight"].bfloat16().float()}
        assert equal(asked, source.tensors | rounded)
    assert not list(tmp_path.iterdir())


# --- Streaming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [("qwen3", {"pp": 2}), ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1})])
@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_a_stream_in_another_dtype_has_torchs_values(device_ranks, sources, name, layout, dtype, stored):
    source = sources(name)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in source.tensors.items()}
    for metadata, streamed, exported in device_ranks.run(stream_in, source.path, layout, dtype, **RUN):
        assert equal(streamed, expected)
        assert equal(exported, expected)
        assert [meta.name for meta in metadata] == list(streamed)
        assert {(meta.name, meta.dtype, meta.nbytes) for meta in metadata} == {
            (name, stored, tensor.nbytes) for name, tensor in expected.items()
        }


def test_a_value_beyond_a_dtype_is_refused_by_the_name_of_its_tensor():
    values = torch.tensor([1.0, 7e4, float("inf")])
    with pytest.raises(CheckpointError, match=r"torch\.float16[\s\S]*lm_head\.weight[\s\S]*1 larger[\s\S]*70000"):
        cast(values, "F16", where="lm_head.weight")
    assert torch.equal(cast(values, "BF16", where="lm_head.weight"), values.bfloat16())


# --- Groups --------------------------------------------------------------------------------------------


def test_expert_groups_of_another_order_are_refused(device_ranks, sources, tmp_path):
    """Neighbours hold the same experts, where mcore's usual order gives them others. All ranks hear of the first."""
    source = sources("qwen3_moe").path
    layout, swapped = {"ep": 2, "dp": 4}, ("ep", "expt_dp")
    for told in device_ranks.run(
        in_other_groups, source, layout, swapped, str(tmp_path / "out"), ranks=range(4), timeout_s=60
    ):
        assert len(told) == 3
        for text in told:
            words = ["ordered otherwise", "rank 1 of", "etp, ep = (0, 1)", "(0, 0)", "tp-cp-ep-dp-pp"]
            assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


def test_ranks_of_another_order_cannot_own_files_and_save_as_usual(device_ranks, sources, tmp_path):
    source = sources("qwen3")
    told = device_ranks.run(pipeline_before_tensor_parallel, source.path, str(tmp_path), ranks=range(4), timeout_s=60)
    for text in told:
        words = ["numbered otherwise", "rank 2 of 4", "rank 1 of 4", "without one_writer_per_file"]
        assert all(word in text for word in words), text
    assert [folder.name for folder in tmp_path.iterdir()] == ["shared"]
    assert equal(tensors_of(tmp_path / "shared"), source.tensors)


def test_a_group_that_does_not_reach_the_parameters_is_refused(rank_pool, sources, tmp_path):
    """Only said, where there is no GPU: a group of GPUs alone cannot be made there."""
    for text in rank_pool.run(on_a_group_of_gpus, sources("qwen3").path, str(tmp_path / "out"), **RUN):
        words = ["cannot exchange parameters that are on a CPU", "cuda:nccl", "a backend for cpu", "cpu:gloo,cuda:nccl"]
        assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())

"""Options of loading: one reader per node, and a head that is not the checkpoint's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runtime.load_jobs import changed_head, in_different_ways, no_model, one_reader, witnessed

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

from fp8_folders import write_fp8  # noqa: E402 - after the skips

HEAD = ("output_layer.weight", "output_layer.bias")


def nbytes(folder):
    from safetensors.torch import load_file

    return sum(t.numel() * t.element_size() for file in folder.glob("*.safetensors") for t in load_file(file).values())


@pytest.mark.parametrize(("name", "layout"), [("qwen3", {"tp": 2, "pp": 2}), ("qwen3_moe", {"ep": 2, "dp": 2})])
def test_one_rank_of_a_node_reads_for_all(device_ranks, folders, name, layout):
    folder = folders(name)
    ranks = range(4 if "pp" in layout else 2)
    reports = device_ranks.run(one_reader, str(folder), layout, 2, ranks=ranks)
    for rank, report in enumerate(reports):
        assert (report.bytes_read > 0) == (rank % 2 == 0)
        assert 1 < report.broadcasts <= nbytes(folder) // 30_000 + 2
        assert report.broadcasts == reports[rank // 2 * 2].broadcasts
    # Each node reads what its stages need, once: here every tensor is needed by one node only.
    assert sum(report.bytes_read for report in reports) == nbytes(folder)


def test_a_reader_that_fails_is_heard_by_all(device_ranks, folders):
    told = device_ranks.run(one_reader, str(folders("qwen3")), {"tp": 2}, 2, broken=True, ranks=[0, 1], timeout_s=60)
    assert all("no memory left" in text for text in told)


@pytest.mark.parametrize(("name", "layout"), [("qwen3", {"tp": 2}), ("qwen3", {"pp": 2}), ("llama-tied", {"pp": 2})])
def test_a_changed_head_is_left_alone_and_reported(device_ranks, folders, name, layout):
    folder = str(folders(name))
    for report in device_ranks.run(changed_head, folder, layout, HEAD, ranks=[0, 1]):
        assert report.left == ("output_layer.bias", "output_layer.weight")
    # Without the exception, and with one that is no parameter, nothing is loaded.
    refused = device_ranks.run(changed_head, folder, layout, (), ranks=[0, 1])
    assert all("output_layer" in text for text in refused)
    refused = device_ranks.run(changed_head, folder, layout, (*HEAD, "value_head.weight"), ranks=[0, 1])
    assert all("value_head.weight" in text for text in refused)


@pytest.mark.parametrize(
    "other",
    [
        {"one_reader_per_node": True, "node_group": "all"},
        {"allowed_mismatched": ["output_layer.weight"]},
    ],
    ids=["one-reader", "changed-head"],
)
def test_ranks_that_would_load_in_different_ways_are_told(device_ranks, folders, other):
    told = device_ranks.run(
        in_different_ways, str(folders("qwen3")), {"tp": 2}, [{}, other], ranks=[0, 1], timeout_s=60
    )
    for text, untouched in told:
        assert "about to load in different ways" in text
        assert "rank 0 and ranks 1 differ" in text
        assert untouched


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32], ids=str)
def test_weights_that_are_integers_are_refused(device_ranks, folders, tmp_path, dtype):
    """As codes would be whose scales nobody mentions: config.json says nothing of them."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "codes"
    shutil.copytree(folders("qwen3"), folder)
    name = "model.layers.1.mlp.up_proj.weight"
    (file,) = [file for file in folder.glob("*.safetensors") if name in load_file(file)]
    save_file({n: t.to(dtype) if n == name else t for n, t in load_file(file).items()}, file, {"format": "pt"})
    for text, untouched in device_ranks.run(in_different_ways, str(folder), {"tp": 2}, [{}, {}], ranks=[0, 1]):
        assert "weights are stored as codes" in text
        assert name in text
        assert f"got:      {'I8' if dtype is torch.int8 else 'I32'}" in text
        assert untouched


def test_what_is_no_model_is_refused_in_words(device_ranks, folders):
    (told,) = device_ranks.run(no_model, str(folders("qwen3")), ranks=[0])
    assert all("this is no model of megatron-core" in text for text in told)
    assert [text.partition("got:")[2].split("\n")[0].strip() for text in told] == 3 * [
        "NoneType", "an empty list", "str, str, str, str", "Linear",
    ]  # fmt: skip


WIDE = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose weights outweigh its headers, plain and in fp8 blocks of the usual size."""
    folder = tmp_path_factory.mktemp("wide")
    return {"fp8": write_fp8(folder / "fp8", "qwen3", block=(128, 128), **WIDE), "plain": folder / "plain"}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts a process's reads")
@pytest.mark.parametrize("stored", ["plain", "fp8"])
@pytest.mark.parametrize(("layout", "one_reader"), [({"tp": 2}, False), ({"tp": 2, "pp": 2}, False), ({"tp": 2}, True)])
def test_the_kernel_counts_what_the_report_says(device_ranks, wide, stored, layout, one_reader):
    """Row-parallel weights included: each rank reads its columns, the scales of their blocks, and nothing else."""
    folder = wide[stored]
    ranks = range(4 if "pp" in layout else 2)
    found = device_ranks.run(witnessed, str(folder), layout, one_reader, ranks=ranks)
    for rank, result in enumerate(found):
        if one_reader:
            assert result["read"] == (0 if rank else nbytes(folder))
        else:
            assert result["owned"] <= result["read"] <= 1.05 * result["owned"]
        # The kernel's count has headers, config.json and gloo's messages besides; with a broadcast, all of the weights.
        if not (one_reader and rank):
            assert result["read"] <= result["counted"] <= 1.02 * result["read"] + 64 * 1024

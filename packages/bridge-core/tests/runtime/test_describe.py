"""Description of live ranks: what they say they hold, put together, is the checkpoint, to the bit."""

from __future__ import annotations

from math import prod

import pytest
from runtime.describe_jobs import describe

from bridge_core import ParallelLayout
from bridge_core.testing.hf_models import make_model, save_model

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

CASES = [
    ("qwen3", {"tp": 2, "pp": 2}),
    ("llama-tied", {"pp": 2}),
    ("qwen2", {"tp": 4}),
    ("qwen3_moe", {"ep": 2, "dp": 2}),
    ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """HF folder and tensors of each model, made once."""
    from safetensors.torch import load_file

    made = {}

    def make(name):
        if name not in made:
            folder = save_model(make_model(name), tmp_path_factory.mktemp(name) / "hf", max_shard_size="300KB")
            tensors = {}
            for file in folder.glob("*.safetensors"):
                tensors |= load_file(file)
            made[name] = folder, tensors
        return made[name]

    return make


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_what_ranks_hold_is_the_checkpoint(device_ranks, source, name, layout):
    folder, expected = source(name)
    results = device_ranks.run(describe, str(folder), layout, ranks=range(ParallelLayout(**layout).world_size))
    compare_shards(results, expected)
    compare_entries(results, expected)
    for result in results:
        assert [tuple(meta) for meta in result["metadata"]] == [
            (name, dtype, shape) for name, dtype, shape in result["streamed"]
        ]
        assert {meta.name for meta in result["metadata"]} == set(expected)
        assert result["metadata"] == results[0]["metadata"]


def compare_shards(results, expected) -> None:
    """The first copies cover every element once; every copy, first or not, has the checkpoint's bits."""
    covered = {name: torch.zeros(tensor.numel(), dtype=torch.int32) for name, tensor in expected.items()}
    for result in results:
        for name, shape, dtype, box, piece, tensor, replica in result["shards"]:
            assert shape == tuple(expected[name].shape)
            assert dtype == "F32"
            view = piece.source
            wanted = expected[name].view(-1).as_strided(piece.shape, view.strides, view.offset)
            assert torch.equal(tensor.view(-1), wanted.reshape(-1)), name
            if box is not None:
                assert torch.equal(tensor.reshape(box.shape), expected[name][window_of(box)]), name
            if replica == 0:
                covered[name].as_strided(piece.shape, view.strides, view.offset).add_(1)
    for name, count in covered.items():
        assert (count == 1).all(), name


def compare_entries(results, expected) -> None:
    """Meshes agree between ranks, boxes are the checkpoint's, and even cuts add up to the whole."""
    placed = {}
    for rank, result in enumerate(results):
        for key, shape, mesh, placements, box, replica, fallback, local in result["entries"]:
            assert fallback == (placements is None)
            if box is None:
                assert local is None
                continue
            assert local.is_contiguous()
            assert torch.equal(local, expected[key][window_of(box)]), key
            if not mesh:
                continue
            assert placed.setdefault(key, (mesh, placements)) == (mesh, placements)
            column = mesh[replica].index(rank)
            if placements is not None and placements[1] is not None:
                dim, parts = placements[1], len(mesh[0])
                assert box.shape[dim] * parts == shape[dim]
                assert box.start[dim] == column * box.shape[dim]
    whole = [key for key, (_, placements) in placed.items() if placements is not None]
    assert len(whole) > len(expected) / 2
    assert {prod(s) for _, s, *_ in results[0]["entries"]} <= {t.numel() for t in expected.values()}


def window_of(box):
    return tuple(slice(start, start + size) for start, size in zip(*box, strict=True))

"""Loads: who reads what in which order, what is not in a file, and a file that one rank alone does not have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runtime.helpers import stored
from runtime.load_jobs import lose_a_file, padded_rows, read_in_threads

from bridge_core import ParallelLayout

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the model is transformers'")


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("when", ["before", "after the headers were read"])
def test_a_file_that_one_rank_misses_is_named_on_all(device_ranks, folders, tmp_path, layout, when):
    """Rank 1 has a folder of its own, as on a node with a local disk. Before the headers, nothing has been copied."""
    folder, own = folders("qwen3"), tmp_path / "own"
    shutil.copytree(folder, own)
    lost = sorted(own.glob("*.safetensors"))[1].name
    if when == "before":
        (own / lost).unlink()
    paths, later = [str(folder), str(own)], None if when == "before" else lost
    told = device_ranks.run(lose_a_file, paths, layout, later, ranks=[0, 1], timeout_s=60)
    for rank, (text, copied, loaded) in enumerate(told):
        assert str(own / lost) in text
        assert ("WorkerError: rank 1 failed" in text) == (rank == 0)
        assert when != "before" or not copied
        assert loaded


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux says which file a descriptor is of")
@pytest.mark.parametrize(("name", "layout"), [("qwen3", {"tp": 2}), ("qwen3_moe", {"ep": 2}), ("qwen3_moe", {"tp": 2})])
def test_threads_read_the_same_each_once_through_its_part(device_ranks, folders, name, layout):
    """In the order of the files, but that a fused weight is read whole: what lies between its parts comes after it."""
    folder = folders(name)
    tensors = stored(folder)

    def at(file, offset):
        (found,) = [
            n for n, (where, first, nbytes, _) in tensors.items() if where == file and 0 <= offset - first < nbytes
        ]
        return found

    alone, three = (device_ranks.run(read_in_threads, str(folder), layout, count, ranks=[0, 1]) for count in (1, 3))
    for (report, filled, asked), (other, also_filled, also_asked) in zip(alone, three, strict=True):
        assert (len(asked), len(also_asked)) == (1, 3)
        reads = sorted(read for reads in asked for read in reads)
        assert reads == sorted(read for reads in also_asked for read in reads)
        assert report.bytes_read == other.bytes_read == sum(nbytes for *_, nbytes in reads)
        assert filled.keys() == also_filled.keys()
        assert all(torch.equal(filled[key], also_filled[key]) for key in filled)
        for reads in (*asked, *also_asked):
            ends = [(file, offset + nbytes) for file, offset, nbytes in reads]
            back = {
                at(file, offset)
                for (file, offset, _), end in zip(reads[1:], ends, strict=False)
                if (file, offset) < end
            }
            assert all(name.endswith("self_attn.o_proj.weight") for name in back)


@pytest.mark.parametrize("one_reader", [False, True], ids=["each reads", "one reads"])
def test_rows_that_pad_the_vocabulary_become_zero(device_ranks, folders, one_reader):
    from safetensors.torch import load_file

    folder, layout = folders("qwen3"), {"tp": 2}
    source = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ranks = range(ParallelLayout(**layout).world_size)
    parts = zip(*device_ranks.run(padded_rows, str(folder), layout, one_reader, ranks=ranks), strict=True)
    for name, found in zip(("model.embed_tokens.weight", "lm_head.weight"), parts, strict=True):
        rows, whole = len(source[name]), torch.cat(found)
        assert len(whole) > rows
        assert torch.equal(whole[:rows], source[name])
        assert not whole[rows:].any()

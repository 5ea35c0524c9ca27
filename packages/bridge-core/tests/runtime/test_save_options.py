"""Saving with one writer per file: the default save's bytes, by one rank each, in bounded exchanges."""

from __future__ import annotations

from math import prod

import pytest
from runtime.save_jobs import die, disagree, fail, save_again, save_both_ways

from bridge_core import ParallelLayout
from bridge_core.geometry import slabs
from bridge_core.runtime.file_owners import owners_of
from bridge_core.testing.hf_models import make_model, save_model
from bridge_core.testing.ranks import RankError, RankPool

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

SIZE = "150KB"  # more files than ranks
CASES = [
    ("qwen3", {"tp": 2, "pp": 2}, 40_000),
    ("qwen2", {"tp": 4}, 8_000),
    ("llama-tied", {"dp": 2}, 400),  # for each of two owners less than a row
    ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}, 1 << 30),
    ("mixtral", {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, 40_000),
]


@pytest.mark.parametrize(("name", "layout", "bucket"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_each_file_is_written_by_one_rank_and_is_the_same(device_ranks, folders, tmp_path, name, layout, bucket):
    ranks = range(ParallelLayout(**layout).world_size)
    results = device_ranks.run(save_both_ways, str(folders(name, SIZE)), layout, str(tmp_path), bucket, ranks=ranks)
    shared, owned = tmp_path / "shared", tmp_path / "owned"
    names = sorted(file.name for file in shared.iterdir())
    assert sorted(file.name for file in owned.iterdir()) == names
    for file in names:
        assert (owned / file).read_bytes() == (shared / file).read_bytes(), file
    check_opened(results, [file for file in names if file.endswith(".safetensors")])
    check_opened_once(results, [file for file in names if not file.endswith(".safetensors")])
    total = sum(result["shared"][0].bytes_written for result in results)
    check_exchanges(results, total, bucket)


@pytest.mark.slow
def test_an_owner_may_have_neither_embedding_nor_output_layer(eight_device_ranks, tmp_path):
    """It knows how the vocabulary is cut and padded nevertheless: here rank 4 of 8, on the third of four stages."""
    folder = save_model(make_model("qwen3"), tmp_path / "hf")
    layout = {"tp": 2, "pp": 4}
    results = eight_device_ranks.run(save_both_ways, str(folder), layout, str(tmp_path), 40_000)
    assert [bool(result["owned"][1]) for result in results] == [rank == 4 for rank in range(8)]
    name = "model.safetensors"
    assert (tmp_path / "owned" / name).read_bytes() == (folder / name).read_bytes()


def test_ranks_have_to_agree_on_how_the_vocabulary_is_padded(rank_pool, folders, tmp_path):
    """Stage 2 of 4 has neither table, and was told another number of rows; files of one writer depend on it."""
    out = tmp_path / "out"
    for text in rank_pool.run(disagree, str(folders("qwen3", SIZE)), {"pp": 4}, str(out), 2, ranks=range(4)):
        assert "padded differently" in text
        assert "rank 1: 144, rank 2: 160" in text
    assert not out.exists()


def check_opened(results, weights) -> None:
    """One rank per file, by the interpreter's account and by the reports; many by default."""
    for way, count in (("owned", 1), ("shared", 2)):
        for result in results:
            report, opened, *_ = result[way]
            assert set(report.files) == opened
        openers = [sum(name in result[way][1] for result in results) for name in weights]
        assert max(openers) >= count
        assert way == "shared" or openers == [1] * len(weights)
    owners = [result["owned"][1] for result in results]
    assert all(owners), "a rank has no file although there are more files than ranks"


def check_opened_once(results, others) -> None:
    """Index, configuration and what is carried along: exactly one rank opens them for writing, the same for all."""
    assert {"config.json", "model.safetensors.index.json", "generation_config.json"} <= set(others)
    for way in ("owned", "shared"):
        openers = {name: [rank for rank, result in enumerate(results) if name in result[way][3]] for name in others}
        assert all(len(ranks) == 1 for ranks in openers.values()), openers
        assert len({ranks[0] for ranks in openers.values()}) == 1, openers


def check_exchanges(results, total, bucket) -> None:
    """Every byte is written once, sent at most once, in exchanges of bounded size, whose number is bounded."""
    reports = [result["owned"][0] for result in results]
    assert sum(report.bytes_written for report in reports) == total
    assert 0 < sum(report.bytes_sent for report in reports) < total
    (rounds,) = {report.exchanges for report in reports}
    # A word for each message, and up to 7 bytes of padding for each of a few pieces.
    most = bucket + 8 * len(results) + 1024
    for result in results:
        sizes = result["owned"][2]
        assert len(sizes) == rounds
        assert max(max(pair) for pair in sizes) <= most
    # Two rounds in a row bring an owner more than its share of a bucket, or its tensors' or files' last bytes.
    limit = bucket // len(results)
    tensors = reports[0].tensors
    assert rounds <= 2 * max(report.bytes_written for report in reports) / limit + 2 * tensors


def test_files_are_owned_in_equal_shares_all_over_the_ranks():
    assert owners_of([10] * 8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners_of([10, 10], 16) == [4, 12]
    assert owners_of([100, 1, 1], 2) == [0, 1, 1]
    assert owners_of([5], 3) == [1]
    assert owners_of([0, 0], 3) == [0, 0]


@pytest.mark.parametrize("numel", [1, 3, 5, 7, 12, 15, 60, 100])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 5, 3), (0, 3), (1, 1, 9)])
def test_boxes_follow_one_another_and_are_bounded(shape, numel):
    reached = 0
    found = torch.arange(prod(shape)).reshape(shape)
    for box in slabs(shape, numel):
        part = found[tuple(slice(s, s + n) for s, n in zip(*box, strict=True))].reshape(-1)
        assert part.tolist() == list(range(reached, reached + box.numel))
        assert box.numel <= numel
        reached += box.numel
    assert reached == prod(shape)


@pytest.mark.parametrize("step", ["_create", "_pack", "_write"])
def test_a_rank_that_fails_stops_all_in_the_next_round(device_ranks, folders, tmp_path, step):
    out = tmp_path / "out"
    told = device_ranks.run(
        fail, str(folders("qwen3", SIZE)), {"tp": 2, "pp": 2}, str(out), step, 2, ranks=range(4), timeout_s=60
    )
    assert all("no memory left" in text for text in told), told
    rounds = {int(text.split()[0]) for text in told}
    assert rounds <= {1, 3, 4}, told  # of more than a hundred
    assert len(rounds) == 1
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("step", "rank", "layout"), [("index", 0, {"tp": 2}), ("files", 2, {"tp": 2, "pp": 2})])
def test_a_killed_rank_ends_the_others_and_nothing_looks_finished(folders, tmp_path, step, rank, layout):
    """In less than 30 s, which is promised. Rank 0 holds the folder's lock and writes the index; rank 2 owns files.

    A pool of its own: the dead process must not be one of the session's. The pool's next save clears the remains.
    """
    folder, out, notes = folders("qwen3", SIZE), tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    size = ParallelLayout(**layout).world_size
    with RankPool(size) as pool:
        with pytest.raises(RankError, match="died"):
            pool.run(die, str(folder), layout, str(out), step, rank, str(notes), timeout_s=60)
        told = [(notes / str(other)).read_text().split("\n", 1) for other in range(size) if other != rank]
        for seconds, text in told:
            assert float(seconds) < 30
            assert "lost" in text or "onnection" in text, text
        assert not out.exists()
        pool.run(save_again, str(folder), layout, str(out))
    for file in sorted(folder.glob("*.safetensors*")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list(tmp_path.glob(".*"))

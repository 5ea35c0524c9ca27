"""Models on some of the ranks of the default process group: every collective runs on the groups that are passed in."""

from __future__ import annotations

import pytest
from runtime.subset_jobs import MEMBERS, group_forgotten, hook_fails, refused_by_megatron, round_trip, two_copies

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the model is transformers'")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3", {"tp": 2}),
        ("llama-tied", {"pp": 2}),
        ("qwen3_moe", {"ep": 2}),
        ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_others_take_no_part(device_ranks, folders, tmp_path, name, layout):
    """Loaded, saved and streamed on ranks 1 and 2 of 4, to the bit; ranks 0 and 3 have left."""
    from safetensors.torch import load_file

    folder = folders(name)
    results = device_ranks.run(round_trip, str(folder), layout, str(tmp_path), ranks=range(4), timeout_s=60)
    assert [rank for rank, result in enumerate(results) if result is not None] == MEMBERS
    results = [result for result in results if result is not None]
    expected = {n: tensor for file in folder.glob("*.safetensors") for n, tensor in load_file(file).items()}
    total = sum(tensor.nbytes for tensor in expected.values())
    for way, out in enumerate(("shared", "owned")):
        for file in sorted(folder.glob("*.safetensors*")):
            assert (tmp_path / out / file.name).read_bytes() == file.read_bytes(), file.name
        assert sum(result["written"][way] for result in results) == total
    assert total <= sum(result["read"] for result in results)
    assert set().union(*(result["held"] for result in results)) == expected.keys()
    for got in (result[way] for result in results for way in ("stream", "exported")):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[n].view(torch.int32), tensor.view(torch.int32)) for n, tensor in expected.items())


@pytest.mark.parametrize("failing", MEMBERS)
def test_errors_name_ranks_as_a_launcher_does(device_ranks, folders, failing):
    """By their number among all processes, not in the group."""
    told = device_ranks.run(hook_fails, str(folders("qwen3")), {"tp": 2}, failing, ranks=range(4), timeout_s=60)
    for rank in MEMBERS:
        (text,) = told[rank]
        assert text.startswith("no place for it" if rank == failing else f"rank {failing} failed: no place for it")


def test_megatron_checkpoints_are_refused(device_ranks, folders, tmp_path):
    """megatron-core saves over the default group, where the others would be waited for: each member is told before."""
    run = tmp_path / "run"
    results = device_ranks.run(
        refused_by_megatron, str(folders("qwen3")), {"tp": 2}, str(run), ranks=range(4), timeout_s=60
    )
    assert [rank for rank, result in enumerate(results) if result is not None] == MEMBERS
    for rank in MEMBERS:
        for text in results[rank]:
            assert "over all ranks of the default group" in text
            assert "expected: all 4 ranks" in text
            assert "got:      2 ranks" in text
            assert "use save_hf_pretrained" in text
    assert not run.exists()


def test_who_forgets_the_group_does_not_wait_for_the_others(device_ranks, folders, tmp_path):
    """They never come; the model's own groups say that the default group is another."""
    out = tmp_path / "out"
    told = device_ranks.run(group_forgotten, str(folders("qwen3")), {"tp": 2}, str(out), ranks=range(4), timeout_s=60)
    for rank in MEMBERS:
        assert len(told[rank]) == 6
        for text in told[rank]:
            assert "the ranks of the group are not those of the model" in text
            assert "expected: 2 ranks" in text
            assert "got:      4 ranks" in text
    assert not out.exists()


@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2}])
def test_a_group_of_two_copies_of_a_model_is_refused(device_ranks, folders, tmp_path, layout):
    """A sum over both would be twice every weight."""
    out = tmp_path / "out"
    results = device_ranks.run(two_copies, str(folders("qwen3")), layout, str(out), ranks=range(4), timeout_s=60)
    for rank, told in enumerate(results):
        assert len(told) == 5
        assert all("the ranks of the group are not those of the model" in text for text in told)
        assert all("got:      4 ranks" in text for text in told[:3])
        found = f"{rank % 2}: rank {rank % 2} of 2; {rank % 2 + 2}: rank {rank % 2} of 2"
        assert all(found in text for text in told[3:])
    assert not out.exists()

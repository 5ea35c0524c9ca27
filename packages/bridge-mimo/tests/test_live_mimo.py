"""HF weights into components on ranks of their own, and out again: equal to the bit, every rank its own bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core.models.mimo.comm", reason="live components need megatron-core 0.17")
pytest.importorskip("transformers", reason="the oracle is transformers")

from live_mimo_jobs import describe, round_trip  # noqa: E402

from bridge_core import verify  # noqa: E402
from bridge_core.checkpoint.hf_folder import open_hf  # noqa: E402
from bridge_core.testing.hf_layouts import save_published  # noqa: E402
from bridge_core.testing.hf_models import make_model  # noqa: E402
from bridge_mimo import ComponentLayout, MegatronMIMOBridge  # noqa: E402

CASES = {
    "one rank each": ("qwen3_vl", 2, {"language": {}, "images": {}}),
    "colocated, language tp2, images tp1": ("qwen3_5", 2, {"language": {"tp": 2}, "images": {}}),
    "language tp2, images tp1": ("qwen3_5", 3, {"language": {"tp": 2, "dp": 1}, "images": {"dp": 1}}),
    "language tp2, images tp2": ("qwen3_vl", 4, {"images": {"tp": 2}, "language": {"tp": 2}}),
    "experts ep2, images tp2": ("qwen3_vl_moe", 4, {"language": {"ep": 2, "dp": 2}, "images": {"tp": 2}}),
    "language pp2, images pp2": ("qwen3_5_moe", 4, {"language": {"pp": 2, "dp": 1}, "images": {"pp": 2}}),
    "language pp2, images pp2, by layout strings": (
        "qwen3_vl",
        4,
        {
            "language": {"pp": 2, "dp": 1, "pipeline_model_parallel_layout": "Ettt|tL"},
            "images": {"pp": 2, "dp": 1, "pipeline_model_parallel_layout": "Et|ttL"},
        },
    ),
    "language tp2 pp2, images dp2": ("qwen3_5-tied", 6, {"language": {"tp": 2, "pp": 2}, "images": {"dp": 2}}),
    "language tp2 pp2, images tp2 dp2": (
        "qwen3_vl",
        8,
        {"language": {"tp": 2, "pp": 2, "dp": 1}, "images": {"tp": 2, "dp": 2}},
    ),
    "language cp2, images dp2": ("qwen3_vl", 4, {"language": {"cp": 2, "dp": 1}, "images": {"dp": 2}}),
    "language tp2 ep2 etp1 dp2, images tp2 pp2": (
        "qwen3_5_moe",
        8,
        {"images": {"tp": 2, "pp": 2}, "language": {"tp": 2, "ep": 2, "etp": 1, "dp": 2}},
    ),
    "colocated, language tp4, images tp2": ("qwen3_vl", 4, {"language": {"tp": 4}, "images": {"tp": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_hf_weights_go_into_components_and_out_again(rank_pool, tmp_path, case):
    name, ranks, layouts = CASES[case]
    folder = save_published(make_model(name), tmp_path / "hf")
    out = tmp_path / "out"
    together = case.startswith("colocated")
    results = rank_pool.run(round_trip, str(folder), layouts, str(out), colocated=together, ranks=range(ranks))
    check(results, folder, out, layouts, colocated=together)


def check(results, folder, out, layouts, *, colocated=False):
    assert not any(result["asked"] for result in results)  # of Megatron's global state
    original = (folder / "model.safetensors").read_bytes()
    assert original == (out / "model.safetensors").read_bytes()
    assert original == Path(f"{out}-whole", "model.safetensors").read_bytes()
    found = verify(folder, out)
    assert found.ok, found
    hf = open_hf(folder)
    kept = {name: tensor for name, tensor in load(folder).items() if not name.startswith("mtp.")}
    for result in results:
        assert list(result["stream"]) == result["again"] == list(results[0]["stream"])
        assert result["stream"].keys() == kept.keys()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in result["stream"].items())
        assert [meta.name for meta in result["metadata"]] == result["again"]
        assert all(name.startswith("mtp.") for name in result["loaded"].ignored)
    written = sum(result["saved"].bytes_written for result in results)
    assert written == sum(tensor.nbytes for tensor in hf.tensors.values())
    check_written(results, folder, layouts, colocated=colocated)
    assert [bool(result["read_alone"]) for result in results] == [rank == 0 for rank in range(len(results))]
    plan = plan_of(folder, layouts, len(results), colocated=colocated)
    for rank, result in enumerate(results):
        mine = [piece for shard in plan.local_shards(rank) for piece in shard.pieces]
        assert result["loaded"].bytes_read == sum(piece.numel * 4 for piece in mine)
        check_reads(result["read"], hf, plan.components_of(rank), result["loaded"].bytes_read)


def check_written(results, folder, layouts, *, colocated):
    """The ranks of a component write its bytes, all together and no others': nothing is gathered elsewhere."""
    plan = plan_of(folder, layouts, len(results), colocated=colocated)
    if colocated or plan.carried:  # copied by all ranks in turns
        return
    for part in plan.components.values():
        written = sum(results[rank]["saved"].bytes_written for rank in part.layout.ranks)
        assert written == sum(meta.nbytes for meta in part.plan.metadata())


def check_reads(read, hf, components, nbytes):
    """What was really read: each byte once, as many as reported, all of tensors of this rank's components."""
    places = sorted((tensor.offset, tensor.offset + tensor.nbytes, name) for name, tensor in hf.tensors.items())
    end = 0
    for path, first, count in read:
        assert path == hf.tensors[places[0][2]].path
        assert first >= end
        end = first + count
        (name,) = [name for start, stop, name in places if start <= first and end <= stop]
        assert ("images" if ".visual." in name else "language") in components
        assert not name.startswith("mtp.")
    assert sum(count for _, _, count in read) == nbytes


def test_ranks_say_what_they_hold_of_which_hf_tensor(rank_pool, tmp_path):
    folder = save_published(make_model("qwen3_vl"), tmp_path / "hf")
    layouts = {"images": {"tp": 2}, "language": {"tp": 2}}
    results = rank_pool.run(describe, str(folder), layouts, ranks=range(4))
    weights = load(folder)
    owned = dict.fromkeys(weights, 0)
    for rank, (entries, shards) in enumerate(results):
        component = range(2) if rank < 2 else range(2, 4)
        for key, mesh, box, replica, tensor in entries:
            assert ("visual" in key) == (rank < 2)
            if box is None:  # parts with gaps, such as the packed q/k/v of a tower that is cut by heads
                assert mesh == ()
                assert tensor is None
                continue
            assert rank in mesh[replica]
            assert set().union(*mesh) <= set(component)
            region = tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
            assert torch.equal(tensor, weights[key][region])
        assert sum(box is not None for _, _, box, _, _ in entries) > len(entries) / 2
        for name, elements in shards:
            owned[name] += elements
    assert owned == {name: tensor.numel() for name, tensor in weights.items()}


def plan_of(folder, layouts, ranks, *, colocated):
    wanted = {name: ComponentLayout(**sizes) for name, sizes in layouts.items()}
    bridge = MegatronMIMOBridge.from_hf_pretrained(folder, parallelism=wanted, world_size=ranks, colocated=colocated)
    return bridge.plan(make_vocab_size_divisible_by=16)


def load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")

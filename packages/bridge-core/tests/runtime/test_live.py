"""Live ranks: HF weights into real mcore models and out again, at every kind of layout, to the bit."""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import product

import pytest
from runtime.live_jobs import die_on_one_rank, fail_on_one_rank, refuse, round_trip

from bridge_core import ParallelLayout, verify
from bridge_core.testing.hf_models import make_model, save_model
from bridge_core.testing.ranks import RankError, RankPool

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

TOKENS = torch.tensor([[3, 17, 91, 130, 5, 64, 64, 2, 77, 11, 40, 8]])

KINDS = [*product(["qwen3", "qwen3_moe"], ["host", "local"])]
LAYOUTS = [
    {"tp": 2},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"ep": 2, "dp": 2},
    {"etp": 2, "dp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 2, "ep": 2, "etp": 1},
    {"dp": 2},
    {"pp": 2, "num_layers_in_first_pipeline_stage": 3},
    {"cp": 2},
]
EIGHT = [{"tp": 2, "pp": 2, "ep": 2, "etp": 1, "dp": 2}, {"tp": 2, "pp": 2, "ep": 2, "etp": 2, "dp": 2}]
OTHERS = [
    ("llama-tied", "host", {"pp": 2}),
    ("qwen2", "local", {"tp": 4}),
    ("qwen3_moe", "local", {"pp": 2, "ep": 2, "dp": 2}),
    ("qwen3_moe-mixed", "host", {"pp": 2, "ep": 2, "dp": 2}),
    ("mixtral", "host", {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}),
]


def grid():
    """Every kind of model at every layout that means something to it; all but one kind of each layout are slow.

    The kinds take turns.
    """
    for number, layout in enumerate(LAYOUTS):
        kinds = [(name, spec) for name, spec in KINDS if "moe" in name or not {"ep", "etp"} & layout.keys()]
        for kind in kinds:
            marks = () if kind == kinds[number % len(kinds)] else (pytest.mark.slow,)
            yield pytest.param(*kind, layout, marks=marks)


# The allgather dispatcher of the CPU has no expert-tensor parallelism beyond tp: weights only.
NO_FORWARD = [{"etp": 2, "dp": 2}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model once, saved by transformers, with its logits."""
    made = {}

    def make(name):
        if name not in made:
            model = make_model(name)
            folder = save_model(model, tmp_path_factory.mktemp(name) / "hf", max_shard_size="300KB")
            with torch.no_grad():
                made[name] = folder, model(TOKENS).logits
        return made[name]

    return make


@pytest.mark.parametrize(("name", "spec", "layout"), [*grid(), *OTHERS], ids=lambda value: str(value).replace(" ", ""))
def test_load_run_save_and_stream(device_ranks, models, tmp_path, name, spec, layout):
    folder, logits = models(name)
    check_round_trip(device_ranks, folder, logits, layout, spec, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["host", "local"])
@pytest.mark.parametrize("layout", EIGHT)
def test_eight_ranks(eight_device_ranks, models, tmp_path, layout, spec):
    folder, logits = models("qwen3_moe")
    check_round_trip(eight_device_ranks, folder, logits, layout, spec, tmp_path / "out")


def check_round_trip(pool, folder, logits, layout, spec, out):
    sizes = ParallelLayout(**layout)
    results = pool.run(round_trip, str(folder), layout, spec, str(out), TOKENS, ranks=range(sizes.world_size))
    # Saved: the very files that were loaded, each byte written by one rank.
    for file in sorted(folder.glob("*.safetensors*")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    verify(folder, out).raise_if_different()
    check_steps(results, folder, logits, layout)


def check_steps(results, folder, logits, layout, *, ignore=()):
    sizes = ParallelLayout(**layout)
    total = sum(meta.nbytes for meta in results[0]["metadata"])
    assert sum(result["saved"].bytes_written for result in results) == total
    for result in results:
        # Loaded: every rank read what it holds and nothing else.
        assert result["loaded"].bytes_read == result["held"] - result["padding"]
        # Streamed: one order, twice, in as many collectives as there are buckets.
        assert result["order"] == result["again"] == [meta.name for meta in results[0]["metadata"]]
        assert result["collectives"] == 2 * result["buckets"] + 2
        assert result["parts"] <= set(result["order"])
        assert result["buckets"] <= total // 30_000 + 2
    compare_stream(results, folder, ignore)
    if layout not in NO_FORWARD:
        compare_logits(results, logits, sizes)


def compare_stream(results, folder, ignore=()) -> None:
    from safetensors.torch import load_file

    expected = {}
    for file in folder.glob("*.safetensors"):
        expected |= {n: t for n, t in load_file(file).items() if not any(fnmatchcase(n, p) for p in ignore)}
    for got in (result["stream"] for result in results):
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name].view(torch.int32), tensor.view(torch.int32)), name


def compare_logits(results, expected, layout: ParallelLayout) -> None:
    parts = {
        result["tp"]: result["logits"]
        for rank, result in enumerate(results)
        if result["logits"] is not None and layout.coords(rank).dp == 0
    }
    got = torch.cat([parts[rank] for rank in sorted(parts)], dim=-1)[..., : expected.shape[-1]]
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 5}, ["plan lacks", "decoder.layers.4"]),
        ({"ffn_hidden_size": 128}, ["another shape", "linear_fc1"]),
        ({"qk_layernorm": False}, ["model lacks", "q_layernorm"]),
    ],
)
def test_another_model_is_refused_before_a_byte_is_copied(device_ranks, models, changes, words):
    folder, _ = models("qwen3")
    for text in device_ranks.run(refuse, str(folder), changes, {"tp": 2}, ranks=[0, 1]):
        for word in words:
            assert word in text, text


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("load", "no memory left"),
        ("load, room", "no memory left"),
        ("save", "no memory left"),
        ("save, room", "no memory left"),
        ("stream", "left the stream"),
    ],
)
def test_one_failing_rank_is_heard_by_all(device_ranks, models, tmp_path, step, words):
    folder, _ = models("qwen3")
    out = tmp_path / "out"
    told = device_ranks.run(fail_on_one_rank, str(folder), {"tp": 2}, step, str(out), ranks=[0, 1], timeout_s=60)
    assert words in told[0]
    assert told[1] == "left" if step == "stream" else words in told[1]
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("step", ["load", "save"])
def test_a_killed_rank_ends_the_others_with_an_error(models, tmp_path, step):
    """A pool of its own: the dead process must not be one of the session's."""
    folder, _ = models("qwen3")
    notes = tmp_path / "notes"
    notes.mkdir()
    with RankPool(2) as pool, pytest.raises(RankError, match="died"):
        pool.run(die_on_one_rank, str(folder), {"tp": 2}, step, str(tmp_path / "out"), str(notes), timeout_s=60)
    seconds, text = (notes / "0").read_text().split("\n", 1)
    assert float(seconds) < 30
    assert "lost" in text or "onnection" in text, text
    if step == "save":  # a load writes nothing
        assert [path.name for path in tmp_path.iterdir()] == ["notes"], "whoever is left clears what was begun"

"""What is wrong on one rank is told on all, and nothing that looks finished is left; policies for missing ranges."""

from __future__ import annotations

import pytest
from live_jobs import export_often, refuse, uncalibrated_experts
from quant_models import make

from bridge_core.testing.hf_models import make_model, save_model

pytest.importorskip("megatron.core", reason="live models need megatron-core")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")

FAILURES = [
    ("not quantised", {}, "no layer of the model is quantised"),
    ("input not calibrated", {}, "were not calibrated"),
    ("input is zero", {}, "were not calibrated"),
    ("input differs", {}, "calibrated it differently"),
    ("weight differs", {}, "calibrated it differently"),
    ("input is nan", {}, "zero, negative or not finite"),
    ("weight is infinite", {}, "zero, negative or not finite"),
    ("not quantised here", {}, "quantised one tensor differently"),
    ("output quantised", {}, "no format quantises a layer's output"),
    ("weight is nan", {}, "not finite"),
    ("packing fails", {}, "no memory left"),
    ("a tensor is forgotten", {}, "not written as planned"),
    ("nothing", {"format": "gguf"}, "no such checkpoint format"),
    ("nothing", {"uncalibrated": "ignore"}, "no such policy"),
    ("nothing", {"ranges": "mean"}, "no such way"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """HF folder of each model, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name) / "hf")
        return made[name]

    return folder


@pytest.mark.parametrize(("spoil", "options", "said"), FAILURES, ids=lambda value: str(value)[:30])
def test_what_one_rank_finds_is_told_on_all(rank_pool, models, tmp_path, spoil, options, said):
    out = tmp_path / "out"
    told = rank_pool.run(refuse, str(models("qwen3")), {"tp": 2}, str(out), spoil, ranks=[0, 1], options=options)
    assert all(said in text for text in told), told
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_failure_on_another_stage_is_told_on_all(rank_pool, models, tmp_path):
    out = tmp_path / "out"
    layout = {"tp": 2, "pp": 2}
    told = rank_pool.run(refuse, str(models("qwen3")), layout, str(out), "packing fails", ranks=range(4))
    assert all("no memory left" in text for text in told), told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", ["packing fails", "a tensor is forgotten"])
def test_failures_with_one_writer_for_each_file(rank_pool, models, tmp_path, spoil):
    told = rank_pool.run(
        refuse,
        *(str(models("qwen3")), {"tp": 2}, str(tmp_path / "out"), spoil),
        ranks=[0, 1],
        options={"one_writer_per_file": True},
    )
    said = "no memory left" if spoil == "packing fails" else "not written as planned"
    assert all(said in text for text in told), told
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use(rank_pool, models, tmp_path):
    (tmp_path / "note").write_text("here first")
    told = rank_pool.run(refuse, str(models("qwen3")), {"dp": 2}, str(tmp_path), "nothing", ranks=[0, 1])
    assert all("already holds something" in text for text in told), told
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_the_folder_that_the_model_is_from(rank_pool, models):
    folder = models("qwen3")
    told = rank_pool.run(
        refuse, str(folder), {"dp": 2}, str(folder), "nothing", ranks=[0, 1], options={"overwrite": True}
    )
    assert all("would replace the folder" in text for text in told), told


def test_ranges_that_differ_are_reduced_if_asked_for(rank_pool, models, tmp_path):
    from safetensors import safe_open

    for spoil, out in (("input differs", "one"), ("nothing", "other")):
        told = rank_pool.run(
            refuse,
            *(str(models("qwen3")), {"tp": 2}, str(tmp_path / out), spoil),
            ranks=[0, 1],
            options={"ranges": "maximum"},
        )
        assert told == ["no error"] * 2, told
    scales = []
    for out in ("one", "other"):
        with safe_open(tmp_path / out / "model.safetensors", "pt") as file:
            scales.append(file.get_tensor("model.layers.0.mlp.up_proj.input_scale").item())
    assert scales[0] == 2 * scales[1]


@pytest.mark.parametrize("layout", [{}, {"ep": 2, "dp": 2}])
def test_experts_that_no_token_reached(rank_pool, models, tmp_path, layout):
    from safetensors import safe_open

    ranks = range(2 if layout else 1)
    folder = str(models("qwen3_moe"))
    told = rank_pool.run(uncalibrated_experts, folder, layout, str(tmp_path / "error"), "fp8", "error", ranks=ranks)
    assert all("were not calibrated" in text and "experts" in text for text, _ in told), told
    assert not (tmp_path / "error").exists()

    told = rank_pool.run(uncalibrated_experts, folder, layout, str(tmp_path / "peers"), "fp8", "peers", ranks=ranks)
    assert all(text == "no error" for text, _ in told), told
    with safe_open(tmp_path / "peers" / "model.safetensors", "pt") as file:
        found = [
            file.get_tensor(f"model.layers.2.mlp.experts.{number}.gate_proj.input_scale").item() for number in range(4)
        ]
    assert found[1] == found[3] == max(found)
    assert found[2] == pytest.approx(3 * found[0], rel=1e-6)

    told = rank_pool.run(
        uncalibrated_experts, folder, layout, str(tmp_path / "weights"), "nvfp4", "weight_only", ranks=ranks
    )
    assert all(text == "no error" for text, _ in told), told
    assert told[0][1].formats == {"nvfp4": 4 * 4 + 3 * 12, "w4a16_nvfp4": 12}
    told = rank_pool.run(uncalibrated_experts, folder, layout, str(tmp_path / "fp8"), "fp8", "weight_only", ranks=ranks)
    assert all("no form with unquantised inputs" in text for text, _ in told), told


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_exports_with_ranks_that_come_late(rank_pool, tmp_path, times):
    folder = save_model(make_model("qwen3"), tmp_path / "hf")
    sizes = rank_pool.run(export_often, str(folder), {"dp": 4}, str(tmp_path / "out"), times, timeout_s=600)
    assert len({size for of_rank in sizes for size in of_rank}) == 1
    assert all(len(of_rank) == times for of_rank in sizes)

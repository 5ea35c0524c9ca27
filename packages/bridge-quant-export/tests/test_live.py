"""Exports of live models: the same folder, to the byte, from every layout."""

from __future__ import annotations

import json

import pytest
import torch
from live_jobs import export, opened_for_writing
from quant_models import make
from quantising import CONFIGS, MIXED
from safetensors import safe_open
from safetensors.torch import load_file

from bridge_core import ParallelLayout
from bridge_core.testing.hf_models import make_model, save_model
from bridge_quant_export.folders.verify import verify_quantized
from bridge_quant_export.formats import FORMATS
from bridge_quant_export.formats.format import WRITERS
from bridge_quant_export.readers import readers_of

pytest.importorskip("megatron.core", reason="live models need megatron-core")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")


def pairs_of(kinds):
    """Formats, each with every writer that has readers for it."""
    return [(kind, writer) for kind in kinds for writer in WRITERS if readers_of(writer, FORMATS[kind])]


WRITABLE = pairs_of(CONFIGS)
# TensorRT-LLM takes scales of inputs in half precision only.
OPTIONS = {"dtype": "bfloat16"}

# Every way to cut a model, for a dense one and for experts in either module.
PLAIN = [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"dp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}]
OF_EXPERTS = [
    {"ep": 2, "dp": 2},
    {"tp": 1, "ep": 1, "etp": 2, "dp": 2},
    {"tp": 2, "ep": 2, "etp": 1},
    {"pp": 2, "ep": 2, "dp": 2},
]
MODULES = {
    "dense": [
        *(("qwen3", layout, "host", True) for layout in PLAIN),
        ("qwen3", {"tp": 2, "dp": 2}, "host", True),
        ("qwen3", {"pp": 2, "num_layers_in_first_pipeline_stage": 3}, "host", True),
        ("qwen3", {"tp": 2, "pp": 2}, "local", True),
    ],
    "grouped": [
        *(("qwen3_moe", layout, "host", True) for layout in (*PLAIN, *OF_EXPERTS)),
        ("qwen3_moe", {"tp": 2, "ep": 1, "etp": 2}, "host", True),
        ("qwen3_moe", {"ep": 4, "dp": 4}, "host", True),
    ],
    "sequential": [
        *(("qwen3_moe", layout, "host", False) for layout in (*PLAIN, *OF_EXPERTS)),
        ("qwen3_moe", {"tp": 2, "ep": 1, "etp": 2}, "local", True),
    ],
}
CASES = [case for cases in MODULES.values() for case in cases]


def kinds_of(number):
    """Two formats to a case, in turn: every format meets every module, and several layouts. The grid is slow."""
    return [list(CONFIGS)[(2 * number + step) % len(CONFIGS)] for step in (0, 1)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """HF folder of each model, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name) / "hf")
        return made[name]

    return folder


@pytest.fixture(scope="module")
def single(rank_pool, models, tmp_path_factory):
    """The exports of one rank: a folder for each format and writer."""
    made = {}

    def folder(name, kind, writer):
        if (name, kind) not in made:
            made[name, kind] = tmp_path_factory.mktemp(f"{name}-{kind}")
            out = str(made[name, kind])
            rank_pool.run(export, str(models(name)), {}, out, pairs_of([kind]), ranks=[0], options=OPTIONS)
        return made[name, kind] / f"{kind}-{writer}"

    return folder


def check_same(one, other):
    """Folders of the same files with the same bytes."""
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names
    for name in names:
        assert (other / name).read_bytes() == (one / name).read_bytes(), f"{other.name}: {name}"


def check_layout(rank_pool, models, single, tmp_path, case, pairs):
    name, layout, spec, grouped = case
    ranks = range(ParallelLayout(**layout).world_size)
    reports = rank_pool.run(
        export,
        *(str(models(name)), layout, str(tmp_path), pairs),
        ranks=ranks,
        spec=spec,
        grouped=grouped,
        options=OPTIONS,
    )
    for number, (kind, writer) in enumerate(pairs):
        check_same(single(name, kind, writer), tmp_path / f"{kind}-{writer}")
        # Every rank has written something, and together they wrote every byte once.
        written = [report[number].bytes_written for report in reports]
        assert min(written) > 0
        with safe_open(tmp_path / f"{kind}-{writer}" / "model.safetensors", "pt") as file:
            assert sum(written) == sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


def case_id(case):
    name, layout, spec, grouped = case
    sizes = ",".join(f"{axis}={size}" for axis, size in layout.items())
    return f"{name}-{sizes}-{spec}-{'grouped' if grouped else 'sequential'}"


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(case_id, CASES))
def test_layouts_give_the_same_bytes(rank_pool, models, single, tmp_path, number):
    check_layout(rank_pool, models, single, tmp_path, CASES[number], pairs_of(kinds_of(number)))


def test_every_format_meets_a_dense_model_and_experts_in_either_module():
    for cases in MODULES.values():
        assert {kind for case in cases for kind in kinds_of(CASES.index(case))} == set(CONFIGS)


def other_pairs(number):
    """The formats that `kinds_of` leaves out, each with one of its writers, in turn."""
    found = [pairs_of([kind]) for kind in CONFIGS if kind not in kinds_of(number)]
    return [pairs[(number + step) % len(pairs)] for step, pairs in enumerate(found)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=map(case_id, CASES))
def test_every_layout_gives_the_same_bytes_in_every_format(rank_pool, models, single, tmp_path, number):
    check_layout(rank_pool, models, single, tmp_path, CASES[number], other_pairs(number))


def test_the_grid_has_every_format_with_every_writer_in_either_module():
    for cases in MODULES.values():
        numbers = [CASES.index(case) for case in cases]
        met = {pair for number in numbers for pair in [*pairs_of(kinds_of(number)), *other_pairs(number)]}
        assert met == set(WRITABLE)


@pytest.fixture(scope="module")
def single_mixed(rank_pool, models, tmp_path_factory):
    """As `single`, of several formats in one model with a quantised KV cache."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{name}-{MIXED}")
            pairs = [(MIXED, writer) for writer in WRITERS]
            rank_pool.run(export, str(models(name)), {}, str(made[name]), pairs, ranks=[0], kv=True)
        return made[name]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "host"], ids=case_id)
def test_every_layout_gives_the_same_bytes_of_a_mixture(rank_pool, models, single_mixed, tmp_path, case):
    """Several formats and a quantised KV cache, which mcore's local attention cannot have."""
    name, layout, spec, grouped = case
    pairs = [(MIXED, writer) for writer in WRITERS]
    rank_pool.run(
        export,
        *(str(models(name)), layout, str(tmp_path), pairs),
        ranks=range(ParallelLayout(**layout).world_size),
        spec=spec,
        grouped=grouped,
        kv=True,
    )
    for _, writer in pairs:
        check_same(single_mixed(name) / f"{MIXED}-{writer}", tmp_path / f"{MIXED}-{writer}")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_exports_are_sound_and_near_the_original(models, single, name):
    for kind, writer in WRITABLE:
        # Scales by chance, as here for AWQ, do a weight no good.
        tolerance = 0.25 if "awq" in kind else 0.17
        found = verify_quantized(single(name, kind, writer), models(name), tolerance=tolerance)
        assert found.ok, (kind, writer, found.wrong[:3])
        layers = 4 * (4 + 3) if name == "qwen3" else 4 * (4 + 4 * 3)
        assert len(found.errors) == layers
        assert {error.format for error in found.errors} == {kind}


def test_configurations_name_every_expert_and_exclude_the_rest(single):
    folder = single("qwen3_moe", "nvfp4", "modelopt")
    quantization = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "NVFP4"
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(4)]
    assert quantization["exclude_modules"] == sorted(["lm_head", "model.embed_tokens", *routers])
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == quantization["exclude_modules"]
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "layout"), [("qwen3", {"tp": 2, "pp": 2}), ("qwen3_moe", {"ep": 2, "dp": 2})], ids=["tp2pp2", "ep2"]
)
def test_several_formats_in_one_model(rank_pool, models, tmp_path, name, layout):
    pairs = [(MIXED, writer) for writer in WRITERS]
    for out, sizes in (("one", {}), ("many", layout)):
        ranks = range(ParallelLayout(**sizes).world_size)
        rank_pool.run(export, str(models(name)), sizes, str(tmp_path / out), pairs, ranks=ranks)
    for _, writer in pairs:
        folder = tmp_path / "many" / f"{MIXED}-{writer}"
        check_same(tmp_path / "one" / f"{MIXED}-{writer}", folder)
        found = verify_quantized(folder, models(name), tolerance=0.17)
        assert found.ok, found.wrong[:3]
        assert {error.format for error in found.errors} == {"fp8", "nvfp4"}
    layers = json.loads((tmp_path / "many" / f"{MIXED}-modelopt" / "hf_quant_config.json").read_text())
    # Every expert by its global number, whatever rank holds it.
    assert len(layers["quantization"]["quantized_layers"]) == 4 * (4 + (3 if name == "qwen3" else 4 * 3))


@pytest.mark.parametrize("bucket_bytes", [5_000, 256 * 1024 * 1024])
def test_one_writer_for_each_file(rank_pool, models, tmp_path, bucket_bytes):
    """The same bytes; every file opened by one rank, whatever it holds of the model."""
    pairs, options = [("nvfp4", "modelopt")], {"max_shard_size": 300_000}
    jobs = {"shared": options, "owned": options | {"one_writer_per_file": True, "bucket_bytes": bucket_bytes}}
    layout, reports = {"tp": 2, "pp": 2}, {}
    for out, chosen in jobs.items():
        found = rank_pool.run(
            export, str(models("qwen3")), layout, str(tmp_path / out), pairs, ranks=range(4), options=chosen
        )
        reports[out] = [report for (report,) in found]
    check_same(tmp_path / "shared" / "nvfp4-modelopt", tmp_path / "owned" / "nvfp4-modelopt")
    opened = [name for report in reports["owned"] for name in report.files]
    names = [file.name for file in (tmp_path / "owned" / "nvfp4-modelopt").glob("*.safetensors")]
    assert sorted(opened) == sorted(names)
    assert len(names) > 4
    totals = {out: sum(report.bytes_written for report in found) for out, found in reports.items()}
    assert totals["owned"] == totals["shared"]


# Widths that do not divide into blocks on a rank: 96 columns on 2 or 4 ranks, 64 on 4.
@pytest.mark.parametrize(("tp", "kind"), [(2, "mxfp8"), (2, "mxfp4"), (4, "nvfp4"), (4, "mxfp8")])
def test_a_cut_inside_a_block_is_brought_together_first(rank_pool, tmp_path, tp, kind):
    folder = save_model(make_model("qwen3"), tmp_path / "hf")
    pairs = [(kind, "compressed-tensors")]
    for out, layout in (("one", {}), ("many", {"tp": tp})):
        rank_pool.run(export, str(folder), layout, str(tmp_path / out), pairs, ranks=range(tp if layout else 1))
    check_same(tmp_path / "one" / f"{kind}-compressed-tensors", tmp_path / "many" / f"{kind}-compressed-tensors")


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 4}, {"tp": 2, "pp": 2}])
def test_a_last_stage_without_quantised_layers(rank_pool, models, tmp_path, layout):
    pairs = [("fp8", writer) for writer in WRITERS]
    for out, sizes in (("one", {}), ("many", layout)):
        ranks = range(ParallelLayout(**sizes).world_size)
        rank_pool.run(export, str(models("qwen3")), sizes, str(tmp_path / out), pairs, ranks=ranks, skip=(2, 3))
    for _, writer in pairs:
        check_same(tmp_path / "one" / f"fp8-{writer}", tmp_path / "many" / f"fp8-{writer}")
        config = json.loads((tmp_path / "many" / f"fp8-{writer}" / "config.json").read_text())
        assert "model.layers.3.mlp.down_proj" in config["quantization_config"]["ignore"]
        assert "model.layers.1.mlp.down_proj" not in config["quantization_config"]["ignore"]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "pp": 2}, {"dp": 2}])
def test_kv_scales(rank_pool, models, tmp_path, layout):
    pairs = [("fp8", writer) for writer in WRITERS]
    for out, sizes in (("one", {}), ("many", layout)):
        ranks = range(ParallelLayout(**sizes).world_size)
        rank_pool.run(export, str(models("qwen3")), sizes, str(tmp_path / out), pairs, ranks=ranks, kv=True)
    ends = {"modelopt": "self_attn.{0}_proj.{0}_scale", "compressed-tensors": "self_attn.{0}_scale"}
    for _, writer in pairs:
        folder = tmp_path / "many" / f"fp8-{writer}"
        check_same(tmp_path / "one" / f"fp8-{writer}", folder)
        assert verify_quantized(folder).ok
        tensors = load_file(folder / "model.safetensors")
        scales = {n: t for n, t in tensors.items() if n.endswith(("k_scale", "v_scale"))}
        assert sorted(scales) == sorted(
            f"model.layers.{n}.{ends[writer].format(which)}" for n in range(4) for which in "kv"
        )
        assert len({float(scale) for scale in scales.values()}) == 8
        assert all(1 < float(scale) < 800 / 448 for scale in scales.values())
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]


LATENTS = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize("layout", [{}, {"tp": 2}])
def test_projections_of_latent_attention_that_engines_fuse(rank_pool, tmp_path, layout):
    """Two weights of Megatron's, with ranges of their own: engines load their second-level scales as one."""
    folder = save_model(make_model("deepseek_v3", **LATENTS), tmp_path / "hf")
    pairs = [("nvfp4", writer) for writer in WRITERS]
    ranks = range(ParallelLayout(**layout).world_size)
    rank_pool.run(export, str(folder), layout, str(tmp_path), pairs, ranks=ranks)
    for _, writer in pairs:
        out = tmp_path / f"nvfp4-{writer}"
        found = verify_quantized(out, folder, tolerance=0.2)
        assert found.ok, found.wrong[:3]
        tensors = load_file(out / "model.safetensors")
        names = (
            ("weight_scale_2", "input_scale") if writer == "modelopt" else ("weight_global_scale", "input_global_scale")
        )
        for layer in range(4):
            at = f"model.layers.{layer}.self_attn"
            for name in names:
                assert torch.equal(tensors[f"{at}.q_a_proj.{name}"], tensors[f"{at}.kv_a_proj_with_mqa.{name}"])
                assert not torch.equal(tensors[f"{at}.q_a_proj.{name}"], tensors[f"{at}.q_b_proj.{name}"])


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "pp": 2}])
def test_biases_and_an_output_layer_whose_vocabulary_is_padded(rank_pool, models, tmp_path, layout):
    """Biases go with the rows of their projections; rows that pad the vocabulary are not written, packed or not."""
    pairs = pairs_of(["nvfp4", "fp8_channel", "int4"])
    for out, sizes in (("one", {}), ("many", layout)):
        ranks = range(ParallelLayout(**sizes).world_size)
        rank_pool.run(export, str(models("qwen2")), sizes, str(tmp_path / out), pairs, ranks=ranks, head=True)
    original = load_file(models("qwen2") / "model.safetensors")
    biases = {name for name in original if name.endswith(".bias")}
    assert len(biases) == 4 * 3
    for kind, writer in pairs:
        folder = tmp_path / "many" / f"{kind}-{writer}"
        check_same(tmp_path / "one" / f"{kind}-{writer}", folder)
        found = verify_quantized(folder, models("qwen2"), tolerance=0.17)
        assert found.ok, (kind, writer, found.wrong[:3])
        assert {error.module: error.format for error in found.errors}["lm_head"] == kind
        tensors = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensors[name], original[name]) for name in biases)
        codes = tensors.get("lm_head.weight_packed", tensors.get("lm_head.weight"))
        assert codes.shape[0] == tensors["model.embed_tokens.weight"].shape[0] == 131


@pytest.mark.parametrize("layout", [{"dp": 4}, {"tp": 2, "pp": 2}])
def test_configurations_are_written_once_by_one_rank(rank_pool, models, tmp_path, layout):
    opened = rank_pool.run(opened_for_writing, str(models("qwen3")), layout, str(tmp_path), ranks=range(4))
    said = [sorted(name for name in of_rank if "tokenizer" not in name) for of_rank in opened]
    assert sorted(map(bool, said)) == [False, False, False, True]
    wanted = ["config.json", "hf_quant_config.json", "model.safetensors.index.json"]
    assert [name for name in max(said) if name in wanted] == wanted

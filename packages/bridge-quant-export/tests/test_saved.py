"""Saved quantised checkpoints: exported without a model, to the byte what the live model's export is."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from quant_models import make
from quantising import CONFIGS
from saved_jobs import save_and_export

from bridge_core import ParallelLayout
from bridge_core.errors import BridgeError
from bridge_quant_export import export_saved
from bridge_quant_export.cli import main
from bridge_quant_export.folders.open import open_quantized
from bridge_quant_export.formats import FORMATS
from bridge_quant_export.formats.format import WRITERS
from bridge_quant_export.readers import readers_of

pytest.importorskip("megatron.core", reason="live models need megatron-core")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")

# The model stays in fp32, in which TensorRT-LLM takes no scales of inputs.
PAIRS = [
    (name, writer) for name in CONFIGS for writer in WRITERS if readers_of(writer, FORMATS[name]) and "awq" not in name
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """HF folder of each model, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name) / "hf", num_hidden_layers=2)
        return made[name]

    return folder


def check_same(one, other):
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names
    for name in names:
        assert (other / name).read_bytes() == (one / name).read_bytes(), f"{other.name}: {name}"


CASES = [
    ("qwen3", {}, "host"),
    ("qwen3", {"tp": 2}, "local"),
    ("qwen3", {"pp": 2}, "host"),
    ("qwen3_moe", {"ep": 2, "dp": 2}, "host"),
]


def pairs_of(number):
    """Every format with one of its writers, in turn: each pair is met by some case."""
    writers = {kind: [pair for pair in PAIRS if pair[0] == kind] for kind, _ in PAIRS}
    return [pairs[(number + step) % len(pairs)] for step, pairs in enumerate(writers.values())]


def test_every_pair_is_met():
    assert {pair for number in range(len(CASES)) for pair in pairs_of(number)} == set(PAIRS)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_saved_model_is_exported_as_the_live_one(rank_pool, models, tmp_path, number):
    name, layout, spec = CASES[number]
    pairs, ranks = pairs_of(number), range(ParallelLayout(**layout).world_size)
    rank_pool.run(save_and_export, str(models(name)), layout, str(tmp_path), pairs, ranks=ranks, spec=spec)
    for kind, writer in pairs:
        out = tmp_path / "saved" / f"{kind}-{writer}"
        report = export_saved(tmp_path / kind, out, source=models(name), format=writer)
        check_same(tmp_path / f"{kind}-{writer}", out)
        assert list(report.formats) == [kind]


LIKE_TE = [pair for pair in PAIRS if pair[0] in ("fp8", "nvfp4", "fp8_channel", "int4")]


@pytest.mark.parametrize(
    ("name", "layout"), [("qwen3", {"tp": 2}), ("qwen3_moe", {"ep": 2, "dp": 2}), ("qwen3_moe", {"tp": 2})]
)
def test_what_modelopt_saves_of_transformer_engine(rank_pool, models, tmp_path, name, layout):
    """Grouped experts, each with its own range under its global number, and ranges of the KV cache."""
    ranks = range(ParallelLayout(**layout).world_size)
    rank_pool.run(save_and_export, str(models(name)), layout, str(tmp_path), LIKE_TE, ranks=ranks, like_te=True)
    for kind, writer in LIKE_TE:
        out = tmp_path / "saved" / f"{kind}-{writer}"
        if kind == "int4" and name == "qwen3_moe" and layout == {"tp": 2}:
            # ModelOpt saves blocks of experts that are cut along their inputs for two experts of a rank, and of the
            # others those of one rank only (0.47, plugins/megatron.py, `_get_shard_axis_dict`): they are not there.
            with pytest.raises(BridgeError, match="do not fit its shape"):
                export_saved(tmp_path / kind, out, source=models(name), format=writer)
            continue
        export_saved(tmp_path / kind, out, source=models(name), format=writer)
        check_same(tmp_path / f"{kind}-{writer}", out)
        assert len(open_quantized(out).kv_scales) == 2 * 2


def test_the_command(rank_pool, models, tmp_path, capsys):
    pairs = [("fp8", writer) for writer in WRITERS]
    folder = str(models("qwen3"))
    rank_pool.run(save_and_export, folder, {}, str(tmp_path), pairs, ranks=[0])
    arguments = ["export", str(tmp_path / "fp8"), str(tmp_path / "out"), "--source", folder]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "14 fp8" in said
    check_same(tmp_path / "fp8-modelopt", tmp_path / "out")
    assert main(arguments) == 1
    assert "already holds something" in capsys.readouterr().err
    # The same by two processes that share the work.
    arguments[2] = str(tmp_path / "shared")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "bridge_quant_export.cli", *arguments, "--format", "compressed-tensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check_same(tmp_path / "fp8-compressed-tensors", tmp_path / "shared")


def test_what_is_not_quantised_or_broken_is_refused(rank_pool, models, tmp_path):
    from bridge_core import import_ckpt

    folder = models("qwen3")
    import_ckpt(folder, tmp_path / "plain")
    with pytest.raises(BridgeError, match="no layer of the model is quantised"):
        export_saved(tmp_path / "plain", tmp_path / "out", source=folder)
    rank_pool.run(save_and_export, str(folder), {}, str(tmp_path), [("fp8", "modelopt")], ranks=[0])
    shutil.copytree(tmp_path / "fp8", tmp_path / "short")
    largest = max((tmp_path / "short").glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1000])
    with pytest.raises(BridgeError):
        export_saved(tmp_path / "short", tmp_path / "out", source=folder)
    with pytest.raises(BridgeError, match="would replace"):
        export_saved(tmp_path / "fp8", tmp_path / "fp8", source=folder, overwrite=True)
    assert not (tmp_path / "out").exists()

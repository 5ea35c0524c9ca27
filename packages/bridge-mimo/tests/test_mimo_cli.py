"""The command line: `bridge-mimo plan | import | export | verify`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from inventory import PUBLISHED

from bridge_mimo.cli import main

BOTH = ["--component", "language=tp=4", "--component", "images=tp=4"]


@pytest.fixture
def config(tmp_path):
    """config.json of Qwen3.5-27B."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED["qwen3.5-27b"]), encoding="utf-8")
    return str(path)


def test_plan(config, capsys):
    assert main(["plan", config, *BOTH, "--world-size", "8"]) == 0
    out = capsys.readouterr().out
    assert "1184 tensors" in out
    assert "15 tensors of prediction layers" in out
    assert "language  ####....  0-3: tp=4 dp=1\nimages    ....####  4-7: tp=4 dp=1" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("language ", "images "))}
    assert rows["language"][1:4] == ["0-3", "0-63", "611"]
    assert rows["images"][1:4] == ["4-7", "0-26", "333"]


def test_plan_of_one_rank(config, capsys):
    assert main(["plan", config, *BOTH, "--rank", "7"]) == 0
    assert "modality_submodules.images.encoders.qwen_visual.merger.linear_fc1.weight" in capsys.readouterr().out
    assert main(["plan", config, *BOTH, "--rank", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"] == ["images"]


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_plan_is_drawn(config, tmp_path, capsys, suffix, magic):
    pytest.importorskip("matplotlib", reason="the extra draw")
    picture = tmp_path / f"plan{suffix}"
    assert main(["plan", config, *BOTH, "--draw", str(picture)]) == 0
    first = picture.read_bytes()
    assert first.startswith(magic)
    if suffix == ".svg":
        assert first.count(b"13.4 GB") == first.count(b"237.3 MB") == 1
    assert main(["plan", config, *BOTH, "--draw", str(tmp_path / "plan.txt")]) == 1
    assert not (tmp_path / "plan.txt").exists()
    assert "cannot be drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--component", "language=tp=4,pp", "--component", "images"], 2, "a size of language is not understood: 'pp'"),
        (["--component", "language=tp=-4"], 2, "not understood"),
        (["--component", "=tp=4"], 2, "no name"),
        (["--component", "language=tp=4", "--component", "language=pp=2"], 2, "named twice"),
        (["--component", "images=tp=4"], 1, "other components"),
        (["--component", "language=tp=4", "--component", "pictures=tp=4"], 1, "leave out pictures; give images"),
        ([*BOTH, "--world-size", "12"], 1, "6 of 12 ranks"),
        (["--component", "language=tp=2,vpp=2", "--component", "images"], 1, "component language, ParallelLayout(tp=2"),
        ([*BOTH, "--hf-tower", "pictures"], 1, "no such tower"),
        ([*BOTH, "--hf-tower", "language"], 1, "no such tower"),
        (["--component", "language=tp=5", "--component", "images=tp=4"], 1, "component language"),
    ],
)
def test_bad_input(config, capsys, given, code, said):
    assert main(["plan", config, *given]) == code
    assert said in capsys.readouterr().err


def test_import_verify_export(tmp_path, capsys):
    pytest.importorskip("transformers", reason="tiny models are transformers'")
    from bridge_core.testing.hf_layouts import save_published
    from bridge_core.testing.hf_models import make_model

    hf = str(save_published(make_model("qwen3_5"), tmp_path / "hf"))
    megatron, back = str(tmp_path / "m"), str(tmp_path / "back")
    given = ["--component", "language=tp=2,pp=2", "--component", "images=tp=2"]
    assert main(["import", hf, megatron, *given, "--world-size", "6", "--json"]) == 1
    assert "3 of 6 ranks" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    assert main(["import", hf, megatron, *given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "qwen3_5"
    assert main(["verify", hf, megatron]) == 0
    # An export is the same for all layouts; those that are given have to fit.
    export = ["export", megatron, back, "--source", hf]
    assert main([*export, "--component", "language=tp=3", "--component", "images"]) == 1
    assert "component language" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert main([*export, "--component", "images=tp=4", "--component", "language"]) == 0
    capsys.readouterr()
    assert main(["verify", hf, back, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == report["tensors"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
        tmp_path / "back" / "model.safetensors"
    ).read_bytes()


def test_hf_towers_are_asked_for(tmp_path, capsys):
    """A tower that is used as it is: whole on every rank, under its HF names, in plans and in checkpoints."""
    pytest.importorskip("transformers", reason="tiny models are transformers'")
    from bridge_core.checkpoint.dcp import read_dcp
    from bridge_core.testing.hf_layouts import save_published
    from bridge_core.testing.hf_models import make_model

    hf = str(save_published(make_model("qwen3_vl"), tmp_path / "hf"))
    given = ["--component", "language", "images=tp=2", "--hf-tower", "images", "--rank", "2", "--json"]
    assert main(["plan", hf, *given]) == 0
    held = {shard["param"] for shard in json.loads(capsys.readouterr().out)["shards"]}
    assert "modality_submodules.images.encoders.qwen_visual.hf.blocks.2.attn.qkv.weight" in held
    assert main(["import", hf, str(tmp_path / "m"), "--hf-tower", "images"]) == 0
    keys = read_dcp(tmp_path / "m" / "iter_0000000").tensors
    assert "modality_submodules.images.encoders.qwen_visual.hf.blocks.2.attn.qkv.weight" in keys
    assert main(["verify", hf, str(tmp_path / "m")]) == 0
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "back")]) == 0
    assert main(["verify", hf, str(tmp_path / "back")]) == 0


def test_every_stage_of_a_large_world_says_its_bytes(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra draw")
    path, picture = tmp_path / "config.json", tmp_path / "plan.svg"
    path.write_text(json.dumps(PUBLISHED["qwen3.5-397b-a17b"]), encoding="utf-8")
    given = ["--component", "images=tp=4,pp=3", "--component", "language=tp=2,pp=4,ep=32,etp=1"]
    assert main(["plan", str(path), *given, "--draw", str(picture)]) == 0
    drawn = picture.read_text(encoding="utf-8")
    for text, count in (("9.0 GB", 2), ("8.0 GB", 2), ("77.5 MB", 1), ("pp 0", 2), ("pp 3", 1)):
        assert drawn.count(f"<!-- {text}") + drawn.count(f"{text} -->") >= count, text


def test_planning_imports_nothing_heavy(config):
    """Neither torch nor megatron nor transformers, which a laptop may not have."""
    code = (
        "import sys; from bridge_mimo.cli import main; "
        f"assert main(['plan', {config!r}, *{BOTH!r}]) == 0; "
        "print(sorted({'torch', 'megatron', 'transformers', 'numpy', 'matplotlib'} & {*sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.strip() == "[]"

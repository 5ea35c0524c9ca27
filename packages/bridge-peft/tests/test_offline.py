"""Offline conversion: Megatron-Bridge's checkpoints, excluded layers, bad input, the command line."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from hf_cases import LORA, peft_adapter, tensors  # noqa: E402 - after the skips

from bridge_core.errors import BridgeError, CheckpointError, ConfigError, CoverageError  # noqa: E402
from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402
from bridge_peft import export_adapter_ckpt, import_adapter_ckpt, merge_hf  # noqa: E402
from bridge_peft.cli import main  # noqa: E402
from bridge_peft.converting.run_config import ByHand  # noqa: E402

LAYERS, HIDDEN, R = 4, 64, 4
QKV = (8 + 2 * 4) * 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return save_model(make_model("qwen3_moe"), tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def adapter(dense, tmp_path_factory):
    return peft_adapter(dense, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def ours(adapter, dense, tmp_path):
    import_adapter_ckpt(adapter, tmp_path / "ours", dense)
    return tmp_path / "ours"


def rand(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) - 0.5


def theirs(root: Path, kind: str, values, *, section=None, yaml=None) -> Path:
    """A checkpoint as Megatron-Bridge's training leaves it: saved by torch, configured by a YAML with `_target_`s."""
    import torch.distributed.checkpoint as dcp

    folder = root / "iter_0000012"
    folder.mkdir(parents=True)
    dcp.save(dict(values), storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True), no_dist=True)
    (root / "latest_checkpointed_iteration.txt").write_text("12")
    section = {"dim": R, "alpha": 8, "dropout": 0.0} if section is None else section
    lines = [f"  {name}: {value}" for name, value in section.items()]
    text = "\n".join(["model:", "  num_layers: 4", "peft:", f"  _target_: megatron.bridge.peft.{kind}", *lines])
    (folder / "run_config.yaml").write_text(text if yaml is None else yaml)
    return root


def lora(base="self_attention.linear_qkv", out=QKV, within=HIDDEN, lead=(LAYERS,), r=R):
    key = f"decoder.layers.{base}.adapter"
    return {f"{key}.linear_in.weight": rand(*lead, r, within), f"{key}.linear_out.weight": rand(*lead, out, r)}


def q_rows():
    """Rows of q in linear_qkv: two heads of every group of four."""
    return torch.cat([torch.arange(group * 64, group * 64 + 32) for group in range(4)])


@pytest.mark.parametrize("kind", ["lora.LoRA", "lora.VLMLoRA", "dora.DoRA", "canonical_lora.CanonicalLoRA"])
def test_checkpoints_of_megatron_bridge(dense, tmp_path, kind):
    key = "decoder.layers.self_attention.linear_qkv.adapter"
    if "Canonical" in kind:
        rows = {"q": 128, "k": 64, "v": 64}
        values = {f"{key}.adapter_{part}.linear_in.weight": rand(LAYERS, R, HIDDEN) for part in rows}
        values |= {f"{key}.adapter_{part}.linear_out.weight": rand(LAYERS, n, R) for part, n in rows.items()}
    else:
        values = lora()
        if "DoRA" in kind:
            values[f"{key}.weight_magnitude"] = rand(LAYERS, QKV) + 2
    run = theirs(tmp_path / "run", kind, values | {"optimizer.state.exp_avg.x.adapter.linear_in.weight": rand(3)})
    report = export_adapter_ckpt(run, tmp_path / "hf", dense)
    found = tensors(tmp_path / "hf")
    name = "base_model.model.model.layers.3.self_attn.q_proj"
    if "Canonical" in kind:
        wanted = values[f"{key}.adapter_q.linear_in.weight"][3], values[f"{key}.adapter_q.linear_out.weight"][3]
    else:
        wanted = values[f"{key}.linear_in.weight"][3], values[f"{key}.linear_out.weight"][3][q_rows()]
    assert torch.equal(found[f"{name}.lora_A.weight"], wanted[0])
    assert torch.equal(found[f"{name}.lora_B.weight"], wanted[1])
    if "DoRA" in kind:
        magnitude = values[f"{key}.weight_magnitude"][3][q_rows()]
        assert torch.equal(found[f"{name}.lora_magnitude_vector"], magnitude)
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (R, 8, "DoRA" in kind)
    assert report.read == sum(value.nbytes for key, value in values.items() if not key.startswith("optimizer"))


@pytest.mark.parametrize(("lead", "dim", "r"), [((LAYERS, 8), 4, 2), ((LAYERS,), 4, 2), ((LAYERS, 8), 6, 4)])
def test_experts_of_megatron_bridge(moe, tmp_path, lead, dim, r):
    """With an expert dim, or one adapter for all experts; with r divided by how many experts a token is sent to,
    perhaps filled up to a multiple of the ranks that cut it."""
    values = lora("mlp.experts.experts.linear_fc1", 64, HIDDEN, lead, r) | lora(r=dim)
    section = {"dim": dim, "alpha": 8, "normalize_moe_lora": "true"}
    run = theirs(tmp_path / "run", "lora.LoRA", values, section=section)
    export_adapter_ckpt(run / "iter_0000012", tmp_path / "hf", moe, target="vllm")
    found = tensors(tmp_path / "hf")
    b = values["decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_out.weight"][1]
    b = b[5] if len(lead) == 2 else b
    name = "base_model.model.model.layers.1.mlp.experts.5"
    assert torch.equal(found[f"{name}.gate_proj.lora_B.weight"], b[:32])
    assert torch.equal(found[f"{name}.up_proj.lora_B.weight"], b[32:])
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {dim, r}


def test_excluded_layers_are_not_looked_up(dense, tmp_path):
    values = lora() | {
        "mtp.layers.0.eh_proj.adapter.linear_in.weight": rand(R, HIDDEN),
        "mtp.layers.0.eh_proj.adapter.linear_out.weight": rand(HIDDEN, R),
    }
    run = theirs(tmp_path / "run", "lora.LoRA", values)
    with pytest.raises(CoverageError, match=r"mtp\.layers\.0\.eh_proj"):
        export_adapter_ckpt(run, tmp_path / "hf", dense)
    report = export_adapter_ckpt(run, tmp_path / "hf", dense, exclude_adapter_base_prefix=["mtp."])
    assert report.left_out == ("mtp.",)
    with pytest.warns(UserWarning, match="'mpt.'"):
        export_adapter_ckpt(run, tmp_path / "hf", dense, exclude_adapter_base_prefix=["mtp.", "mpt."], overwrite=True)


def test_settings_by_hand_go_before_the_file(dense, tmp_path):
    run = theirs(tmp_path / "run", "lora.LoRA", lora(), yaml="model: {}\n")
    with pytest.raises(ConfigError, match="--alpha"):
        export_adapter_ckpt(run, tmp_path / "hf", dense)
    export_adapter_ckpt(run, tmp_path / "hf", dense, by_hand=ByHand(r=R, alpha=3, rslora=True))
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (R, 3, True)


def broken(run: Path, name: str, text: str | None) -> Path:
    file = run / "iter_0000012" / name
    file.unlink() if text is None else file.write_text(text)
    return run


YAML = "peft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  dim: 4\n alpha: [\n"
BAD_CONFIGS = {
    "missing": (None, CheckpointError, r"run_config\.yaml"),
    "malformed": (YAML, CheckpointError, r"run_config\.yaml, line \d"),
    "no section": ("model: {}\n", ConfigError, "--r"),
    "unknown kind": ("peft: {_target_: a.b.MultiLoRA, dim: 4, alpha: 8}", ConfigError, r"a\.b\.MultiLoRA"),
    "code": ("peft: {_target_: os.system, dim: 4, alpha: 8}", ConfigError, r"os\.system"),
    "no rank": ("peft: {_target_: x.LoRA, alpha: 8}", ConfigError, "dim=None"),
    "another rank": ("peft: {_target_: x.LoRA, dim: 8, alpha: 8}", ConfigError, "r=8(.|\n)*r=4"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(dense, tmp_path, case):
    text, kind, message = BAD_CONFIGS[case]
    run = broken(theirs(tmp_path / "run", "lora.LoRA", lora()), "run_config.yaml", text)
    with pytest.raises(kind, match=message):
        export_adapter_ckpt(run, tmp_path / "hf", dense)
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob(".hf*"))


def without(key):
    return {name: value for name, value in lora().items() if key not in name}


BAD_TENSORS = {
    "half a pair": (without("linear_out"), CoverageError, "lora_B"),
    "other half": (without("linear_in"), CoverageError, "lora_A"),
    "none": ({"decoder.final_layernorm.weight": rand(HIDDEN)}, CheckpointError, "no adapter"),
    "other width": (lora(within=HIDDEN + 1), CoverageError, "another model"),
    "other rows": (lora(out=QKV + 16), CoverageError, "another model"),
    "other depth": (lora(lead=(LAYERS + 1,)), CoverageError, "another number of layers"),
    "other layer": (lora("self_attention.linear_q_up_proj"), CoverageError, "does not have"),
    "unknown factor": (
        {"decoder.layers.self_attention.linear_qkv.adapter.hada_w1": rand(LAYERS, R, HIDDEN)},
        CheckpointError,
        "hada_w1",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_checkpoints(dense, tmp_path, case):
    values, kind, message = BAD_TENSORS[case]
    run = theirs(tmp_path / "run", "lora.LoRA", values)
    with pytest.raises(kind, match=message):
        export_adapter_ckpt(run, tmp_path / "hf", dense)
    assert not (tmp_path / "hf").exists()


def test_bad_arguments(dense, ours, adapter, tmp_path):
    missing = tmp_path / "nowhere"
    for call in (
        lambda: export_adapter_ckpt(missing, tmp_path / "out", dense),
        lambda: import_adapter_ckpt(missing, tmp_path / "out", dense),
        lambda: merge_hf(dense, missing, tmp_path / "out"),
    ):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            call()
    for options, message in (
        ({"dtype": "int8"}, "bf16"),
        ({"target": "tgi"}, "peft-target-parameters"),
        ({"adapter_name": "other"}, "default"),
    ):
        with pytest.raises(BridgeError, match=message):
            export_adapter_ckpt(ours, tmp_path / "out", dense, **options)
    with pytest.raises(ConfigError, match="together"):
        ByHand(r=4)
    with pytest.raises(BridgeError, match="already holds"):
        import_adapter_ckpt(adapter, ours, dense)
    assert not (tmp_path / "out").exists()


def changed(source: Path, out: Path, *, config=None, drop=(), add=None) -> Path:
    from safetensors.torch import save_file

    shutil.copytree(source, out)
    held = {name: value for name, value in tensors(source).items() if not any(word in name for word in drop)}
    save_file(held | (add or {}), out / "adapter_model.safetensors", metadata={"format": "pt"})
    values = json.loads((out / "adapter_config.json").read_text()) | (config or {})
    (out / "adapter_config.json").write_text(json.dumps(values))
    return out


UNKNOWN = "base_model.model.model.layers.0.self_attn.query"
BAD_ADAPTERS = {
    "half a pair": ({"drop": ["layers.1.self_attn.q_proj.lora_B"]}, CoverageError, r"layers\.1\.self_attn\.q_proj"),
    "targeted, not there": ({"drop": ["layers.2.mlp.down_proj"]}, CoverageError, r"layers\.2\.mlp\.down_proj"),
    "unknown module": (
        {"add": {f"{UNKNOWN}.lora_A.weight": rand(4, 64), f"{UNKNOWN}.lora_B.weight": rand(64, 4)}},
        CoverageError,
        r"layers\.0\.self_attn\.query",
    ),
    "no factor": ({"add": {"base_model.model.lm_head.weight": rand(4, 64)}}, CheckpointError, r"lm_head\.weight"),
    "no LoRA": ({"config": {"peft_type": "IA3"}}, ConfigError, "IA3"),
    "bias": ({"config": {"bias": "all"}}, ConfigError, "bias"),
    "another rank": ({"config": {"r": 8}}, CheckpointError, r"\(8, 64\)"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_hf_adapters(adapter, dense, tmp_path, case):
    changes, kind, message = BAD_ADAPTERS[case]
    source = changed(adapter, tmp_path / "source", **changes)
    with pytest.raises(kind, match=message):
        import_adapter_ckpt(source, tmp_path / "out", dense)
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_model(adapter, tmp_path):
    other = save_model(make_model("qwen3", hidden_size=32), tmp_path / "other")
    with pytest.raises(CheckpointError, match="another shape"):
        import_adapter_ckpt(adapter, tmp_path / "out", other)
    shallow = save_model(make_model("qwen3", num_hidden_layers=2), tmp_path / "shallow")
    with pytest.raises(CoverageError, match="does not have"):
        import_adapter_ckpt(adapter, tmp_path / "out", shallow)
    assert not (tmp_path / "out").exists()


def test_a_value_too_large_for_the_dtype(adapter, dense, tmp_path):
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    source = changed(adapter, tmp_path / "source", add={name: tensors(adapter)[name] * 1e6})
    import_adapter_ckpt(source, tmp_path / "run", dense)
    with pytest.raises(CheckpointError, match="infinite"):
        export_adapter_ckpt(tmp_path / "run", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    export_adapter_ckpt(tmp_path / "run", tmp_path / "out", dtype="bf16")
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_what_peft_would_misplace_is_refused(moe, tmp_path):
    """On transformers 5, PEFT takes experts of all layers or of none."""
    values = lora("1.mlp.experts.experts.linear_fc2", HIDDEN, 32, (8,)) | lora()
    run = theirs(tmp_path / "run", "lora.LoRA", values)
    with pytest.raises(ConfigError, match="peft-target-parameters"):
        export_adapter_ckpt(run, tmp_path / "hf", moe)
    export_adapter_ckpt(run, tmp_path / "hf", moe, target="peft-target-parameters")
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]


def test_the_command_line(dense, adapter, tmp_path, capsys):
    run, hf, merged = tmp_path / "run", tmp_path / "hf", tmp_path / "merged"
    assert main(["import", str(adapter), str(run), "--hf-model", str(dense)]) == 0
    assert main(["inspect", str(run)]) == 0
    assert "linear_qkv.adapter.default.layers.*.lora_A" in capsys.readouterr().out
    assert main(["export", str(run), str(hf), "--dtype", "bf16", "--target", "vllm", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == 2 * LAYERS
    assert main(["inspect", str(hf), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nbytes"] == report["nbytes"]
    assert main(["merge", str(dense), str(run), str(merged)]) == 0
    assert (merged / "model.safetensors").is_file()
    prefixes = ["--exclude-adapter-base-prefix", "mtp.", "--exclude-adapter-base-prefix", "decoder.layers.0.mlp"]
    assert main(["export", str(run), str(hf), "--overwrite", *prefixes]) == 0
    assert "'mtp.'" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 1
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), str(hf), "--target", "tgi"])


def test_a_file_that_cannot_be_read_is_told_without_a_traceback(ours, tmp_path, monkeypatch, capsys):
    def unreadable(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("bridge_peft.converting.offline.find_checkpoint", unreadable)
    assert main(["export", str(ours), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "bridge-peft: a file could not be read or written" in said
    assert "Permission denied" in said
    assert str(ours) in said


def test_an_adapter_of_a_changed_base_comes_with_a_warning(dense, ours, tmp_path):
    """pissa and its like take a part out of the base: the adapter is none for the model that they started from."""
    file = ours / "iter_0000000" / "run_config.yaml"
    config = json.loads(file.read_text())
    for settings in config["bridge_peft"]["adapters"]["default"].values():
        assert settings["changes_base"] is False
        settings["changes_base"] = True
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="taken out of the base weights"):
        export_adapter_ckpt(ours, tmp_path / "hf")
    with pytest.warns(UserWarning, match="taken out of the base weights"):
        merge_hf(dense, ours, tmp_path / "merged")


def test_import_needs_to_know_the_model(adapter, tmp_path):
    source = changed(adapter, tmp_path / "source", config={"base_model_name_or_path": "org/model"})
    with pytest.raises(ConfigError, match="--hf-model"):
        import_adapter_ckpt(source, tmp_path / "out")


def test_no_lora_settings_are_lost(adapter, dense, ours, tmp_path):
    export_adapter_ckpt(ours, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == LORA["lora_alpha"] / LORA["r"]

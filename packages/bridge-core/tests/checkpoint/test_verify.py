"""`verify` and `inspect`: what they find equal, what they name, and that they read no more than they say."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hf_folders import tensors_of, write_folder, write_hf
from simulation import CONFIGS

from bridge_core.checkpoint import transfer
from bridge_core.checkpoint.convert import Options, export_ckpt, import_ckpt
from bridge_core.checkpoint.inspect import common_name, inspect, ranges
from bridge_core.checkpoint.verify import verify
from bridge_core.errors import BridgeError, CheckpointError, VerificationError

MODELS = ["llama", "llama-tied", "qwen2", "qwen3_moe", "qwen3_moe-mixed", "mixtral"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An HF folder, and the Megatron folder that it becomes."""
    root = tmp_path_factory.mktemp("verify")
    hf = write_hf(root / "hf", "qwen3_moe", files=3)
    import_ckpt(hf, root / "megatron")
    return hf, root / "megatron"


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_is_equal_in_every_pairing(tmp_path, name):
    hf = write_hf(tmp_path / "hf", name, files=2)
    import_ckpt(hf, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "back")
    sides = [hf, tmp_path / "megatron", tmp_path / "back", tmp_path / "megatron" / "iter_0000000"]
    for a in sides:
        for b in sides:
            found = verify(a, b)
            assert found.ok, (a, b, found.differences)
            assert found.nbytes == sum(array.nbytes for array in tensors_of(CONFIGS[name]).values())
            found.raise_if_different()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("side", ["hf", "megatron"])
def test_one_changed_bit_is_found_and_named(tmp_path, side, threads):
    """Whichever tensor it is in, on whichever side."""
    config = CONFIGS["qwen3_moe"]
    tensors = tensors_of(config)
    hf = write_folder(tmp_path / "hf", config, tensors)
    import_ckpt(hf, tmp_path / "megatron")
    for name in list(tensors)[:: len(tensors) // 7]:
        changed = {key: array.copy() for key, array in tensors.items()}
        flat = changed[name].reshape(-1).view(np.uint8)
        flat[-1] ^= 1
        other = write_folder(tmp_path / "other", config, changed)
        found = verify(other, hf if side == "hf" else tmp_path / "megatron", threads=threads)
        assert not found.ok
        (difference,) = found.differences
        assert (difference.kind, difference.name) == ("content", name)
        assert difference.element == tuple(n - 1 for n in tensors[name].shape)
        assert difference.a != difference.b
        assert len(difference.a) == 32
        with pytest.raises(VerificationError, match=rf"1 x content: {name}[\s\S]*fix:"):
            found.raise_if_different()


def test_a_changed_byte_in_the_megatron_folder_is_found(tmp_path, folders):
    hf, megatron = folders
    shutil.copytree(megatron, tmp_path / "megatron")
    value = tensors_of(CONFIGS["qwen3_moe"])["model.layers.2.mlp.experts.5.up_proj.weight"][3].tobytes()
    for file in (tmp_path / "megatron" / "iter_0000000").glob("*.distcp"):
        data = file.read_bytes()
        file.write_bytes(data.replace(value, value[:-1] + bytes([value[-1] ^ 128])))
    found = verify(hf, tmp_path / "megatron")
    assert [d.name for d in found.differences] == ["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert found.differences[0].element == (3, 11)


def test_names_shapes_and_dtypes_are_named_by_kind(tmp_path):
    config = CONFIGS["llama"]
    tensors = tensors_of(config)
    a = write_folder(tmp_path / "a", config, tensors)
    changed = dict(tensors)
    changed["extra.weight"] = changed.pop("lm_head.weight")
    changed["model.norm.weight"] = changed["model.norm.weight"].astype("float16")
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        changed[name] = changed[name].reshape(-1)
    b = write_folder(tmp_path / "b", config, changed)
    found = verify(a, b, limit=2)
    assert found.counts == {"only in a": 1, "only in b": 1, "shape": 4, "dtype": 1}
    assert [d.name for d in found.differences if d.kind == "shape"] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    assert next(d for d in found.differences if d.kind == "dtype")[1:4] == ("model.norm.weight", "F32", "F16")
    text = json.loads(json.dumps(found.to_dict()))
    assert text["ok"] is False
    assert text["counts"] == found.counts
    with pytest.raises(VerificationError, match=r"7 tensor\(s\)[\s\S]*only in a: lm_head\.weight[\s\S]*4 x shape"):
        found.raise_if_different()


def test_a_cast_import_differs_in_dtypes_alone(tmp_path, folders):
    hf, _ = folders
    import_ckpt(hf, tmp_path / "half", options=Options(dtype="fp16"))
    found = verify(hf, tmp_path / "half")
    assert found.counts == {"dtype": len(tensors_of(CONFIGS["qwen3_moe"]))}


def test_two_zeros_of_different_sign_differ_and_a_nan_equals_itself(tmp_path):
    config = CONFIGS["llama"]
    tensors = tensors_of(config)
    tensors["model.norm.weight"][:2] = 0.0, np.nan
    a = write_folder(tmp_path / "a", config, tensors)
    assert verify(a, a).ok
    tensors["model.norm.weight"][0] = -0.0
    b = write_folder(tmp_path / "b", config, tensors)
    assert verify(a, b).differences[0].element == (0,)


def test_patterns_choose_what_is_compared(folders):
    found = verify(*folders, names=["model.layers.1.*norm*"])
    assert found.ok
    assert found.tensors == 4
    with pytest.raises(BridgeError, match=r"no tensor[\s\S]*nothing\.like\.this"):
        verify(*folders, names=["nothing.like.this"])


def test_tensors_that_are_no_weights_may_be_missing_and_are_reported(tmp_path):
    """Old Llama folders hold `inv_freq`, which a conversion leaves out by name."""
    config = CONFIGS["llama"]
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    hf = write_folder(tmp_path / "hf", config, tensors_of(config) | {name: np.ones(2, "float32")})
    import_ckpt(hf, tmp_path / "megatron")
    found = verify(hf, tmp_path / "megatron")
    assert found.ok
    assert found.ignored == {name: "recomputed from rope_theta"}


def test_tensors_larger_than_a_block_are_compared_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STAGING", 256)
    hf = write_hf(tmp_path / "hf", "llama")
    import_ckpt(hf, tmp_path / "megatron")
    assert verify(hf, tmp_path / "megatron").ok
    tensors = tensors_of(CONFIGS["llama"])
    tensors["model.embed_tokens.weight"][30, 5] += 1
    other = write_folder(tmp_path / "other", CONFIGS["llama"], tensors)
    assert verify(tmp_path / "megatron", other).differences[0].element == (30, 5)


def test_progress_adds_up_to_the_total(folders):
    totals, steps = [], []
    found = verify(*folders, progress=steps.append, on_total=totals.append)
    assert totals == [sum(steps)] == [found.nbytes]


def test_two_hf_folders_of_an_unknown_architecture_can_be_compared(tmp_path):
    a = write_hf(tmp_path / "a", "llama")
    (a / "config.json").write_text('{"architectures": ["NobodyKnowsMe"]}')
    assert verify(a, a).ok
    described = inspect(a)
    assert described.family is None
    assert "NobodyKnowsMe" in described.note


def test_a_checkpoint_that_says_nothing_of_its_model_takes_the_other_sides_configuration(tmp_path, folders):
    hf, megatron = folders
    shutil.copytree(megatron, tmp_path / "megatron")
    (tmp_path / "megatron" / "iter_0000000" / "run_config.yaml").unlink()
    assert verify(tmp_path / "megatron", hf).ok
    with pytest.raises(BridgeError, match="does not say how its model is configured"):
        verify(tmp_path / "megatron", tmp_path / "megatron")


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_describes_both_sides(folders):
    hf, megatron = map(inspect, folders)
    elements = sum(array.size for array in tensors_of(CONFIGS["qwen3_moe"]).values())
    for described in (hf, megatron):
        assert described.family == "qwen3_moe"
        assert described.parameters == elements
        assert described.nbytes == 4 * elements
        assert described.dtypes == {"F32": elements}
        assert sum(pattern.nbytes for pattern in described.tensors) == described.nbytes
        assert described.note is None
        json.dumps(described.to_dict())
    assert (hf.kind, hf.form, len(hf.files)) == ("hf", "sharded", 3)
    assert (megatron.kind, megatron.form) == ("megatron", "stacked")
    experts = next(p for p in hf.tensors if p.name.endswith("down_proj.weight"))
    assert experts.name == "model.layers.{0-3}.mlp.experts.{0-7}.down_proj.weight"
    assert (experts.tensors, experts.dtype, experts.shape) == (32, "F32", (12, 8))


def test_inspect_reads_no_tensor_data(tmp_path, folders):
    """Data may be anything: only sizes count."""
    shutil.copytree(folders[1], tmp_path / "megatron")
    for file in (tmp_path / "megatron" / "iter_0000000").glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    assert inspect(tmp_path / "megatron") == _moved(inspect(folders[1]), tmp_path / "megatron")


def _moved(described, root):
    from dataclasses import replace

    return replace(described, path=root / "iter_0000000")


def test_inspect_says_what_could_not_be_told(tmp_path, folders):
    shutil.copytree(folders[1], tmp_path / "megatron")
    (tmp_path / "megatron" / "iter_0000000" / "run_config.yaml").unlink()
    described = inspect(tmp_path / "megatron")
    assert described.family is None
    assert "configured" in described.note
    assert described.parameters == inspect(folders[1]).parameters


def test_a_folder_that_is_no_checkpoint_is_told_apart(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(CheckpointError, match=r"not a checkpoint[\s\S]*config\.json[\s\S]*notes\.txt"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder[\s\S]*check the path"):
        inspect(tmp_path / "absent")


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (["a.0.b", "a.1.b", "a.3.b"], "a.{0-1,3}.b"),
        (["a.2.b.weight0", "a.2.b.weight1"], "a.2.b.weight{0-1}"),
        (["mlp.linear_fc1.weight"], "mlp.linear_fc1.weight"),
    ],
)
def test_names_fold_to_one(names, common):
    assert common_name(names) == common


def test_ranges():
    assert ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
    assert ranges([]) == ""

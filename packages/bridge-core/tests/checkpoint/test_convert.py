"""Offline conversion as a whole: what is written, for whom, and what is rebuilt when nothing was stored."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hf_folders import read_index, tensors_of, write_folder, write_hf
from simulation import CONFIGS

from bridge_core import AutoBridge, export_ckpt, import_ckpt
from bridge_core.checkpoint.convert import Options
from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.checkpoint.run_config import RUN_CONFIG, fields_of_args
from bridge_core.errors import CheckpointError, ConfigError
from bridge_core.families import all_families, family_for, recognise


def contents(folder) -> dict[str, bytes]:
    hf = open_hf(folder)
    return {
        name: np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset).tobytes()
        for name, tensor in hf.tensors.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_gives_the_same_files(tmp_path, name):
    hf = write_hf(tmp_path / "hf", name, files=3)
    (hf / "tokenizer.json").write_text('{"a": 1}')
    (hf / "extra").mkdir()
    (hf / "extra" / "notes.md").write_text("kept")
    (hf / "pytorch_model.bin").write_bytes(b"not carried")
    report = import_ckpt(hf, tmp_path / "megatron")
    assert report.carried == ("extra/notes.md", "tokenizer.json")
    export_ckpt(tmp_path / "megatron", tmp_path / "like", source=hf)
    for file in hf.glob("*.safetensors"):
        assert (tmp_path / "like" / file.name).read_bytes() == file.read_bytes()
    assert read_index(tmp_path / "like") == read_index(hf)
    export_ckpt(tmp_path / "megatron", tmp_path / "alone")
    assert contents(tmp_path / "alone") == contents(hf)
    written = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert written == json.loads((hf / "config.json").read_text()) | {"dtype": "float32"}
    assert (tmp_path / "alone" / "extra" / "notes.md").read_text() == "kept"
    assert not (tmp_path / "alone" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_of_a_report_are_those_of_the_tensors(tmp_path, name):
    """In both directions, whatever the files hold beside them; and those that progress is counted in."""
    hf = write_hf(tmp_path / "hf", name, files=2)
    tensors = sum(array.nbytes for array in tensors_of(CONFIGS[name]).values())
    for run, source, output in ((import_ckpt, hf, "megatron"), (export_ckpt, tmp_path / "megatron", "back")):
        steps, totals = [], []
        report = run(source, tmp_path / output, options=Options(progress=steps.append), on_total=totals.append)
        assert report.nbytes == tensors
        assert [sum(steps)] == totals == [tensors]
        assert report.moved.kernel + report.moved.gathered + report.moved.staged == tensors
        assert report.output == tmp_path / output


def test_only_the_top_config_json_is_made_anew(tmp_path):
    """One in a subfolder is a file like any other, and comes back."""
    hf = write_hf(tmp_path / "hf")
    (hf / "onnx").mkdir()
    (hf / "onnx" / "config.json").write_text('{"of": "something else"}')
    import_ckpt(hf, tmp_path / "megatron")
    report = export_ckpt(tmp_path / "megatron", tmp_path / "back")
    assert report.carried == ("onnx/config.json", "tokenizer.json")
    assert (tmp_path / "back" / "onnx" / "config.json").read_text() == '{"of": "something else"}'


def test_the_dtype_of_the_model_is_that_of_most_elements(tmp_path):
    """Five norms in fp32 are more tensors than three matrices in fp16, and fewer elements."""
    tensors = {
        name: array.astype("float32" if array.ndim == 1 else "float16")
        for name, array in tensors_of(CONFIGS["llama"]).items()
    }
    write_folder(tmp_path / "hf", CONFIGS["llama"], tensors)
    import_ckpt(tmp_path / "hf", tmp_path / "megatron")
    section = json.loads((tmp_path / "megatron" / "iter_0000000" / RUN_CONFIG).read_text())["bridge_core"]
    assert section["dtype"] == "F16"


def test_a_dtype_is_converted_and_said_in_the_configuration(tmp_path):
    hf = write_hf(tmp_path / "hf", "llama")
    import_ckpt(hf, tmp_path / "megatron", options=Options(dtype="bf16"))
    export_ckpt(tmp_path / "megatron", tmp_path / "back", options=Options(dtype="fp32"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    for name, tensor in tensors_of(CONFIGS["llama"]).items():
        expected = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert contents(tmp_path / "back")[name] == expected.tobytes(), name


def test_files_are_split_by_size(tmp_path):
    hf = write_hf(tmp_path / "hf", "qwen3")
    import_ckpt(hf, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "back", max_shard_size=8000)
    names = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert contents(tmp_path / "back") == contents(hf)


def test_tensors_that_are_fused_must_agree_in_dtype(tmp_path):
    hf = write_hf(tmp_path / "hf", "llama")
    tensors = tensors_of(CONFIGS["llama"])
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    write_folder(tmp_path / "mixed", json.loads((hf / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=r"differ in dtype[\s\S]*k_proj[\s\S]*F32[\s\S]*F16[\s\S]*--dtype"):
        import_ckpt(tmp_path / "mixed", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_is_rebuilt_from_what_any_megatron_run_config_says(tmp_path, name):
    """Without this package's own section, as in a checkpoint of Megatron-Bridge."""
    hf = write_hf(tmp_path / "hf", name)
    import_ckpt(hf, tmp_path / "megatron")
    file = tmp_path / "megatron" / "iter_0000000" / RUN_CONFIG
    config = json.loads(file.read_text())
    del config["bridge_core"]
    file.write_text(json.dumps(config))
    export_ckpt(tmp_path / "megatron", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(hf)
    rebuilt = json.loads((tmp_path / "back" / "config.json").read_text())
    family = family_for(rebuilt)
    assert family.to_megatron(rebuilt) == family.to_megatron(json.loads((hf / "config.json").read_text()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_recognises_its_own_models_alone(name):
    family = family_for(CONFIGS[name])
    assert recognise(family.to_megatron(CONFIGS[name])) is family
    assert {family.name for family in all_families()} >= {"llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"}


def test_arguments_of_plain_megatron_are_read():
    args = {
        "num_layers": 4,
        "hidden_size": 12,
        "ffn_hidden_size": 24,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 3,
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "max_position_embeddings": 64,
        "vocab_size": 37,
        "padded_vocab_size": 128,
        "untie_embeddings_and_output_weights": True,
        "rotary_base": 10000,
        "num_experts": None,
    }
    fields = fields_of_args(args)
    family = recognise(fields)
    assert family.name == "llama"
    assert family.to_hf(fields)["tie_word_embeddings"] is False
    del args["vocab_size"]
    with pytest.raises(ConfigError, match=r"padded size[\s\S]*padded_vocab_size=128[\s\S]*config.json"):
        fields_of_args(args)


def test_auto_bridge_converts_with_its_own_configuration(tmp_path):
    hf = write_hf(tmp_path / "hf", "mixtral")
    bridge = AutoBridge.from_hf_pretrained(hf)
    AutoBridge.import_ckpt(hf, tmp_path / "megatron", threads=1)
    bridge.export_ckpt(tmp_path / "megatron", tmp_path / "back", overwrite=True)
    assert contents(tmp_path / "back") == contents(hf)
    assert AutoBridge.supports(CONFIGS["mixtral"])
    assert not AutoBridge.supports({"architectures": ["Unknown"]})
    assert {tensor.dtype for tensor in bridge.plan().metadata()} == {"F32"}


def test_equal_objects_are_stored_once(tmp_path):
    """The empty extra states that mcore asks for are thousands of entries and one item."""
    import_ckpt(write_hf(tmp_path / "hf", "qwen3_moe"), tmp_path / "megatron")
    objects = read_dcp(tmp_path / "megatron" / "iter_0000000").objects
    states = [place for key, place in objects.items() if "._extra_state/" in key]
    assert len(states) > 4 * 8 * 2
    assert len(set(states)) == 1


@pytest.mark.parametrize("said", [True, False])
def test_a_release_checkpoint_is_found_as_megatron_names_it(tmp_path, said):
    hf, run = write_hf(tmp_path / "hf", "qwen3"), tmp_path / "run"
    import_ckpt(hf, run)
    (run / "iter_0000000").rename(run / "release")
    latest = run / "latest_checkpointed_iteration.txt"
    latest.write_text("release\n") if said else latest.unlink()
    export_ckpt(run, tmp_path / "back", source=hf)
    assert contents(tmp_path / "back") == contents(hf)

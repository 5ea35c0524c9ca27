"""Bad input: each case gets an error that says what, where, expected, got and what to do; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_folders import (
    change_json,
    read_index,
    tensors_of,
    write_folder,
    write_hf,
    write_index,
    write_safetensors,
)
from refusals import refused
from simulation import CONFIGS

from bridge_core.checkpoint.convert import import_ckpt
from bridge_core.checkpoint.verify import verify
from bridge_core.errors import ConfigError, UnsafeCheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def test_every_file_is_removed_in_turn(tmp_path):
    """Whatever is missing, an import refuses, and names it; the tokenizer alone may be missing."""
    whole = write_hf(tmp_path / "whole", files=2)
    for file in sorted(whole.iterdir()):
        hf = shutil.copytree(whole, tmp_path / file.name)
        (hf / file.name).unlink()
        if file.name == "tokenizer.json":
            import_ckpt(hf, tmp_path / "fine")
        else:
            refused(lambda hf=hf: import_ckpt(hf, tmp_path / "out" / "megatron"), file.name)
    assert not (tmp_path / "out").exists()


# --- HF folders: each function breaks one -------------------------------------------------------


def _weights(hf: Path, change) -> None:
    tensors = tensors_of(CONFIGS["llama"])
    change(tensors)
    shutil.rmtree(hf)
    write_folder(hf, CONFIGS["llama"], tensors)


def missing_folder(hf):
    shutil.rmtree(hf)


def a_file_for_a_folder(hf):
    shutil.rmtree(hf)
    hf.write_text("weights")


def truncated_file(hf):
    os.truncate(hf / SECOND, (hf / SECOND).stat().st_size - 10)


def truncated_header(hf):
    os.truncate(hf / SECOND, 100)


def empty_file(hf):
    (hf / SECOND).write_bytes(b"")


def bytes_after_the_end(hf):
    with open(hf / SECOND, "ab") as file:
        file.write(b"more")


def header_is_no_json(hf):
    data = bytearray((hf / FIRST).read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    (hf / FIRST).write_bytes(data)


def huge_header(hf):
    data = bytearray((hf / FIRST).read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    (hf / FIRST).write_bytes(data)


def _header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlapping_tensors(hf):
    def overlap(header):
        first, second = list(header)[:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]

    _header(hf / FIRST, overlap)


def negative_sizes(hf):
    """Two of them make a number of bytes that fits."""

    def negate(header):
        entry = next(entry for entry in header.values() if len(entry["shape"]) == 2)
        entry["shape"] = [-extent for extent in entry["shape"]]

    _header(hf / FIRST, negate)


def an_older_single_file(hf):
    shutil.copy(hf / FIRST, hf / "model.safetensors")


def unknown_dtype(hf):
    data = (hf / FIRST).read_bytes()
    (hf / FIRST).write_bytes(data.replace(b'"F32"', b'"Q32"', 1))


def index_is_no_json(hf):
    (hf / INDEX).write_text('{"weight_map": ')


def index_without_a_map(hf):
    (hf / INDEX).write_text('{"metadata": {}}')


def index_names_a_missing_file(hf):
    write_index(hf, read_index(hf) | {"model.norm.weight": "model-00003-of-00002.safetensors"})


def index_names_a_tensor_that_is_nowhere(hf):
    write_index(hf, read_index(hf) | {"model.layers.9.mlp.up_proj.weight": FIRST})


def index_lacks_a_tensor(hf):
    weight_map = read_index(hf)
    del weight_map["model.norm.weight"]
    write_index(hf, weight_map)


def index_names_the_wrong_file(hf):
    weight_map = read_index(hf)
    other = {FIRST: SECOND, SECOND: FIRST}[weight_map["model.norm.weight"]]
    write_index(hf, weight_map | {"model.norm.weight": other})


def index_leaves_the_folder(hf):
    shutil.copy(hf / FIRST, hf.parent / "elsewhere.safetensors")
    weight_map = {name: "../elsewhere.safetensors" if file == FIRST else file for name, file in read_index(hf).items()}
    write_index(hf, weight_map)


def index_names_an_absolute_path(hf):
    write_index(hf, read_index(hf) | {"model.norm.weight": str(hf / FIRST)})


def tensor_in_two_files(hf):
    tensors = tensors_of(CONFIGS["llama"])
    weight_map = read_index(hf)
    held = [name for name, file in weight_map.items() if file == FIRST]
    other = next(name for name, file in weight_map.items() if file == SECOND)
    write_safetensors(hf / FIRST, {name: tensors[name] for name in [*held, other]})


def missing_tensor(hf):
    _weights(hf, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))


def unexpected_tensor(hf):
    _weights(hf, lambda tensors: tensors.update({"model.layers.2.mlp.gate.weight": np.ones(3, "float32")}))


def wrong_shape(hf):
    name = "model.layers.1.mlp.down_proj.weight"
    _weights(hf, lambda tensors: tensors.update({name: tensors[name].T.copy()}))


def unequal_dtypes(hf):
    name = "model.layers.1.self_attn.k_proj.weight"
    _weights(hf, lambda tensors: tensors.update({name: tensors[name].astype("float16")}))


def config_is_no_json(hf):
    (hf / "config.json").write_text("{'num_layers': 4}")


def no_architecture(hf):
    change_json(hf / "config.json", architectures=None)


def unknown_architecture(hf):
    change_json(hf / "config.json", architectures=["MambaForCausalLM"])


def unknown_option(hf):
    change_json(hf / "config.json", logit_softcap=30.0)


def unknown_value(hf):
    change_json(hf / "config.json", hidden_act="gelu")


def option_is_missing(hf):
    change_json(hf / "config.json", num_attention_heads=None)


def quantised(hf):
    change_json(hf / "config.json", quantization_config={"quant_method": "fp8"})


def other_heads(hf):
    change_json(hf / "config.json", num_attention_heads=16)


def heads_without_groups(hf):
    change_json(hf / "config.json", num_key_value_heads=3)


def other_vocabulary(hf):
    change_json(hf / "config.json", vocab_size=40)


def fewer_layers(hf):
    change_json(hf / "config.json", num_hidden_layers=3)


def more_layers(hf):
    change_json(hf / "config.json", num_hidden_layers=5)


def other_width(hf):
    change_json(hf / "config.json", intermediate_size=48)


def tied_in_the_configuration_only(hf):
    change_json(hf / "config.json", tie_word_embeddings=True)


HF_CASES = {
    missing_folder: ["no such folder", "hf"],
    a_file_for_a_folder: ["hf"],
    truncated_file: ["truncated", SECOND, "bytes"],
    truncated_header: ["not a valid safetensors file", SECOND],
    empty_file: ["not a valid safetensors file", SECOND],
    bytes_after_the_end: ["after its last tensor", SECOND],
    header_is_no_json: ["not a valid safetensors file", FIRST],
    huge_header: ["not a valid safetensors file", FIRST, str(1 << 40)],
    overlapping_tensors: ["not a valid safetensors file", FIRST],
    negative_sizes: ["not a valid safetensors file", "none of a tensor"],
    an_older_single_file: ["two checkpoints", "model.safetensors", INDEX],
    unknown_dtype: ["element type", "Q32", FIRST],
    index_is_no_json: ["not valid JSON", INDEX],
    index_without_a_map: ["weight_map", INDEX],
    index_names_a_missing_file: ["missing", "model-00003-of-00002.safetensors"],
    index_names_a_tensor_that_is_nowhere: ["in no file", "model.layers.9.mlp.up_proj.weight", FIRST],
    index_lacks_a_tensor: ["index does not name", "model.norm.weight"],
    index_names_the_wrong_file: ["another file", "model.norm.weight", FIRST, SECOND],
    index_leaves_the_folder: ["outside", "../elsewhere.safetensors", INDEX],
    index_names_an_absolute_path: ["outside", INDEX],
    tensor_in_two_files: ["two files", FIRST, SECOND],
    missing_tensor: ["missing 1: model.layers.2.mlp.up_proj.weight", "config.json"],
    unexpected_tensor: ["unexpected 1: model.layers.2.mlp.gate.weight"],
    wrong_shape: ["model.layers.1.mlp.down_proj.weight", "(12, 24)", "(24, 12)"],
    unequal_dtypes: ["dtype", "model.layers.1.self_attn.k_proj.weight", "F32", "F16", "--dtype"],
    config_is_no_json: ["not valid JSON", "config.json"],
    no_architecture: ["architecture", "LlamaForCausalLM"],
    unknown_architecture: ["MambaForCausalLM", "LlamaForCausalLM", "family", "bridge_core.families"],
    unknown_option: ["logit_softcap=30.0", "ignore_options", "--ignore-option"],
    unknown_value: ["hidden_act", "'silu'", "'gelu'"],
    option_is_missing: ["num_attention_heads", "config.json"],
    quantised: ["quanti", "fp8", "dequanti"],
    other_heads: ["q_proj", "(48, 12)", "(24, 12)", "heads"],
    heads_without_groups: ["8 heads", "3 groups"],
    other_vocabulary: ["embed_tokens", "(40, 12)", "(37, 12)", "vocabulary"],
    fewer_layers: ["unexpected 9", "model.layers.3."],
    more_layers: ["missing 9", "model.layers.4."],
    other_width: ["(48, 12)", "(24, 12)"],
    tied_in_the_configuration_only: ["lm_head.weight", "not the copy", "model.embed_tokens.weight"],
}


@pytest.mark.parametrize("breaks", HF_CASES, ids=lambda breaks: breaks.__name__)
def test_a_broken_hf_folder_is_refused(tmp_path, breaks):
    hf = write_hf(tmp_path / "hf", files=2)
    breaks(hf)
    error = refused(lambda: import_ckpt(hf, tmp_path / "out" / "megatron"), *HF_CASES[breaks])
    assert not (tmp_path / "out").exists()
    assert isinstance(error, UnsafeCheckpointError) == ("outside" in str(error))


def test_the_configuration_is_not_the_folder(tmp_path):
    hf = write_hf(tmp_path / "hf")
    refused(lambda: import_ckpt(hf / "config.json", tmp_path / "out"), "in place of a folder", "config.json")


@pytest.mark.parametrize(("experts", "words"), [(6, "unexpected 24"), (10, "missing 24")])
def test_another_number_of_experts_is_refused(tmp_path, experts, words):
    hf = write_hf(tmp_path / "hf", "qwen3_moe")
    change_json(hf / "config.json", num_experts=experts)
    refused(lambda: import_ckpt(hf, tmp_path / "out" / "megatron"), words, "config.json", "experts")
    assert not (tmp_path / "out").exists()


def test_an_option_may_be_ignored_by_name(tmp_path):
    hf = write_hf(tmp_path / "hf")
    change_json(hf / "config.json", logit_softcap=30.0)
    with pytest.raises(ConfigError):
        import_ckpt(hf, tmp_path / "megatron")
    import_ckpt(hf, tmp_path / "megatron", ignore_options=["logit_softcap"])
    assert verify(hf, tmp_path / "megatron").ok

"""Bad Megatron folders: each gets an error that says what, where, expected, got and what to do; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hf_folders import write_hf
from refusals import refused

from bridge_core.checkpoint.convert import export_ckpt, import_ckpt


def _configuration(megatron: Path, **changes) -> None:
    """Change the fields that the checkpoint says its model has."""
    path = megatron / "iter_0000000" / "run_config.yaml"
    value = json.loads(path.read_text())
    value["bridge_core"]["megatron"] |= changes
    path.write_text(json.dumps(value))


def no_megatron_folder(megatron):
    shutil.rmtree(megatron)


def an_hf_folder_instead(megatron):
    shutil.rmtree(megatron)
    write_hf(megatron)


def no_metadata(megatron):
    (megatron / "iter_0000000" / ".metadata").unlink()


def truncated_metadata(megatron):
    path = megatron / "iter_0000000" / ".metadata"
    os.truncate(path, path.stat().st_size // 2)


def latest_is_no_number(megatron):
    (megatron / "latest_checkpointed_iteration.txt").write_text("newest")


def truncated_distcp(megatron):
    path = megatron / "iter_0000000" / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1000)


def missing_distcp(megatron):
    (megatron / "iter_0000000" / "__1_0.distcp").unlink()


def zeroed_distcp(megatron):
    path = megatron / "iter_0000000" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


def missing_key(megatron):
    path = megatron / "iter_0000000" / ".metadata"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"self_attention.linear_proj.weight", b"self_attention.linear_prox.weight"))


def unexpected_key(megatron):
    _configuration(megatron, share_embeddings_and_output_weights=True)


def larger_vocabulary(megatron):
    _configuration(megatron, vocab_size=64)


def other_layers(megatron):
    _configuration(megatron, num_layers=6)


def no_configuration(megatron):
    (megatron / "iter_0000000" / "run_config.yaml").unlink()


def configuration_is_no_yaml(megatron):
    (megatron / "iter_0000000" / "run_config.yaml").write_text("model: [1, 2\n")


def configuration_lacks_a_field(megatron):
    path = megatron / "iter_0000000" / "run_config.yaml"
    value = json.loads(path.read_text())
    del value["bridge_core"]["megatron"]["num_layers"]
    path.write_text(json.dumps(value))


def configuration_of_an_unknown_family(megatron):
    path = megatron / "iter_0000000" / "run_config.yaml"
    value = json.loads(path.read_text())
    value["bridge_core"]["family"] = "nobody"
    path.write_text(json.dumps(value))


MEGATRON_CASES = {
    no_megatron_folder: ["no such folder", "megatron"],
    an_hf_folder_instead: ["no torch_dist checkpoint", ".metadata", "config.json"],
    no_metadata: ["no torch_dist checkpoint", ".metadata"],
    truncated_metadata: [".metadata"],
    latest_is_no_number: ["latest_checkpointed_iteration.txt", "release"],
    truncated_distcp: ["cut short", "__0_0.distcp", "bytes"],
    missing_distcp: ["missing", "__1_0.distcp"],
    zeroed_distcp: ["__0_0.distcp"],
    missing_key: ["self_attention.linear_proj.weight", "lacks"],
    unexpected_key: ["unexpected 1: output_layer.weight"],
    larger_vocabulary: ["embedding.word_embeddings.weight", "(64, 12)", "(37, 12)"],
    other_layers: ["(6, ", "(4, "],
    no_configuration: ["configured", "run_config.yaml", "config.json"],
    configuration_is_no_yaml: ["run_config.yaml", "line"],
    configuration_lacks_a_field: ["num_layers", "run_config.yaml"],
    configuration_of_an_unknown_family: ["nobody", "llama"],
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    import_ckpt(write_hf(root / "hf"), root / "megatron")
    return root / "megatron"


@pytest.mark.parametrize("breaks", MEGATRON_CASES, ids=lambda breaks: breaks.__name__)
def test_a_broken_megatron_folder_is_refused(tmp_path, converted, breaks):
    megatron = shutil.copytree(converted, tmp_path / "megatron")
    breaks(megatron)
    refused(lambda: export_ckpt(megatron, tmp_path / "out" / "hf"), *MEGATRON_CASES[breaks])
    assert not (tmp_path / "out").exists()


def test_a_source_of_another_model_is_refused(tmp_path, converted):
    source = write_hf(tmp_path / "source", intermediate_size=48)
    refused(
        lambda: export_ckpt(converted, tmp_path / "out" / "hf", source=source),
        "ffn_hidden_size=24",
        "=48",
        "contradicts",
    )
    assert not (tmp_path / "out").exists()

"""Configurations that contradict a checkpoint, values that do not fit, outputs that would destroy something."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hf_folders import change_json, tensors_of, write_folder, write_hf
from refusals import refused
from simulation import CONFIGS

from bridge_core import export_ckpt, import_ckpt
from bridge_core.checkpoint.convert import Options
from bridge_core.checkpoint.items import save_object
from bridge_core.checkpoint.run_config import RUN_CONFIG
from bridge_core.checkpoint.verify import verify
from bridge_core.errors import BridgeError, CheckpointError, ConfigError, OutputError, UnsafeCheckpointError


@pytest.fixture
def converted(tmp_path):
    hf = write_hf(tmp_path / "hf", "llama")
    import_ckpt(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


def foreign(megatron, **changes) -> None:
    """As if another tool had written the run configuration, with some fields changed."""
    file = megatron / "iter_0000000" / RUN_CONFIG
    config = json.loads(file.read_text())
    del config["bridge_core"]
    config["model"] |= changes
    file.write_text(json.dumps(config))


def test_heads_that_keep_every_shape_are_still_compared(tmp_path, converted):
    """8 heads and 4 groups of 3, or 4 heads and 2 groups of 6: the same shapes, other weights."""
    config = CONFIGS["llama"] | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    with pytest.raises(ConfigError, match=r"contradicts[\s\S]*num_attention_heads=8[\s\S]*num_attention_heads=4"):
        export_ckpt(converted, tmp_path / "out", hf_config=config)
    foreign(converted)
    with pytest.raises(ConfigError, match="contradicts"):
        export_ckpt(converted, tmp_path / "out", hf_config=config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_smaller_vocabulary_would_drop_rows(tmp_path, converted, own):
    if not own:
        foreign(converted)
    with pytest.raises(ConfigError, match=r"vocab_size[\s\S]*37[\s\S]*30"):
        export_ckpt(converted, tmp_path / "out", hf_config=CONFIGS["llama"] | {"vocab_size": 30})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layernorm_zero_centered_gamma", True),
        ("rotary_percent", 0.5),
        ("activation_func", {"_target_": "torch.nn.functional.gelu", "_call_": False}),
        ("window_size", [127, 0]),
        ("normalization", "LayerNorm"),
    ],
)
def test_a_model_that_computes_something_else_is_no_llama(tmp_path, converted, field, value):
    foreign(converted, **{field: value})
    with pytest.raises(ConfigError, match=rf"computes something else[\s\S]*{field}"):
        export_ckpt(converted, tmp_path / "out")


def change_section(folder, **changes) -> None:
    file = folder / "iter_0000000" / RUN_CONFIG
    config = json.loads(file.read_text())
    config["bridge_core"] |= changes
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("name", "value"), [("megatron", None), ("megatron", [1]), ("hf_config", "abc"), ("family", 3)]
)
def test_a_damaged_record_is_refused_also_where_a_configuration_is_given(tmp_path, converted, name, value, given):
    change_section(converted, **{name: value})
    hf_config = CONFIGS["llama"] if given else None
    words = ("is damaged", RUN_CONFIG, f"{name}: {value!r}")
    refused(lambda: export_ckpt(converted, tmp_path / "out", hf_config=hf_config), *words)


@pytest.mark.parametrize(("name", "value"), [("num_layers", "2"), ("num_attention_heads", 0), ("vocab_size", 3.5)])
def test_sizes_that_are_no_sizes_are_refused(tmp_path, converted, name, value):
    foreign(converted, **{name: value})
    refused(lambda: export_ckpt(converted, tmp_path / "out"), "whole numbers", RUN_CONFIG, f"{name}={value!r}")


def test_a_checkpoint_without_any_record_is_exported_with_a_given_configuration(tmp_path, converted):
    """As torch.distributed.checkpoint alone writes one: neither run_config.yaml nor a common state."""
    for name in (RUN_CONFIG, "common.pt"):
        (converted / "iter_0000000" / name).unlink()
    refused(lambda: export_ckpt(converted, tmp_path / "out"), "does not say how its model is configured", "--source")
    export_ckpt(converted, tmp_path / "out", hf_config=CONFIGS["llama"])
    assert verify(tmp_path / "hf", tmp_path / "out").ok


def test_arguments_that_lack_one_are_said(tmp_path, converted):
    """Megatron-LM's own record: its arguments, without run_config.yaml."""
    (converted / "iter_0000000" / RUN_CONFIG).unlink()
    args = {"untie_embeddings_and_output_weights": True, "num_layers": 2}
    (converted / "iter_0000000" / "common.pt").write_bytes(save_object({"args": args}))
    refused(lambda: export_ckpt(converted, tmp_path / "out"), "arguments lack one", "num_attention_heads")
    export_ckpt(converted, tmp_path / "out", hf_config=CONFIGS["llama"])


def test_options_ignored_on_the_way_in_are_no_obstacle_on_the_way_out(tmp_path):
    hf = write_hf(tmp_path / "hf", "llama")
    change_json(hf / "config.json", brand_new=3)
    import_ckpt(hf, tmp_path / "megatron", ignore_options=["brand_new"])
    export_ckpt(tmp_path / "megatron", tmp_path / "out", source=hf)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["brand_new"] == 3


def test_a_value_beyond_fp16_is_an_error_not_infinity(tmp_path):
    tensors = tensors_of(CONFIGS["llama"])
    tensors["model.norm.weight"][3] = 1e6
    write_folder(tmp_path / "hf", CONFIGS["llama"], tensors)
    with pytest.raises(CheckpointError, match=r"fp16[\s\S]*65504[\s\S]*1000000"):
        import_ckpt(tmp_path / "hf", tmp_path / "megatron", options=Options(dtype="fp16"))
    assert not (tmp_path / "megatron").exists()


def test_padding_that_is_left_out_is_reported(tmp_path, converted):
    folder = write_folder(tmp_path / "padded", CONFIGS["llama"] | {"vocab_size": 48}, padded_tensors())
    import_ckpt(folder, tmp_path / "with-padding")
    foreign(tmp_path / "with-padding", vocab_size=37)
    report = export_ckpt(tmp_path / "with-padding", tmp_path / "out")
    assert "embedding.word_embeddings.weight, last 11 rows" in report.ignored
    assert not export_ckpt(converted, tmp_path / "exact").ignored


def padded_tensors() -> dict[str, np.ndarray]:
    tensors = tensors_of(CONFIGS["llama"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.concatenate([tensors[name], np.zeros((11, 12), np.float32)])
    return tensors


def test_an_export_does_not_replace_its_own_source(tmp_path, converted):
    (tmp_path / "models").mkdir()
    hf = write_hf(tmp_path / "models" / "q", "llama")
    with pytest.raises(OutputError, match="would replace"):
        export_ckpt(converted, tmp_path / "models", source=hf, options=Options(overwrite=True))
    assert (hf / "config.json").exists()


def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path, converted):
    target = write_hf(tmp_path / "target", "qwen3")
    (tmp_path / "link").symlink_to(target)
    export_ckpt(converted, tmp_path / "link", options=Options(overwrite=True))
    assert (tmp_path / "link").is_symlink()
    assert json.loads((target / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert not list(tmp_path.glob(".*"))


def test_the_working_directory_cannot_be_replaced(tmp_path, converted, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="working directory"):
        export_ckpt(converted, ".")


def test_a_carried_link_may_not_leave_the_folder(tmp_path):
    hf = write_hf(tmp_path / "hf", "llama")
    (tmp_path / "secret.txt").write_text("not yours")
    (hf / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UnsafeCheckpointError, match=r"leaves the folder[\s\S]*notes.txt"):
        import_ckpt(hf, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_hub_caches_links_are_followed(tmp_path):
    hf = write_hf(tmp_path / "model" / "snapshots" / "abc", "llama")
    (tmp_path / "model" / "blobs").mkdir()
    os.rename(hf / "tokenizer.json", tmp_path / "model" / "blobs" / "1f")
    (hf / "tokenizer.json").symlink_to("../../blobs/1f")
    assert import_ckpt(hf, tmp_path / "megatron").carried == ("tokenizer.json",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": "4"}, "num_hidden_layers[\\s\\S]*'4'"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads[\\s\\S]*0"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"architectures": "LlamaForCausalLM"}, "as a list"),
        ({"architectures": 5}, "as a list"),
    ],
)
def test_values_of_the_wrong_kind_are_errors_of_the_configuration(tmp_path, changes, words):
    hf = write_hf(tmp_path / "hf", "llama")
    change_json(hf / "config.json", **changes)
    with pytest.raises(BridgeError, match=words):
        import_ckpt(hf, tmp_path / "megatron")


def test_threads_must_be_at_least_one():
    with pytest.raises(ConfigError, match="at least 1"):
        Options(threads=0)

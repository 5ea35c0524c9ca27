"""Qwen3-VL as transformers and its publisher save it: offline and back, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_core import AutoBridge, export_ckpt, import_ckpt
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.errors import ConfigError, CoverageError
from bridge_core.plan import compile_entries
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model, save_model

pytest.importorskip("torch", reason="small models are made with torch")
pytest.importorskip("transformers", reason="small models are made with transformers")

EXPERTS = "decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}"


def contents(folder) -> dict[str, tuple]:
    return {
        name: (t.dtype, t.shape, np.fromfile(t.path, np.uint8, t.nbytes, offset=t.offset).tobytes())
        for name, t in open_hf(folder).tensors.items()
    }


@pytest.mark.parametrize("save", [save_published, save_model], ids=["published", "transformers"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_a_round_trip_keeps_every_bit_in_either_form(tmp_path, name, save):
    hf = save(make_model(name), tmp_path / "hf")
    report = import_ckpt(hf, tmp_path / "megatron")
    assert not report.ignored
    export_ckpt(tmp_path / "megatron", tmp_path / "alone")
    export_ckpt(tmp_path / "megatron", tmp_path / "like", source=hf)
    assert contents(tmp_path / "alone") == contents(tmp_path / "like") == contents(hf)


def test_the_published_orientation_is_written_when_nothing_says_otherwise(tmp_path):
    hf = save_published(make_model("qwen3_vl_moe"), tmp_path / "hf")
    bridge = AutoBridge.from_hf_pretrained(hf)
    own = bridge.plan().entry(EXPERTS)
    unsaid = AutoBridge.from_hf_config(bridge.config).plan().entry(EXPERTS)
    assert own.hf == unsaid.hf
    assert (own.form, unsaid.form) == (0, 0)


def test_a_square_matrix_is_told_by_its_neighbour_and_never_guessed(tmp_path):
    """Gate and up as wide as the model fit either way round; the down projection says which it is."""
    bridge = AutoBridge.from_hf_pretrained(save_published(make_model("qwen3_vl_moe"), tmp_path / "hf"))
    fields = bridge.fields | {"moe_ffn_hidden_size": bridge.fields["hidden_size"] // 2}
    for form in (0, 1):
        entries = compile_entries(
            bridge.family, fields, forms={n: form for n in bridge.family.table(fields) if "experts" in n}
        )
        shapes = {name: tensor.shape for entry in entries for name, tensor in entry.hf_names()}
        again = compile_entries(bridge.family, fields, inventory=shapes)
        assert {entry.form for entry in again if entry.is_expert} == {form}
        without_down = {name: shape for name, shape in shapes.items() if "down_proj" not in name}
        with pytest.raises(CoverageError, match="several forms"):
            compile_entries(bridge.family, fields, inventory=without_down)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act"),
        ("vision_config", {"window_size": 7}, "vision_config.window_size"),
        ("text_config", {"attention_bias": True}, "text_config.attention_bias"),
        ("text_config", {"use_sliding_window": True}, "sliding-window"),
        (None, {"audio_token_id": 5}, "audio_token_id"),
        (None, {"vision_config": None}, "vision_config"),
    ],
)
def test_an_option_that_is_not_translated_is_named(tmp_path, part, changes, words):
    config = AutoBridge.from_hf_pretrained(save_model(make_model("qwen3_vl"), tmp_path / "hf")).config
    changed = config | changes if part is None else config | {part: config[part] | changes}
    with pytest.raises(ConfigError, match=words):
        AutoBridge.from_hf_config(changed)

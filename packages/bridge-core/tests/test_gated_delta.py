"""Qwen3-Next and Qwen3.5: what is on disk, in every layout in which it is published, and back again to the bit."""

from __future__ import annotations

import json
import re

import pytest

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt, verify
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.errors import BridgeError, ConfigError, CoverageError
from bridge_core.families import recognise
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model, save_model

torch = pytest.importorskip("torch", reason="the oracle is transformers")
pytest.importorskip("transformers", reason="the oracle is transformers")

MODELS = [
    "qwen3_next",
    "qwen3_next-mixed",
    "qwen3_5-text",
    "qwen3_5",
    "qwen3_5-tied",
    "qwen3_5_moe-text",
    "qwen3_5_moe",
]
MTP_TENSORS = {"qwen3_next": 3 * 8 + 17, "qwen3_5": 15, "qwen3_5_moe": 3 * 8 + 17}  # 8 experts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of each model, by its name and who saved it."""
    made = {}

    def save(name, by):
        if (name, by) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{by}") / "hf"
            model = make_model(name)
            if by == "transformers":
                save_model(model, folder, max_shard_size="200KB")
            else:
                save_published(model, folder, mtp=by == "publisher")
            made[name, by] = folder
        return made[name, by]

    return save


@pytest.mark.parametrize("by", ["transformers", "publisher", "publisher-without-mtp"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(saved, tmp_path, name, by):
    folder = saved(name, by)
    report = import_ckpt(folder, tmp_path / "megatron")
    assert not report.ignored
    export_ckpt(tmp_path / "megatron", tmp_path / "like", source=folder)
    for file in folder.glob("*.safetensors*"):
        assert (tmp_path / "like" / file.name).read_bytes() == file.read_bytes(), file.name
    # Without the source its forms are known from the import.
    export_ckpt(tmp_path / "megatron", tmp_path / "alone")
    verify(folder, tmp_path / "alone").raise_if_different()
    assert set(open_hf(folder).tensors) == set(open_hf(tmp_path / "alone").tensors)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "like"))
    assert after == before | {"dtype": "float32"}


@pytest.mark.parametrize("name", MTP_TENSORS)
def test_prediction_layers_can_be_left_out(saved, tmp_path, name):
    folder = saved(name, "publisher")
    mtp = {key for key in open_hf(folder).tensors if key.startswith("mtp.")}
    assert len(mtp) == MTP_TENSORS[name]
    report = import_ckpt(folder, tmp_path / "megatron", ignore=["mtp.*"])
    assert set(report.ignored) == mtp
    export_ckpt(tmp_path / "megatron", tmp_path / "hf")
    assert set(open_hf(tmp_path / "hf").tensors) == set(open_hf(folder).tensors) - mtp
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not config.get("text_config", config).get("mtp_num_hidden_layers")

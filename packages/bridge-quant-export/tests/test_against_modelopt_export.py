"""Exports beside ModelOpt's own Hugging Face export of a Megatron model, where that is right: on one rank."""

from __future__ import annotations

import json

import pytest
import torch
from quant_cases import same_bytes
from quant_models import make
from quantising import MIXED
from safetensors.torch import load_file
from saved_jobs import export_with_modelopt

pytest.importorskip("megatron.core", reason="live models need megatron-core")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")

# All that its exporter writes with a configuration (unified_export_megatron.py, 0.47). In fp32: in bf16 its FP8 rounds
# twice, which test_against_modelopt.py shows.
NAMES = ["fp8", "nvfp4", "w4a16_nvfp4", MIXED]
PADDED = ("lm_head.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_the_folder_is_that_of_modelopt(rank_pool, tmp_path, model):
    path = make(model, tmp_path / "hf", num_hidden_layers=2)
    rank_pool.run(export_with_modelopt, str(path), str(tmp_path), NAMES, ranks=[0])
    for name in NAMES:
        ours = load_file(tmp_path / name / "model.safetensors")
        theirs = {}
        for file in (tmp_path / f"{name}-theirs").glob("*.safetensors"):
            theirs |= load_file(file)
        assert theirs.keys() == ours.keys()
        for key, tensor in ours.items():
            if key in PADDED:
                # Difference: it writes the rows that pad the vocabulary.
                assert len(theirs[key]) > len(tensor)
                assert torch.equal(theirs[key][: len(tensor)], tensor)
            else:
                assert same_bytes(tensor, theirs[key]), (name, key)
        for file, part in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
            said, expected = (
                json.loads((tmp_path / folder / file).read_text())[part] for folder in (name, f"{name}-theirs")
            )
            assert said == expected, (name, file)

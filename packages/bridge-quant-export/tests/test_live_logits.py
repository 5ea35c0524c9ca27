"""From Hugging Face to Megatron on two ranks, quantised by ModelOpt, exported, and loaded by transformers."""

from __future__ import annotations

import pytest
import torch
from logits_jobs import calibrate_and_export
from quant_models import make

pytest.importorskip("megatron.core", reason="live models need megatron-core")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")
transformers = pytest.importorskip("transformers", reason="the reader that runs on a CPU")
pytest.importorskip("compressed_tensors", reason="transformers needs it to read the export")

TOKENS = torch.tensor([[3, 17, 91, 130, 5, 64, 64, 2, 77, 11, 40, 8]])

# Norm of the difference of all logits, relative to theirs; in fp32. Where ModelOpt's fake quantisation multiplies with
# the reciprocal of the scale, and packing divides by the scale, a code rounds otherwise here and there.
TOLERANCES = {
    "fp8": 1e-4,
    "fp8_channel": 1e-5,
    "fp8_block": 1e-4,
    "int4": 1e-5,
    "int8_weight_only": 1e-4,
    "int8": 1e-4,
    "nvfp4": 1e-2,  # as below
    "w4a16_nvfp4": 1e-2,  # compressed-tensors unpacks it to bf16
    "mxfp8": 1e-5,
    "mxfp4": 1e-5,
}


def test_logits_agree_with_fake_quantised_weights(rank_pool, tmp_path):
    folder = make("qwen3", tmp_path / "hf")
    results = rank_pool.run(
        calibrate_and_export, str(folder), {"tp": 2}, str(tmp_path), list(TOLERANCES), TOKENS, ranks=[0, 1]
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        unquantised = plain(TOKENS).logits
    found = {}
    for number, name in enumerate(TOLERANCES):
        parts = [logits for _, logits in sorted((rank[number] for rank in results), key=lambda part: part[0])]
        megatron = torch.cat(parts, dim=-1)[..., : unquantised.shape[-1]]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name,
            dtype=torch.float32,
            # Weights are unpacked; inputs are not quantised, as in the Megatron model here.
            quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
        ).eval()
        with torch.no_grad():
            logits = loaded(TOKENS).logits
        found[name] = ((logits - megatron).norm() / megatron.norm()).item()
        # The comparison sees more than rounding: without quantisation the logits are further away.
        assert (unquantised - megatron).norm() / megatron.norm() > 3 * found[name]
    assert all(found[name] <= limit for name, limit in TOLERANCES.items()), found

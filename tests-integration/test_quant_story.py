"""A tiny model with experts from Hugging Face to two ranks, quantised by ModelOpt, exported, and loaded again."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("modelopt.torch.quantization")
pytest.importorskip("compressed_tensors")

from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402 - after the skips
from bridge_core.testing.ranks import RankPool  # noqa: E402

TOKENS = torch.arange(48).view(1, -1) * 29 % 131
WRITERS = ("modelopt", "compressed-tensors")


def quantise_and_export(path: str, out: str):
    """Each of two ranks holds half of the experts: calibrate, export, and compute with the quantised weights."""
    import copy
    import warnings

    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build, forward
    from bridge_quant_export import export_quantized, prepare_for_modelopt

    warnings.simplefilter("ignore")
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend(), torch.no_grad():
        layout = {"dp": 2, "ep": 2, "moe_grouped_gemm": False}
        _, groups, chunks = build(bridge.fields, layout, spec="host")
        bridge.load_hf_weights(chunks)
        model = chunks[0].eval()
        prepare_for_modelopt([model], groups)
        mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda chunk: forward([chunk], groups, TOKENS))
        reports = [
            export_quantized(
                [model],
                f"{out}/{writer}",
                bridge=bridge,
                groups=groups,
                format=writer,
                uncalibrated="peers",  # an expert that none of these tokens reached
                max_shard_size=200_000,
            )
            for writer in WRITERS
        ]
        mtq.fold_weight(model)
        for module in model.modules():
            if isinstance(module, TensorQuantizer):
                module.disable()
        return [dict(report.formats) for report in reports], forward([model], groups, TOKENS)


def load_and_compute(path: str):
    """A packed checkpoint on two ranks again, dequantised; this rank's logits."""
    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build, forward

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend(), torch.no_grad():
        _, groups, chunks = build(bridge.fields, {"tp": 2}, spec="host")
        bridge.load_hf_weights(chunks)
        return forward([chunks[0].eval()], groups, TOKENS)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_from_hugging_face_to_serving_and_back(tmp_path, capsys):
    from bridge_core import AutoBridge
    from bridge_quant_export.cli import main

    base = save_model(make_model("qwen3_moe"), tmp_path / "base")
    fields = AutoBridge.from_hf_pretrained(base).fields
    layers, experts = fields["num_layers"], fields["num_moe_experts"]
    with RankPool(2, timeout_s=200) as pool:
        (formats, logits), (_, others) = pool.run(quantise_and_export, str(base), str(tmp_path))
        assert formats == [{"fp8": layers * (4 + 3 * experts)}] * 2
        torch.testing.assert_close(others, logits, rtol=0, atol=1e-5)
        again = pool.run(load_and_compute, str(tmp_path / "modelopt"))

    # Both folders are sound, near the original, and each other's weights.
    for writer in WRITERS:
        assert main(["verify", str(tmp_path / writer), "--original", str(base), "--tolerance", "0.1"]) == 0
        assert (tmp_path / writer / "model.safetensors.index.json").exists()
    assert "0 contradiction" not in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "compressed-tensors"), "--original", str(tmp_path / "modelopt")]) == 0

    # transformers reads the one, Megatron the other: the logits of the quantised model, and not of the original.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "compressed-tensors",
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    ).eval()
    original = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs, plain = loaded(TOKENS).logits, original(TOKENS).logits
    assert distance(theirs, logits) < 1e-3
    assert distance(torch.cat(again, dim=-1)[..., : logits.shape[-1]], logits) < 1e-3
    assert distance(plain, logits) > 1e-2

"""Fine-tune a tiny model with experts on two ranks, save, export, load in PEFT: the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402 - after the skips
from bridge_core.testing.ranks import RankPool  # noqa: E402

STEPS, LENGTH, VOCAB = 50, 16, 131


def batch():
    """Tokens and labels [1, LENGTH] of one sequence."""
    sequence = torch.arange(LENGTH + 1) * 11 % VOCAB
    return sequence[:-1].view(1, -1), sequence[1:].view(1, -1)


def fine_tune(path: str, run: str):
    """Each of two ranks holds half of the experts: train adapters, save them; losses and logits of this rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build, forward
    from bridge_peft import LoraConfig, apply_lora, save_adapter_ckpt

    with host_backend():
        bridge = AutoBridge.from_hf_pretrained(path)
        _, groups, chunks = build(bridge.fields, {"dp": 2, "ep": 2}, spec="host")
        bridge.load_hf_weights(chunks)
        apply_lora(chunks, LoraConfig(r=4, lora_alpha=8), groups)
        config = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
        model = DistributedDataParallel(chunks[0].config, config, chunks[0], pg_collection=groups)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        tokens, labels = batch()
        losses = []
        for _ in range(STEPS):
            model.zero_grad_buffer()
            logits = forward([model], groups, tokens)
            loss = torch.nn.functional.cross_entropy(logits[0].float(), labels[0])
            loss.backward()
            finalize_model_grads([model], pg_collection=groups)
            for parameter in trained:
                parameter.grad = parameter.main_grad
            optimizer.step()
            losses.append(loss.item())
        save_adapter_ckpt(chunks, run, bridge, iteration=STEPS)
        with torch.no_grad():
            return losses, forward([chunks[0].eval()], groups, tokens)


def test_lora_from_training_to_peft(tmp_path):
    from bridge_peft.cli import main

    base = save_model(make_model("qwen3_moe"), tmp_path / "base")
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    with RankPool(2, timeout_s=200) as pool:
        (losses, logits), (_, others) = pool.run(fine_tune, str(base), str(run))
    assert losses[-1] < losses[0] / 2
    torch.testing.assert_close(others, logits, rtol=0, atol=1e-5)

    assert main(["export", str(run), str(adapter), "--hf-model", str(base)]) == 0
    assert {file.name for file in Path(adapter).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens, labels = batch()
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
        theirs = loaded(tokens).logits
    torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(theirs[0], labels[0]).item()
    assert loss < losses[0] / 2

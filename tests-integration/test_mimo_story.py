"""Fine-tune the language model of a tiny vision-language model on ranks of its own; load all of it in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core.models.mimo.comm")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bridge_core.testing.hf_layouts import save_published  # noqa: E402 - after the skips
from bridge_core.testing.hf_models import make_model  # noqa: E402
from bridge_core.testing.ranks import RankPool  # noqa: E402

STEPS, VOCABULARY, IMAGE = 40, 131, 120
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 8]])
MIMO = {"language": {"tp": 2, "dp": 1}, "images": {"dp": 2}}


def batch(model):
    """Two texts of 15 tokens, each with an image of four; what to predict; where tokens and pixels are."""
    text = torch.arange(32).view(2, 16) * 7 % 110
    for row, first in enumerate((3, 8)):
        text[row, first : first + 4] = IMAGE
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    labels = labels.masked_fill(labels == IMAGE, -100)
    size = model.config.vision_config.in_channels * 2 * model.config.vision_config.patch_size**2
    pixels = torch.randn(int(GRIDS.prod(1).sum()), size, generator=torch.Generator().manual_seed(5))
    kinds = (tokens == IMAGE).int()
    positions, _ = model.model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=GRIDS)
    return {"tokens": tokens, "labels": labels, "pixels": pixels, "kinds": kinds, "positions": positions}


def fine_tune(path: str, given, out: str, adapter: str):
    """Ranks 0 and 1 hold the language model, 2 and 3 the tower. Losses and logits [2, 15, V / 2] of this rank."""
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_mimo import ComponentLayout, MegatronMIMOBridge
    from bridge_mimo.runtime.provider import wrap_in_ddp
    from bridge_peft import LoraConfig, apply_lora, save_hf_adapter

    with host_backend():
        layouts = {name: ComponentLayout(**sizes) for name, sizes in MIMO.items()}
        bridge = MegatronMIMOBridge.from_hf_pretrained(path, parallelism=layouts, world_size=dist.get_world_size())
        model = bridge.to_megatron_model(spec="host")
        groups = model.mimo_groups

        passed = [None]
        if "images" in groups.mine:
            images = {"images": {"qwen_visual": {"pixel_values": given["pixels"], "grid_thw": GRIDS}}}
            with torch.no_grad():
                passed = [model(given["tokens"], modality_inputs=images)[0]["images"]]
        dist.broadcast_object_list(passed, src=groups.layouts["images"].ranks.start)  # a tower that is not trained

        losses, logits = [], None
        if "language" in groups.mine:
            mine = groups.mine["language"]
            apply_lora(model.language_model, LoraConfig(r=4, lora_alpha=8), mine)
            wrap_in_ddp(model)
            losses, logits = train(model, mine, given, passed[0])
            # Adapters are those of the language model: its ranks alone write them.
            save_hf_adapter(model, adapter, AutoBridge.from_hf_pretrained(path), base_model=out, group=mine.mp)
        bridge.save_hf_pretrained(model, out)  # the base; adapters on it are left alone
    return losses, logits


def train(model, groups, given, embeddings):
    """A few steps of the adapters: the loss of each, and the logits after the last."""
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def forward():
        model.set_input_tensor([{"images": embeddings}])
        return model(given["tokens"], given["positions"])[0]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    known = given["labels"] >= 0
    losses = []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        each = vocab_parallel_cross_entropy(forward().float(), given["labels"].clamp(min=0), tp_group=groups.tp)
        loss = each[known].mean()
        loss.backward()
        finalize_model_grads([model.language_model], pg_collection=groups)
        for parameter in trained:
            parameter.grad = parameter.main_grad
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return losses, forward()


def test_a_language_model_is_trained_beside_its_tower(tmp_path):
    ids = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    original = make_model("qwen3_vl", **ids)
    base, out, adapter = save_published(original, tmp_path / "base"), tmp_path / "out", tmp_path / "adapter"
    given = batch(original)
    with RankPool(4, timeout_s=300) as pool:
        results = pool.run(fine_tune, str(base), given, str(out), str(adapter))
    (losses, one), (same, other), *towers = results
    assert losses == same
    assert losses[-1] < losses[0] / 2
    assert towers == [([], None)] * 2
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert {file.name for file in Path(adapter).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    model = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, str(adapter)).eval()(
            input_ids=given["tokens"],
            position_ids=given["positions"],
            pixel_values=given["pixels"],
            image_grid_thw=GRIDS,
            mm_token_type_ids=given["kinds"],
        )
    trained = torch.cat((one, other), dim=-1)[..., :VOCABULARY]
    torch.testing.assert_close(theirs.logits, trained, rtol=0, atol=1e-4)

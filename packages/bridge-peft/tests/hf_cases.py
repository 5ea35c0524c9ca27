"""Tiny HF models, adapters for them, and what PEFT makes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 131
LORA = {"r": 4, "lora_alpha": 8}


def tokens():
    """One sequence [1, 16]."""
    import torch

    return torch.arange(16).view(1, -1) * 7 % VOCAB


def base(path: str | Path):
    """The transformers model of a folder, in float32."""
    import json

    import torch
    import transformers

    (name,) = json.loads((Path(path) / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(path, dtype=torch.float32).eval()


def peft_logits(path: str | Path, adapter: str | Path):
    """Logits of PEFT's model, after checks that it took every tensor of the adapter and made up none."""
    import torch
    from peft import PeftModel

    model = base(path)
    with torch.no_grad():
        plain = model(tokens()).logits
        loaded = PeftModel.from_pretrained(model, str(adapter)).eval()
        values = [value for name, value in loaded.named_parameters() if "lora_" in name]
        logits = loaded(tokens()).logits
    assert values
    assert all(value.abs().max() > 0 for value in values)  # PEFT makes B of zeros where a file has none
    assert (logits - plain).abs().max() > 0.1
    return logits


def whole(answers: list[dict[str, Any]]):
    """Logits of the whole vocabulary from those of the ranks of the last stage."""
    import torch

    parts = {answer["tp"]: answer["logits"] for answer in answers if answer["logits"] is not None}
    return torch.cat([parts[rank] for rank in sorted(parts)], dim=-1)[..., :VOCAB]


def peft_adapter(path: str | Path, out: str | Path, **options: Any) -> Path:
    """An adapter as PEFT makes and saves it, with distinct values in every factor."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(path), LoraConfig(**LORA | options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator))
            elif "lora_" in name:
                value.copy_((torch.rand(value.shape, generator=generator) - 0.5) * 0.4)
    model.save_pretrained(str(out))
    return Path(out)


def tensors(folder: str | Path) -> dict[str, Any]:
    """The tensors of an adapter folder."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")

"""Checkpoints in fp8 blocks, quantised and read with plain torch operations: the oracle of the codec.

Nothing here comes from the package: formulas are those of the publisher's kernels, written for whole tensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model

LINEAR = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
BLOCK = (16, 12)
OPTIONS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def spread(scales: torch.Tensor, shape, block) -> torch.Tensor:
    """One scale per element."""
    rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def dequantise(codes: torch.Tensor, scales: torch.Tensor, block=BLOCK) -> torch.Tensor:
    """`weight_dequant`: to float32, times the scale, to bfloat16."""
    return (codes.to(torch.float32) * spread(scales, codes.shape, block)).to(torch.bfloat16)


def quantise(weight: torch.Tensor, block=BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix, block by block."""
    grid = [-(-n // size) for n, size in zip(weight.shape, block, strict=True)]
    scales = torch.empty(grid)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            values = weight[part].float()
            scale = values.abs().max() / 448
            scales[i, j] = scale if scale > 0 else 1
            codes[part] = (values / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def quantised_tensors(tensors: dict[str, torch.Tensor], block=BLOCK) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint with its linears quantised, each with its scales."""
    found = {}
    for name, tensor in tensors.items():
        if LINEAR.search(name):
            found[name], found[name.removesuffix("weight") + "weight_scale_inv"] = quantise(tensor, block)
        else:
            found[name] = tensor
    return found


def write_fp8(folder: Path, name: str = "deepseek_v3", *, files: int = 3, block=BLOCK, **changes) -> Path:
    """A small model in bfloat16 (its expert bias in float32), published in fp8 blocks over several files.

    The model's tensors that are not quantised are those of `plain`, a folder beside it.
    """
    plain = save_published(make_model(name, **changes), folder.parent / "plain")
    tensors = load_file(plain / "model.safetensors")
    tensors = {n: t if n.endswith("correction_bias") else t.to(torch.bfloat16) for n, t in tensors.items()}
    tensors = quantised_tensors(tensors, block)
    folder.mkdir(parents=True)
    config = json.loads((plain / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": OPTIONS | {"weight_block_size": list(block)}}
    (folder / "config.json").write_text(json.dumps(config))
    # Dealt out one by one, so that weights and their scales are in different files.
    names, weight_map = list(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({n: tensors[n] for n in names[number::files]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def as_read(tensors: dict[str, torch.Tensor], block=BLOCK) -> dict[str, torch.Tensor]:
    """Tensors of a quantised folder with its weights dequantised and without scales."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            found[name] = dequantise(tensor, tensors[name.removesuffix("weight") + "weight_scale_inv"], block)
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

"""Folders of small models with packed weights, and the same folders with the weights that those stand for."""

from __future__ import annotations

import json
import re
import shutil

import torch
from quant_cases import calibration
from safetensors.torch import load_file, save_file

from bridge_quant_export.configs import compressed_tensors, modelopt
from bridge_quant_export.configs.layers import QuantizedLayers
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.packing import pack, unpack

LINEAR = re.compile(r"\.(self_attn|mlp)\..*_proj\.weight$")


def write_packed(plain, out, format_for, writer, *, dtype="bfloat16", kv=False):
    """Pack the linears of a plain folder; `out/packed` and `out/read`, which holds what the packed ones stand for.

    Args:
        plain: an HF folder in one file.
        format_for: the format's name for a layer's name.
        writer: the checkpoint format.
        dtype: the model's dtype, as config.json has it.
        kv: with KV scales.
    """
    kept, read, quantized = {}, {}, {}
    presented = getattr(torch, dtype)
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not LINEAR.search(name):
            kept[name] = read[name] = tensor.to(presented)
            continue
        format = quantized[module] = format_of(format_for(module))
        known = calibration(format, tensor)
        made = pack(tensor, known, format=format, writer=writer, where=module)
        kept |= {f"{module}.{suffix}": value for suffix, value in made.items()}
        values = unpack(made, format=format, writer=writer)
        if "pre_quant_scale" in made:
            values = values * made["pre_quant_scale"].float()
        read[name] = values.to(presented)
    if kv:
        at = "self_attn.{0}_proj.{0}_scale" if writer == "modelopt" else "self_attn.{0}_scale"
        kept |= {f"model.layers.0.{at.format(which)}": torch.tensor([1.5]) for which in "kv"}
    layers = QuantizedLayers(
        quantized=quantized, unquantized=frozenset({"lm_head", "model.embed_tokens"}), fp8_kv_cache=kv
    )
    beside = None
    if writer == "modelopt":
        inline, beside = modelopt.compose(layers, producer_version="0.47.0")
    else:
        inline = compressed_tensors.compose(layers)
    config = json.loads((plain / "config.json").read_text()) | {"dtype": dtype}
    for folder, tensors, said in ((out / "packed", kept, {"quantization_config": inline}), (out / "read", read, {})):
        shutil.copytree(plain, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | said))
    if beside is not None:
        (out / "packed" / "hf_quant_config.json").write_text(json.dumps(beside))
    return out / "packed", out / "read"


def change(folder, edit, config=None):
    """Edit the tensors of a folder, and its `quantization_config`."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        said = json.loads((folder / "config.json").read_text())
        config(said["quantization_config"])
        (folder / "config.json").write_text(json.dumps(said))


def same_tensors(one, other):
    """Raise unless two folders hold the same tensors, to the bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name

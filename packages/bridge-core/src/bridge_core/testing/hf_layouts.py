"""Small models in the layout that publishers use on disk, where transformers' `save_pretrained` writes another.

transformers writes packed experts of Qwen3.5 one by one, and drops prediction layers, which it does not hold. The names
are those of the published files (headers of Qwen3.5, Qwen3-Next, Nemotron-3-Super and DeepSeek-V3) and of transformers
5.23 (`conversion_mapping`, "MtpModel").
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.testing.hf_models import fill_distinct

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Tensors = dict[str, "Tensor"]

PACKED = ("qwen3_5_moe",)
"""Model types whose experts lie on disk as transformers holds them."""

TRANSPOSED = ("qwen3_vl_moe",)
"""Model types whose experts lie on disk [expert, in, out]: transformers turns them when it loads, not when it saves."""


def save_published(model: PreTrainedModel, folder: Path, *, mtp: bool = True) -> Path:
    """Save a model as its publisher would: one safetensors file and config.json.

    Args:
        model: of `make_model`.
        folder: made if it is not there.
        mtp: add one depth of prediction layers, with weights of their own, where the family has such.
    """
    from safetensors.torch import save_file

    tensors = disk_tensors(model)
    options: dict[str, Any] = {}
    if mtp:
        more, options = prediction_layers(model)
        tensors |= more
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    text = config.get_text_config()
    for name, value in options.items():
        setattr(text, name, value)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def disk_tensors(model: PreTrainedModel) -> Tensors:
    """The model's own tensors under their names on disk, without copies of tied ones."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    kind = model.config.model_type
    if kind in TRANSPOSED:
        return {n: t.transpose(1, 2) if ".mlp.experts." in n else t for n, t in state.items()}
    return state if kind in PACKED else _converted(model, state)


def _converted(model: PreTrainedModel, state: Tensors) -> Tensors:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def prediction_layers(model: PreTrainedModel) -> tuple[Tensors, dict[str, Any]]:
    """One depth of prediction layers, and the options of the (text) configuration that announce it.

    The layers are those of a second model of the same class; empty for families that have none.
    """
    kind, text = model.config.model_type, model.config.get_text_config()
    width = text.hidden_size
    joint = {"fc": (width, 2 * width)} | dict.fromkeys(
        ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), (width,)
    )
    if kind.startswith(("qwen3_5", "qwen3_next")):
        layers = _decoder(model, num_hidden_layers=1, layer_types=["full_attention"], mlp_only_layers=[])
        whole = {f"mtp.layers.0.{name}": tensor for name, tensor in layers[0].items()}
        joint = dict.fromkeys(("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), (width,)) | {
            "fc": (width, 2 * width)
        }
        said = {"mtp_num_hidden_layers": 1} if kind.startswith("qwen3_5") else {}
        return whole | {f"mtp.{name}.weight": _ramp(name, *shape) for name, shape in joint.items()}, said
    joint = {"enorm": (width,), "hnorm": (width,), "eh_proj": (width, 2 * width)}
    if kind == "nemotron_h":
        layers = _decoder(model, hybrid_override_pattern="*E", layers_block_type=None)
        layers[0] |= {f"{name}.weight": _ramp(name, *shape) for name, shape in joint.items()}
        layers[1] |= {"final_layernorm.weight": _ramp("final_norm", width)}
        whole = {f"mtp.layers.{i}.{name}": tensor for i, layer in layers.items() for name, tensor in layer.items()}
        return whole, {"num_nextn_predict_layers": 1}
    if kind == "deepseek_v3":
        layer = _decoder(model, num_hidden_layers=1, first_k_dense_replace=0)[0]
        joint["shared_head.norm"] = (width,)
        layer |= {f"{name}.weight": _ramp(name, *shape) for name, shape in joint.items()}
        layer["embed_tokens.weight"] = model.get_input_embeddings().weight
        layer["shared_head.head.weight"] = model.get_output_embeddings().weight
        prefix = f"model.layers.{text.num_hidden_layers}"
        return {f"{prefix}.{name}": tensor for name, tensor in layer.items()}, {"num_nextn_predict_layers": 1}
    return {}, {}


def _decoder(model: PreTrainedModel, **changes: Any) -> dict[int, Tensors]:
    """Tensors by layer of a second model with other layers and other weights, experts one by one."""
    options = model.config.to_dict()
    options.get("text_config", options).update(changes)
    second = type(model)(type(model.config).from_dict(options))
    fill_distinct(second, seed=8)
    layers: dict[int, Tensors] = {}
    for name, tensor in _converted(second, second.state_dict()).items():
        before, found, rest = name.partition("layers.")
        if found and "visual" not in before:
            layer, inner = rest.split(".", 1)
            layers.setdefault(int(layer), {})[inner] = tensor
    return layers


def _ramp(name: str, *shape: int) -> Tensor:
    """Distinct values, near one for a norm and near zero for a matrix."""
    import torch

    values = torch.linspace(-0.1, 0.1, torch.Size(shape).numel()).reshape(shape)
    return values + 1 if "norm" in name else values

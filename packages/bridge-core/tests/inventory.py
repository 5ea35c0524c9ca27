"""What a published checkpoint holds on disk, derived from its config.json: the oracle for models too large to make.

Nothing here knows of Megatron or of this package. The main model's tensors are those of transformers' own class,
built on the meta device; the way from its memory to the disk is transformers' own weight conversion in reverse
(`core_model_loading.revert_weight_conversion`, which `save_pretrained` uses). What transformers leaves out when it
loads (prediction layers, scales) comes from its decoder layers and from the short tables below.

Sources of the tables: headers and listings of the published files, see published/README.md, and transformers 5.23
(`conversion_mapping`, "MtpModel").
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Shape = tuple[int, ...]
Inventory = dict[str, tuple[Shape, str]]
Config = Mapping[str, Any]

_FILES = sorted((Path(__file__).parent / "published").glob("*.json"))
PUBLISHED = {path.stem: json.loads(path.read_text()) for path in _FILES}
"""config.json of published models, by file name."""

# Models whose publisher stores experts as transformers holds them in memory (packed, 3-D), though transformers would
# write them one by one.
PACKED = {"qwen3_5_moe"}

# Tensors on disk in float32 beside bfloat16 weights.
FLOAT32 = {
    "qwen3_5": r"^model\..*\.linear_attn\.(A_log|norm\.weight)$",
    "qwen3_5_moe": r"^model\..*\.linear_attn\.(A_log|norm\.weight)$",
    "nemotron_h": r"\.e_score_correction_bias$",
    "deepseek_v3": r"\.e_score_correction_bias$|\.weight_scale_inv$",
}

# Weights that stay bfloat16 in a checkpoint quantised to fp8 blocks, besides everything that is not a matrix.
NOT_QUANTISED = re.compile(r"(^|\.)(lm_head|embed_tokens|shared_head\.head|eh_proj|mlp\.gate)\.weight$")
SCALE = ".weight_scale_inv"

# Prediction layers, where the publisher adds one of which config.json says nothing.
UNSAID_MTP = {"qwen3_next": 1}


def inventory(config: Config) -> Inventory:
    """Shape and safetensors dtype of every tensor of the published checkpoint with this config.json."""
    return dict(_inventory(json.dumps(config)))


def is_mtp(name: str, config: Config) -> bool:
    """Whether a tensor belongs to a prediction layer."""
    return name.startswith(("mtp.", f"model.layers.{config.get('num_hidden_layers')}."))


def is_scale(name: str) -> bool:
    """Whether a tensor holds the scales of a quantised one."""
    return name.endswith(SCALE)


@cache
def _inventory(text: str) -> Inventory:
    config = json.loads(text)
    shapes = main_model(config) | prediction_layers(config)
    if "quantization_config" in config:
        shapes = with_scales(shapes, config["quantization_config"]["weight_block_size"])
    wide = re.compile(FLOAT32.get(config["model_type"], r"(?!)"))
    return {name: (shape, _dtype(name, shapes, wide)) for name, shape in shapes.items()}


def _dtype(name: str, shapes: Mapping[str, Shape], wide: re.Pattern[str]) -> str:
    if wide.search(name):
        return "F32"
    return "F8_E4M3" if name.removesuffix(".weight") + SCALE in shapes else "BF16"


def main_model(config: Config) -> dict[str, Shape]:
    """The tensors that transformers' model class has, under their names and in their shapes on disk."""
    model = on_meta(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return _shapes(state) if config["model_type"] in PACKED else on_disk(model, state)


def on_meta(config: Config) -> PreTrainedModel:
    """The model that config.json describes, without memory for its weights."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, config["architectures"][0])(settings_of(config))


def settings_of(config: Config) -> PreTrainedConfig:
    """config.json as transformers understands it."""
    import transformers

    # It changes what it is given.
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config)))


def on_disk(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Names and shapes under which transformers saves the tensors of a model."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = _shapes(revert_weight_conversion(model, dict(state)))
    if model.config.model_type == "qwen3_vl_moe":
        # Published stacked experts are [expert, in, out]; transformers turns them when it loads, not when it saves.
        shapes |= {name: (s[0], s[2], s[1]) for name, s in shapes.items() if ".mlp.experts." in name}
    return shapes


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def with_scales(shapes: Mapping[str, Shape], block: Shape) -> dict[str, Shape]:
    """Add the scales of every matrix that is quantised, one per block; blocks at the edges may be partial."""
    scales = {
        name.removesuffix(".weight") + SCALE: tuple(-(-n // size) for n, size in zip(shape, block, strict=True))
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not NOT_QUANTISED.search(name)
    }
    return {**shapes, **scales}


# --- Prediction layers ------------------------------------------------------------------------------


def prediction_layers(config: Config) -> dict[str, Shape]:
    """The tensors of multi-token prediction: whole decoder layers, and what joins them to the main model."""
    text = config.get("text_config", config)
    kind = config["model_type"]
    if kind.startswith(("qwen3_5", "qwen3_next")):
        count = text.get("mtp_num_hidden_layers", UNSAID_MTP.get(kind, 0))
        return _qwen(config, text, count) if count else {}
    count = text.get("num_nextn_predict_layers", 0)
    if kind == "nemotron_h" and count:
        return _nemotron(config, count)
    return _deepseek(config, count) if kind == "deepseek_v3" and count else {}


def _layers(config: Config, changes: Mapping[str, Any], prefix: str) -> dict[int, dict[str, Shape]]:
    """Tensors by layer, without their prefix, of a model like this one with other layers; experts one by one."""
    model = on_meta({**config, **changes})
    found: dict[int, dict[str, Shape]] = {}
    for name, shape in on_disk(model, model.state_dict()).items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            found.setdefault(int(layer), {})[rest] = shape
    return found


def _joint(hidden: int) -> dict[str, Shape]:
    return {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}


def _qwen(config: Config, text: Config, count: int) -> dict[str, Shape]:
    changes: dict[str, Any] = {
        "num_hidden_layers": count,
        "layer_types": ["full_attention"] * count,
        "mlp_only_layers": [],
    }
    if text is config:
        layers = _layers(config, changes, "model.layers.")
    else:
        layers = _layers(config, {"text_config": {**text, **changes}}, "model.language_model.layers.")
    hidden = text["hidden_size"]
    norms = {f"mtp.{norm}.weight": (hidden,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    whole = {f"mtp.layers.{i}.{name}": shape for i, layer in layers.items() for name, shape in layer.items()}
    return {"mtp.fc.weight": (hidden, 2 * hidden), **norms, **whole}


def _nemotron(config: Config, count: int) -> dict[str, Shape]:
    """`count` blocks; each is a run of layers, the first of which is joined to the model and the last has a norm."""
    kinds, hidden = settings_of(config).mtp_layers_block_type, config["hidden_size"]
    block = _layers(config, {"layers_block_type": kinds}, "backbone.layers.")
    block[0] |= _joint(hidden)
    block[len(kinds) - 1] |= {"final_layernorm.weight": (hidden,)}
    return {
        f"mtp.layers.{depth * len(kinds) + i}.{name}": shape
        for depth in range(count)
        for i, layer in block.items()
        for name, shape in layer.items()
    }


def _deepseek(config: Config, count: int) -> dict[str, Shape]:
    """Further decoder layers with experts, each with copies of the embedding and of the head."""
    table = (config["vocab_size"], config["hidden_size"])
    block = _layers(config, {"num_hidden_layers": 1, "first_k_dense_replace": 0}, "model.layers.")[0]
    block |= _joint(config["hidden_size"]) | {"shared_head.norm.weight": (config["hidden_size"],)}
    block |= {"embed_tokens.weight": table, "shared_head.head.weight": table}
    first = config["num_hidden_layers"]
    return {f"model.layers.{first + i}.{name}": shape for i in range(count) for name, shape in block.items()}

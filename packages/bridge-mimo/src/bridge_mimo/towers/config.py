"""mcore's configuration of a vision tower, from the fields of its family and the settings of its component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from math import isqrt
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError, LayoutError
from bridge_core.extras import require
from bridge_core.families import Fields
from bridge_core.runtime.layer_specs import Spec

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import Tensor

LAYERNORM_EPSILON = 1e-6  # fixed in code (transformers 5.23, models/qwen3_vl/modeling_qwen3_vl.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSizes:
    """What a Qwen tower has beside its transformer layers."""

    channels: int
    frames: int
    """Frames of a video that one patch spans."""
    patch: int
    """Rows and columns of pixels of a patch."""
    merge: int
    """Rows and columns of the block of patches that makes one embedding."""
    positions: int
    """Learnt positions: a square table."""
    out: int
    """Width of an embedding: the language model's hidden size."""
    deepstack: tuple[int, ...]
    """Layers, from 0, after which a merger makes another embedding of every block."""

    @property
    def side(self) -> int:
        """Rows and columns of the table of positions."""
        return isqrt(self.positions)

    @property
    def pixels(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.frames * self.patch**2


def tower_sizes(fields: Fields) -> TowerSizes:
    """The sizes that a family's fields say; raises `ConfigError` where it has no such tower."""
    if not fields.get("vision_num_layers"):
        raise ConfigError("the model has no vision tower", where="vision_num_layers", expected="fields of a Qwen VL")
    sizes = TowerSizes(
        channels=fields["vision_in_channels"],
        frames=fields["vision_temporal_patch_size"],
        patch=fields["vision_patch_size"],
        merge=fields["vision_spatial_merge_size"],
        positions=fields["vision_num_positions"],
        out=fields["vision_out_hidden_size"],
        deepstack=tuple(fields.get("vision_deepstack_layers") or ()),
    )
    if sizes.side**2 != sizes.positions:
        raise ConfigError(
            "learnt positions do not form a square", where="vision_num_positions", expected="n * n", got=sizes.positions
        )
    return sizes


def gelu_tanh(x: Tensor) -> Tensor:
    """HF's `gelu_pytorch_tanh`."""
    from torch.nn.functional import gelu

    return gelu(x, approximate="tanh")


def activation_function(name: str) -> Any:
    """A function that mcore's layers take as `activation_func`: "gelu" (exact), "gelu_tanh" or "quick_gelu".

    Raises:
        ConfigError: it is none of these.
    """
    from megatron.core.activations import quick_gelu
    from torch.nn.functional import gelu

    known = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}
    if name not in known:
        raise ConfigError(
            "no activation function of a tower has this name",
            where="activation_function",
            expected=" or ".join(known),
            got=repr(name),
            fix="give one of these names, or set `activation_func` of the configuration to the function itself",
        )
    return known[name]


def tower_config(fields: Fields, settings: Mapping[str, Any], spec: Spec) -> TransformerConfig:
    """mcore's configuration of the layers of a Qwen tower.

    Args:
        fields: Megatron fields of the whole model; those named `vision_...` are read.
        settings: fields of `TransformerConfig` that are the component's own: parallel sizes, dtypes,
            recomputation, a pipeline's uneven ends.
        spec: which modules it is for.

    Raises:
        ConfigError: a setting that is none, or that would change what the tower computes.
    """
    hidden, heads = fields["vision_hidden_size"], fields["vision_num_attention_heads"]
    model = {
        "num_layers": fields["vision_num_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": fields["vision_ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "activation_func": gelu_tanh,
        "layernorm_epsilon": LAYERNORM_EPSILON,
    }
    return transformer_config(model, settings, spec)


def transformer_config(model: Mapping[str, Any], settings: Mapping[str, Any], spec: Spec) -> TransformerConfig:
    """A `TransformerConfig` of an encoder with layer norms, biases and no dropout; arguments as for `tower_config`."""
    require("megatron.core", extra="mcore")
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = {
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # Fused kernels know positions on one axis, and other activations.
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        **model,
    }
    _check(settings, model, {field.name for field in dataclass_fields(TransformerConfig) if field.init})
    kwargs = model | dict(settings)
    kwargs.setdefault("pipeline_dtype", kwargs.get("params_dtype", torch.float32))
    if spec != "te" and not torch.cuda.is_available():
        from bridge_core.runtime.host import cpu_friendly

        kwargs |= cpu_friendly(kwargs)
    return TransformerConfig(**kwargs)


def _check(settings: Mapping[str, Any], model: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(settings) - known):
        raise ConfigError("a tower has no such settings", where=", ".join(unknown), expected="TransformerConfig's")
    if fixed := sorted(name for name in settings if name in model and settings[name] != model[name]):
        raise ConfigError(
            "a setting would make it another tower",
            where=", ".join(fixed),
            expected={name: model[name] for name in fixed},
            got={name: settings[name] for name in fixed},
        )
    names = ("sequence_parallel", "context_parallel_size", "virtual_pipeline_model_parallel_size")
    if got := {
        name: settings[name] for name in names if settings.get(name) and (settings[name] is True or settings[name] > 1)
    }:
        raise LayoutError(
            "a vision tower is cut by heads and layers only: images differ in size, and a stage is one chunk",
            where=", ".join(got),
            expected="False, 1 or None",
            got=got,
            fix="give the images component tp and pp; its dp shares out images",
        )


def check_groups(config: TransformerConfig, groups: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """The groups, if they are of the sizes that the settings say.

    Raises:
        LayoutError: there are none, or of other sizes.
    """
    wanted = {"tp": config.tensor_model_parallel_size, "pp": config.pipeline_model_parallel_size}
    found = None if groups is None else {"tp": groups.tp.size(), "pp": groups.pp.size()}
    if groups is None or found != wanted:
        raise LayoutError(
            "process groups differ from the settings", where="a vision tower", expected=wanted, got=found or "no groups"
        )
    return groups

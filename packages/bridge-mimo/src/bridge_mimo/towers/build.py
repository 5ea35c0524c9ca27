"""Specs of encoders and of the modality submodule around them, for mcore's `MimoModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError, LayoutError
from bridge_core.families import Fields
from bridge_core.runtime.layer_specs import Spec
from bridge_core.runtime.provider import default_spec
from bridge_mimo.towers.config import activation_function, tower_config, tower_sizes, transformer_config

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


def tower_spec(
    fields: Fields,
    settings: Mapping[str, Any] | None = None,
    *,
    groups: ProcessGroupCollection | None,
    spec: Spec | None = None,
) -> ModuleSpec:
    """The Qwen3-VL or Qwen3.5 tower of megatron-core's layers, as an encoder of a `MimoModel`.

    Args:
        fields: Megatron fields of the whole model (`AutoBridge.fields`).
        settings: fields of `TransformerConfig` that are the images component's own: parallel sizes, dtypes,
            recomputation. Nothing is written into it.
        groups: the component's process groups. None on ranks that build no encoder.
        spec: which modules it is made of; by default Transformer Engine's where it and a GPU are there, the
            CPU host backend's otherwise.

    Returns:
        A `ModuleSpec`; `build_module` of it gives a `QwenVisionTower`.

    Raises:
        ConfigError: the fields have no such tower, or a setting would change what it computes.
        LayoutError: heads do not divide over tp.
        MissingExtraError: megatron-core is not installed.
    """
    spec = spec or default_spec()
    sizes, config = tower_sizes(fields), tower_config(fields, _check_heads(fields, settings or {}), spec)
    from megatron.core.transformer.spec_utils import ModuleSpec

    from bridge_mimo.towers.qwen_vl import QwenVisionTower

    params = {"config": config, "sizes": sizes, "spec": spec, "pg_collection": groups}
    return ModuleSpec(module=QwenVisionTower, params=params)


def replicated_tower_spec(
    hf_config: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    groups: ProcessGroupCollection | None,
    feature_layer: int | None = None,
    class_token: bool = False,
) -> ModuleSpec:
    """The HF tower as it is, whole on every rank, as an encoder of a `MimoModel`.

    Args:
        hf_config: config.json of the whole model.
        settings: as for `tower_spec`; parallel sizes and dtypes are read.
        groups: the component's process groups. None on ranks that build no encoder.
        feature_layer, class_token: for towers of whole images (CLIP, SigLIP): `ReplicatedTower`.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    from bridge_mimo.towers.replicated import ReplicatedTower

    # mcore's modules carry a configuration; of this one nothing but sizes, dtype and device is read.
    settings = settings or {}
    sizes = {name: settings.get(name, 1) for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")}
    layers = {"num_layers": sizes["pipeline_model_parallel_size"], "hidden_size": 1, "num_attention_heads": 1}
    heads = {"num_attention_heads": sizes["tensor_model_parallel_size"], "kv_channels": 1}
    config = transformer_config(layers | heads, settings, default_spec())
    params = {"config": config, "hf_config": dict(hf_config), "pg_collection": groups}
    return ModuleSpec(
        module=ReplicatedTower, params=params | {"feature_layer": feature_layer, "class_token": class_token}
    )


# hidden_act of CLIP and SigLIP (transformers 5.23).
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def clip_tower_spec(
    vision: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    groups: ProcessGroupCollection | None,
    feature_layer: int = -2,
    spec: Spec | None = None,
) -> ModuleSpec:
    """A CLIP or SigLIP tower of megatron-core's layers, as an encoder of a `MimoModel`.

    Args:
        vision: HF's `vision_config`.
        settings, groups, spec: as for `tower_spec`.
        feature_layer: which hidden state is the output (LLaVA: `vision_feature_layer`).

    Raises:
        ConfigError: another kind of tower, or another activation.
    """
    spec = spec or default_spec()
    kinds = {"clip_vision_model": True, "siglip_vision_model": False}
    kind, activation = vision.get("model_type"), vision.get("hidden_act")
    if kind not in kinds or activation not in _ACTIVATIONS:
        raise ConfigError(
            "this vision tower is not translated",
            where="vision_config",
            expected=f"model_type of {sorted(kinds)}, hidden_act of {sorted(_ACTIVATIONS)}",
            got=f"{kind}, {activation}",
        )
    heads = vision["num_attention_heads"]
    model = {
        "num_layers": vision["num_hidden_layers"],
        "hidden_size": vision["hidden_size"],
        "ffn_hidden_size": vision["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": vision["hidden_size"] // heads,
        "layernorm_epsilon": vision["layer_norm_eps"],
        "activation_func": activation_function(_ACTIVATIONS[activation]),
    }
    config = transformer_config(model, settings or {}, spec)
    from megatron.core.transformer.spec_utils import ModuleSpec

    from bridge_mimo.towers.clip import ClipTower

    image = {name: vision[name] for name in ("image_size", "patch_size")} | {"class_token": kinds[kind]}
    params = {"config": config, "image": image, "spec": spec, "pg_collection": groups, "feature_layer": feature_layer}
    return ModuleSpec(module=ClipTower, params=params)


def projector_spec(
    sizes: tuple[int, int, int],
    settings: Mapping[str, Any] | None = None,
    *,
    groups: ProcessGroupCollection | None,
    activation: str = "gelu",
    spec: Spec | None = None,
) -> ModuleSpec:
    """Two linears with biases from a tower's width to the language model's: mcore's `MultimodalProjector`.

    Args:
        sizes: width of the tower, width between the linears, width of the language model.
        settings, groups, spec: as for `tower_spec`.
        activation: "gelu", "gelu_tanh" or "quick_gelu".
    """
    spec = spec or default_spec()
    tower, between, language = sizes
    model = {
        "num_layers": (settings or {}).get("pipeline_model_parallel_size", 1),
        "hidden_size": language,
        "ffn_hidden_size": between,
        "num_attention_heads": (settings or {}).get("tensor_model_parallel_size", 1),
        "kv_channels": 1,
        "activation_func": activation_function(activation),
    }
    config = transformer_config(model, settings or {}, spec)
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.transformer.spec_utils import ModuleSpec

    from bridge_mimo.towers.specs import mlp_submodules

    return ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": config,
            "submodules": mlp_submodules(spec),
            "projector_type": "mlp",
            "input_size": tower,
            "tp_group": None if groups is None else groups.tp,
        },
    )


def vision_modality_spec(
    encoders: Mapping[str, ModuleSpec],
    *,
    groups: ProcessGroupCollection | None,
    input_projections: Sequence[ModuleSpec] = (),
) -> ModuleSpec:
    """The modality of a `MimoModelConfig.modality_submodules_spec`, whose encoders may have pipeline stages.

    Args:
        encoders: key -> spec; parameters are `encoders.<key>.<name>`.
        groups: the component's process groups, for its distributed checkpoints.
        input_projections: from embeddings to the language model's width, built on the last stage; at most one.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    from bridge_mimo.towers.submodules import TowerSubmodules

    return ModuleSpec(
        module=TowerSubmodules,
        params={"pg_collection": groups},
        submodules={"encoders": dict(encoders), "input_projections": list(input_projections)},
    )


def _check_heads(fields: Fields, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    heads, tp = fields.get("vision_num_attention_heads", 0), settings.get("tensor_model_parallel_size", 1)
    if heads % tp:
        raise LayoutError(
            "attention heads of the vision tower do not divide over the tensor-parallel ranks",
            where="vision_num_attention_heads",
            expected=f"a multiple of tp={tp}",
            got=f"{heads} heads",
            fix=f"choose a tp of the images component that divides {heads}",
        )
    return settings

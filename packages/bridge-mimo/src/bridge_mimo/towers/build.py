"""Specs of encoders and of the modality submodule around them, for mcore's `MimoModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bridge_core.errors import LayoutError
from bridge_core.families import Fields
from bridge_core.runtime.layer_specs import Spec
from bridge_core.runtime.provider import default_spec

from bridge_mimo.towers.config import tower_config, tower_sizes, transformer_config

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


def tower_spec(
    fields: Fields,
    settings: Mapping[str, Any] | None = None,
    *,
    groups: ProcessGroupCollection | None,
    spec: Spec | None = None,
    vp_stage: int | None = None,
) -> ModuleSpec:
    """The Qwen3-VL or Qwen3.5 tower of megatron-core's layers, as an encoder of a `MimoModel`.

    Args:
        fields: Megatron fields of the whole model (`AutoBridge.fields`).
        settings: fields of `TransformerConfig` that are the images component's own: parallel sizes, dtypes,
            recomputation. Nothing is written into it.
        groups: the component's process groups. None on ranks that build no encoder.
        spec: which modules it is made of; by default Transformer Engine's where it and a GPU are there, the
            CPU host backend's otherwise.
        vp_stage: the virtual stage under interleaved pipelining.

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

    params = {"config": config, "sizes": sizes, "spec": spec, "pg_collection": groups, "vp_stage": vp_stage}
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

    # mcore's modules carry a configuration; of this one's layers nothing is read.
    config = transformer_config(
        {"num_layers": (settings or {}).get("pipeline_model_parallel_size", 1), "hidden_size": 1, "num_attention_heads": 1}
        | {"tensor_model_parallel_size": 1},
        {name: value for name, value in (settings or {}).items() if name != "tensor_model_parallel_size"},
        "host",
    )
    config.tensor_model_parallel_size = (settings or {}).get("tensor_model_parallel_size", 1)
    params = {"config": config, "hf_config": dict(hf_config), "pg_collection": groups}
    return ModuleSpec(
        module=ReplicatedTower, params=params | {"feature_layer": feature_layer, "class_token": class_token}
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

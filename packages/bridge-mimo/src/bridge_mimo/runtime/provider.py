"""From a model's fields and its components' layouts to mcore's `MimoModel`: settings as data, built when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError, LayoutError
from bridge_core.families import Fields
from bridge_core.runtime.layer_specs import Spec, placed_by
from bridge_core.runtime.provider import Provider
from bridge_mimo.components import Components
from bridge_mimo.layout import LANGUAGE, ComponentLayout
from bridge_mimo.plan import MimoPlan
from bridge_mimo.runtime.groups import MimoGroups, check_live, make_groups
from bridge_mimo.runtime.live import LANGUAGE_MODULE, groups_of

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel
    from megatron.core.models.mimo.config import MimoModelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec

_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_PIPELINE = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)
# Where config.json of a Qwen3.5 says nothing (transformers 5.23, models/qwen3_5/modeling_qwen3_5.py,
# `Qwen3_5TextRotaryEmbedding`).
_MROPE_SECTION = (11, 11, 10)


ModalitySpec = Callable[[Fields, dict[str, Any], Any, Spec], Any]
"""Fields of the model, settings of the component, its groups, kind of modules -> `ModuleSpec` of its modality."""


class MimoProvider:
    """Settings of a multimodal model, and the way to build it. Made by `MegatronMIMOBridge.to_megatron_mimo_provider`.

    Building reads the settings and changes none: what is derived from them lives in the model alone.

    Args:
        components: of the model.
        layouts: by component, filled in (`auto_fill_layout`).
        spec: which modules layers are made of, as for core's `Provider`.

    Attributes:
        language: core's provider of the language model, prediction layers and all, to be changed like any; its
            parallel sizes are those of `layouts` whenever a component is built of it.
        towers: settings of every other component, to be changed: fields of `TransformerConfig`.
        modality_specs: by component, a function that makes the spec of its modality from the model's fields, the
            settings with those of its layout, its groups on this rank (None on others) and the kind of modules; for
            components that this package has no tower for, or to use another one.
        special_token_ids: by component, the token that its embeddings take the place of.
        layouts: by component.
    """

    def __init__(
        self, components: Components, layouts: Mapping[str, ComponentLayout], *, spec: Spec | None = None
    ) -> None:
        fields = components.fields
        self.components = components
        self.layouts = dict(layouts)
        self.language = Provider(fields, spec=spec)
        self.towers: dict[str, dict[str, Any]] = {name: {} for name in components.names if name != LANGUAGE}
        self.modality_specs: dict[str, ModalitySpec] = {}
        self.special_token_ids = {name: token for name in self.towers if (token := _token(fields, name)) is not None}

    @property
    def deepstack(self) -> dict[str, int]:
        """How many of the language model's first layers each component feeds, where it feeds more than embeddings."""
        layers = len(self.components.fields.get("vision_deepstack_layers") or ())
        return {"images": layers} if layers and "images" in self.towers else {}

    def make_groups(self, *, timeout_s: float = 600.0) -> MimoGroups:
        """The process groups of all components. Collective over the default group; see `runtime.groups.make_groups`."""
        return make_groups(self.layouts, timeout_s=timeout_s)

    def provide(self, groups: MimoGroups | None = None) -> MimoModel:
        """This rank's components in mcore's `MimoModel`. Collective over the default group.

        Prediction layers are left out: `MimoModel` gives its language model embeddings in place of tokens, which
        these layers need (0.19.2, models/mimo/model/base.py).

        Args:
            groups: of the same layouts; by default they are made. The model keeps them as `mimo_groups`.

        Raises:
            LayoutError: the layouts are not for this run, or not for `MimoModel`.
            ConfigError: megatron-core is older than 0.17; a setting is refused; or a component is one that nothing here
                builds.
        """
        groups = groups or self.make_groups()
        check_live(groups)
        self._check_layouts(groups)
        MimoPlan(self.components, groups.layouts, colocated=groups.colocated)  # refuses what does not divide
        from bridge_mimo.runtime.model import BridgedMimoModel

        language = groups.collections[LANGUAGE]
        options = {} if language is None else {"tp_group": language.tp, "cp_group": language.cp}
        with self._placed(language):
            model = BridgedMimoModel(self.config(groups), **options, deepstack=self.deepstack)
        model.mimo_groups = groups
        return model

    def _check_layouts(self, groups: MimoGroups) -> None:
        if dict(groups.layouts) != self.layouts:
            raise LayoutError(
                "process groups are those of other layouts than the provider's",
                where="groups",
                expected=", ".join(f"{name}: {layout}" for name, layout in self.layouts.items()),
                got=", ".join(f"{name}: {layout}" for name, layout in groups.layouts.items()),
                fix="pass provider.make_groups(), or leave them out",
            )

    def provide_distributed_model(
        self, groups: MimoGroups | None = None, *, wrap_with_ddp: bool = False, ddp_config: Any = None
    ) -> MimoModel:
        """`provide`, moved to this rank's GPU where there is one, each component wrapped in mcore's DDP if asked to.

        Args:
            groups: as for `provide`.
            wrap_with_ddp: wrap the language model and every modality in `DistributedDataParallel`, over the
                data-parallel ranks of its own component.
            ddp_config: its `DistributedDataParallelConfig`; by default mcore's defaults.
        """
        import torch

        model = self.provide(groups)
        if torch.cuda.is_available() and self.language.spec != "host":
            model = model.cuda()
        return wrap_in_ddp(model, ddp_config) if wrap_with_ddp else model

    def config(self, groups: MimoGroups) -> MimoModelConfig:
        """mcore's configuration of these settings, for one rank of some groups."""
        from megatron.core.models.mimo.config import MimoModelConfig

        return MimoModelConfig(
            language_model_spec=self.language_spec(groups.collections[LANGUAGE]),
            modality_submodules_spec={name: self.tower_spec(name, groups.collections[name]) for name in self.towers},
            special_token_ids=dict(self.special_token_ids),
            module_to_grid_map=dict(groups.grids),
        )

    def language_spec(self, groups: ProcessGroupCollection | None) -> ModuleSpec:
        """The language model of one rank; on ranks that do not have it, its configuration and sizes alone."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        provider, fields = self._language_settings(), self.components.fields
        if mrope := fields.get("position_embedding_type") == "mrope":
            provider.mrope_section = list(fields.get("mrope_section") or _MROPE_SECTION)
        config = provider.finalize()
        params = {
            "config": config,
            "max_sequence_length": provider.seq_length,
            "vocab_size": provider.padded_vocab,
        }
        if groups is not None:
            params = provider.model_arguments(config, groups)
            # `MimoModel` cuts the sequence itself, after images took their places in it.
            params["scatter_embedding_sequence_parallel"] = False
        return ModuleSpec(module=_language_class(mrope=mrope), params=params)

    def _language_settings(self) -> Provider:
        """The settings of the language model in its layout, without prediction layers."""
        return self.language.copy().apply_overrides(_sizes(self.layouts[LANGUAGE]) | {"mtp_num_layers": None})

    def _placed(self, groups: ProcessGroupCollection | None) -> AbstractContextManager[None]:
        """While a model is built: a layout string makes mcore ask its global state for this stage (`placed_by`)."""
        return nullcontext() if groups is None else placed_by(self._language_settings().finalize(), groups, vpp=1)

    def tower_spec(self, name: str, groups: ProcessGroupCollection | None) -> ModuleSpec:
        """The modality of one component.

        Raises:
            ConfigError: nothing says how to build it.
        """
        usual = _hf_tower if name in self.components.hf_towers else _qwen_tower
        make = self.modality_specs.get(name) or partial(usual, self.components, name)
        settings = _sizes(self.layouts[name], dense=True) | self.towers[name]
        return make(self.components.fields, settings, groups, self.language.spec)


def _hf_tower(
    components: Components, name: str, fields: Fields, settings: dict[str, Any], groups: Any, spec: Spec
) -> ModuleSpec:
    """The modality of a tower that is HF's own module."""
    from bridge_mimo.towers import replicated_tower_spec, vision_modality_spec

    tower = replicated_tower_spec(components.family.to_hf(fields), settings, groups=groups)
    return vision_modality_spec({_encoder_key(components, name): tower}, groups=groups)


def _qwen_tower(
    components: Components, name: str, fields: Fields, settings: dict[str, Any], groups: Any, spec: Spec
) -> ModuleSpec:
    """The modality of a Qwen model's images."""
    from bridge_mimo.towers import tower_spec, vision_modality_spec

    key = _encoder_key(components, name)
    if not fields.get("vision_spatial_merge_size"):
        raise _unknown(components, name)
    return vision_modality_spec({key: tower_spec(fields, settings, groups=groups, spec=spec)}, groups=groups)


def _encoder_key(components: Components, name: str) -> str:
    """What `MimoModel` calls the one encoder that a component consists of.

    Raises:
        ConfigError: the component consists of something else.
    """
    paths = [route.target_module_path.rpartition(".") for route in components.parts[name].routes]
    if [at for at, _, _ in paths] != [f"modality_submodules.{name}.encoders"]:
        raise _unknown(components, name)
    return paths[0][2]


def _unknown(components: Components, name: str) -> ConfigError:
    return ConfigError(
        "it is not known how to build a component",
        where=f"component {name} of a {components.family.name} model",
        expected="a vision tower of Qwen3-VL or Qwen3.5 or one of HF, alone; or a function in `modality_specs`",
        got=", ".join(route.target_module_path for route in components.parts[name].routes),
        fix=f"set provider.modality_specs[{name!r}]",
    )


def _sizes(layout: ComponentLayout, *, dense: bool = False) -> dict[str, Any]:
    """Settings of a layout; without those of experts for a component that has none."""
    own = layout.parallel
    wanted = {name: option for name, option in _SIZES.items() if not dense or name in ("tp", "pp", "cp")}
    found = {option: getattr(own, name) for name, option in wanted.items()}
    return found | {name: value for name in _PIPELINE if (value := getattr(own, name)) is not None}


def _token(fields: Fields, component: str) -> int | None:
    """The placeholder of a component's embeddings: `image_token_id` for `images`."""
    return fields.get(f"{component.removesuffix('s')}_token_id")


def _language_class(*, mrope: bool) -> type:
    if mrope:
        from bridge_mimo.runtime.language import MropeGPTModel

        return MropeGPTModel
    from megatron.core.models.gpt import GPTModel

    return GPTModel


def wrap_in_ddp(model: MimoModel, ddp_config: Any = None) -> MimoModel:
    """Wrap each of this rank's components in mcore's DDP, over the data-parallel ranks of its own; in place.

    Adapters come before this (bridge-peft's `apply_lora`). A component of which nothing is trained stays bare.

    Args:
        model: of a `MimoProvider`.
        ddp_config: a `DistributedDataParallelConfig`; by default mcore's defaults.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    for name, groups in groups_of(model).mine.items():
        parent, key = (model, LANGUAGE_MODULE) if name == LANGUAGE else (model.modality_submodules, name)
        module: Any = parent.get_submodule(key)
        if any(parameter.requires_grad for parameter in module.parameters()):
            config = module.config if name == LANGUAGE else next(iter(module.encoders.values())).config
            options = ddp_config or DistributedDataParallelConfig()
            wrapped = DistributedDataParallel(config, options, module, pg_collection=groups)
            parent.register_module(key, wrapped)
    return model

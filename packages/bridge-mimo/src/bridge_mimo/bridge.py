"""`MegatronMIMOBridge`: `AutoBridge` for models whose components each have their own layout and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bridge_core.bridge import AutoBridge
from bridge_core.errors import LayoutError
from bridge_core.families import all_families
from bridge_core.topology import ParallelLayout
from bridge_mimo.components import Components, MIMOComponent, has_components
from bridge_mimo.layout import ComponentLayout, Layouts, auto_fill_layout
from bridge_mimo.plan import MimoPlan, check_component_names

if TYPE_CHECKING:
    from bridge_core.checkpoint.convert import Report
    from bridge_core.runtime.describe import M2NEntry
    from bridge_core.runtime.layer_specs import Spec
    from bridge_core.runtime.live import LiveModel
    from bridge_core.runtime.load import LoadReport
    from bridge_core.runtime.megatron_ckpt import MegatronReport
    from bridge_core.runtime.save import SaveReport
    from bridge_mimo.runtime.groups import MimoGroups
    from bridge_mimo.runtime.provider import MimoProvider


class MegatronMIMOBridge(AutoBridge):
    """A multimodal model's way between Hugging Face and megatron-core's `MimoModel`.

    Make one with `from_hf_pretrained` (a folder) or `from_hf_config` (a configuration alone).

    Attributes:
        layouts: layout by component, filled in; by default one rank for each.
        world_size: ranks of the run.
        colocated: whether all components are on the same ranks.
        hf_towers: components whose towers are HF's own, whole on every rank.
    """

    layouts: dict[str, ComponentLayout]
    world_size: int
    colocated: bool
    hf_towers: tuple[str, ...] = ()

    @classmethod
    def from_hf_pretrained(
        cls,
        path: str | Path,
        *,
        ignore: Sequence[str] = (),
        ignore_options: Sequence[str] = (),
        parallelism: Layouts | None = None,
        world_size: int | None = None,
        colocated: bool = False,
    ) -> Self:
        """A bridge for the model in an HF folder. Only config.json is read here, and at need the names of tensors.

        Args:
            path, ignore, ignore_options: as for `AutoBridge`.
            parallelism: layout by component: `{"language": ComponentLayout(tp=4), "images": ComponentLayout(tp=2)}`.
            world_size, colocated: as for `auto_fill_layout`.

        Raises:
            CheckpointError: there is no such folder, or it has no config.json.
            ConfigError: the architecture or an option of it is not known, or the model has other components.
            LayoutError: the layouts do not fit the ranks, or each other.
        """
        found = super().from_hf_pretrained(path, ignore=ignore, ignore_options=ignore_options)
        return found.with_parallelism(parallelism, world_size=world_size, colocated=colocated)

    @classmethod
    def from_hf_config(
        cls,
        config: Any,
        *,
        ignore: Sequence[str] = (),
        ignore_options: Sequence[str] = (),
        parallelism: Layouts | None = None,
        world_size: int | None = None,
        colocated: bool = False,
    ) -> Self:
        """A bridge for a configuration without weights; see `from_hf_pretrained`."""
        found = super().from_hf_config(config, ignore=ignore, ignore_options=ignore_options)
        return found.with_parallelism(parallelism, world_size=world_size, colocated=colocated)

    def with_parallelism(
        self, parallelism: Layouts | None = None, *, world_size: int | None = None, colocated: bool = False
    ) -> Self:
        """The same bridge for other layouts, given as to `from_hf_pretrained`; this one stays as it is."""
        if parallelism is None:
            parallelism = {name: ComponentLayout() for name in self.components.names}
        check_component_names(self.components, parallelism)
        found = copy(self)
        found.layouts = auto_fill_layout(parallelism, world_size, colocated=colocated)
        found.world_size = max(layout.ranks.stop for layout in found.layouts.values())
        found.colocated = colocated
        return found

    def with_hf_towers(self, *names: str) -> Self:
        """The same bridge for towers that are HF's own, whole on every rank of their components, at pp=1.

        For a tower that nobody has written of megatron-core's layers, or to rule ours out. Training it is not cut over
        tensor-parallel ranks.

        Args:
            names: components, such as `images`.

        Raises:
            ConfigError: the model has no such tower.
        """
        found = copy(self)
        vars(found).pop("components", None)
        found.hf_towers = names
        found._live_plans = {False: {}, True: {}}
        check_component_names(found.components, found.layouts)
        return found

    @staticmethod
    def list_supported_models() -> list[str]:
        """Architectures whose components are known."""
        return sorted({name for family in all_families() if has_components(family) for name in family.architectures})

    @staticmethod
    def supports(config: Mapping[str, Any]) -> bool:
        """Whether the components of a configuration's architecture are known."""
        return bool(set(config.get("architectures") or ()) & set(MegatronMIMOBridge.list_supported_models()))

    @cached_property
    def components(self) -> Components:
        """The model's components, each as a family of its own."""
        return Components.of(self.family, self.fields, hf_towers=self.hf_towers)

    @property
    def routes(self) -> tuple[MIMOComponent, ...]:
        """Where the model's tensors lie in `MimoModel`."""
        return self.components.routes

    def plan(
        self, layout: Layouts | ParallelLayout | None = None, *, make_vocab_size_divisible_by: int = 1
    ) -> MimoPlan:
        """Which part of which HF tensor every rank holds, each component in its own layout. Needs no weights.

        Where the bridge was made from a folder with weights, the plan has their dtypes.

        Args:
            layout: layout by component, in place of the bridge's own.
            make_vocab_size_divisible_by: the language model's vocabulary is padded to a multiple of this times its tp.

        Raises:
            LayoutError: a layout does not divide its component, or the layouts do not fit each other; says the numbers.
        """
        if isinstance(layout, ParallelLayout):
            raise LayoutError(
                "one layout was given for a model of several components",
                where="layout",
                expected=f"a ComponentLayout for each of {', '.join(self.components.names)}",
                got=layout,
                fix="pass them by name, or use AutoBridge for a model in one layout",
            )
        if layout is not None:
            return self.with_parallelism(layout, colocated=self.colocated).plan(
                make_vocab_size_divisible_by=make_vocab_size_divisible_by
            )
        return MimoPlan(
            self.components,
            self.layouts,
            colocated=self.colocated,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            **self._plan_options(),
        )

    @staticmethod
    def import_ckpt(hf_path: str | Path, megatron_path: str | Path, **options: Any) -> Report:
        """Convert an HF folder to a MIMO torch_dist folder, offline. See `checkpoint.convert.import_ckpt`.

        Keyword options are those of `AutoBridge.import_ckpt`, `ignore`, `parallelism`, `world_size`, `colocated`
        and `hf_towers`.
        """
        from bridge_core.checkpoint.convert import Options
        from bridge_mimo.checkpoint.convert import import_ckpt

        run, rest = Options.of(options)
        return import_ckpt(hf_path, megatron_path, options=run, **rest)

    def export_ckpt(self, megatron_path: str | Path, hf_path: str | Path, **options: Any) -> Report:
        """Convert a MIMO torch_dist folder to an HF folder, offline. See `checkpoint.convert.export_ckpt`.

        The bridge's own folder, if it holds weights, gives the file layout, config.json and other files.
        """
        from bridge_mimo.checkpoint.stored import mimo_variant

        return super().export_ckpt(megatron_path, hf_path, variant=mimo_variant(), **options)

    # --- Live models ---------------------------------------------------------------------------

    def to_megatron_mimo_provider(self, *, spec: Spec | None = None) -> MimoProvider:
        """Settings of the model's components, to be changed and then built (`provide_distributed_model`).

        Args:
            spec: `"te"`, `"local"` or `"host"`; by default what fits the machine.
        """
        from bridge_mimo.runtime.provider import MimoProvider

        return MimoProvider(self.components, self.layouts, spec=spec)

    def to_megatron_model(self, *, spec: Spec | None = None, groups: MimoGroups | None = None, **options: Any) -> Any:
        """This rank's components in mcore's `MimoModel`, filled from the bridge's folder if that holds weights.

        Collective over torch's default group, which has a rank for each of the bridge's.

        Args:
            spec: as for `to_megatron_mimo_provider`.
            groups: process groups of the bridge's layouts; by default they are made.
            options: those of `MimoProvider.provide_distributed_model`.
        """
        model = self.to_megatron_mimo_provider(spec=spec).provide_distributed_model(groups, **options)
        if self._weights:
            self.load_hf_weights(model)
        return model

    def load_hf_weights(self, model: Any, path: str | Path | None = None, **options: Any) -> LoadReport:
        """Fill a live `MimoModel` from this bridge's folder, or `path`: every rank reads what its components hold.

        Collective; see `runtime.weights.load_hf_weights`.
        """
        from bridge_mimo.runtime.weights import load_hf_weights

        return load_hf_weights(model, self._folder(path), self.components, **{"ignore": self.ignore, **options})

    def save_hf_pretrained(self, model: Any, path: str | Path, **options: Any) -> SaveReport:
        """Write a live `MimoModel` as one HF folder: every rank writes what its components hold. Collective.

        The bridge's own folder, if it holds weights, says how they are split into files, and gives the prediction
        layers that the model has no place for. See `runtime.weights.save_hf_pretrained`.
        """
        from bridge_mimo.runtime.weights import save_hf_pretrained

        given: dict[str, Any] = self._origin() | {"config": self.config}
        return save_hf_pretrained(model, path, self.components, **(given | options))

    def save_megatron_model(self, model: Any, path: str | Path, **options: Any) -> MegatronReport:
        """Write a live `MimoModel` as a MIMO torch_dist checkpoint. Collective.

        The bridge's own folder, if it holds weights, gives the prediction layers that the model has no place for.
        See `runtime.megatron_ckpt.save_megatron_model`.
        """
        from bridge_mimo.runtime.megatron_ckpt import save_megatron_model

        given: dict[str, Any] = self._origin() | {"hf_config": self.config}
        return save_megatron_model(model, path, self.components, **(given | options))

    def load_megatron_model(self, model: Any, path: str | Path, **options: Any) -> MegatronReport:
        """Fill a live `MimoModel` from a MIMO torch_dist checkpoint of any layouts. Collective.

        See `runtime.megatron_ckpt.load_megatron_model`.
        """
        from bridge_mimo.runtime.megatron_ckpt import load_megatron_model

        return load_megatron_model(model, path, self.components, **{"ignore": self.ignore, **options})

    def m2n_entries(self, model: Any, *, groups: MimoGroups | None = None) -> list[M2NEntry]:
        """A manifest entry per HF tensor that this rank holds a part of, with ranks of the world.

        See core's `runtime.describe.m2n_entries`.
        """
        from bridge_core.runtime.describe import m2n_entries
        from bridge_mimo.runtime.live import component_models

        live = self._live(model, groups)
        return [
            entry._replace(mesh=tuple(tuple(first + rank for rank in row) for row in entry.mesh))
            for first, part in component_models(live)
            for entry in m2n_entries(part)
        ]

    def _origin(self) -> dict[str, Any]:
        return {"source": self.path if self._weights else None, "ignore": self.ignore}

    def _live(self, model: Any, groups: MimoGroups | None, *, fp8: bool = False) -> LiveModel:
        from bridge_core.checkpoint.convert import codec_options
        from bridge_mimo.runtime.live import groups_of, open_mimo

        folder = self._weights
        return open_mimo(
            model,
            self.components,
            groups_of(model, groups),
            inventory=folder.shapes if folder else None,  # names are those of the bridge's own folder
            ignore=self.ignore,
            known=self._live_plans[fp8],
            **codec_options(fp8, folder),
        )

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {layout}" for name, layout in self.layouts.items())
        return f"MegatronMIMOBridge({self.family.name}, {self.path or 'configuration only'}, {parts})"

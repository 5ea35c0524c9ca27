"""`bridge-mimo import`, `export` and `verify`: bridge-core's verbs, with the names of `MimoModel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge_core.cli import convert
from bridge_core.cli import verify as core_verify
from bridge_mimo.cli.layouts import Colocated, Component, HfTower, WorldSize, read_components

if TYPE_CHECKING:
    from bridge_core.checkpoint.variant import Variant
    from bridge_mimo.layout import ComponentLayout


@dataclass(frozen=True, kw_only=True)
class _Components:
    """Options of a conversion that say how components are laid out."""

    component: Component = ()
    world_size: WorldSize = None
    colocated: Colocated = False

    def layouts(self) -> dict[str, ComponentLayout] | None:
        """The layouts that are given, filled in."""
        from bridge_mimo.layout import auto_fill_layout

        given = read_components(self.component)
        return auto_fill_layout(given, self.world_size, colocated=self.colocated) if given else None


@dataclass(frozen=True, kw_only=True)
class Import(_Components, convert.Import):
    """Convert an HF folder to a MIMO torch_dist folder, which loads in any layouts of its components.

    Layouts that are given are checked against the model and recorded beside the weights.
    """

    hf_tower: HfTower = ()

    def variant(self) -> Variant:
        """With the names of `MimoModel`."""
        from bridge_mimo.checkpoint.stored import mimo_variant

        return mimo_variant(self.layouts(), colocated=self.colocated, hf_towers=self.hf_tower)


@dataclass(frozen=True, kw_only=True)
class Export(_Components, convert.Export):
    """Convert a MIMO torch_dist folder, saved in any layouts, to an HF folder.

    Layouts that are given are checked against the model, and make no difference to what is written. Prediction layers
    that the checkpoint does not hold come from --source.
    """

    def variant(self) -> Variant:
        """With the names of `MimoModel`."""
        from bridge_mimo.checkpoint.stored import mimo_variant

        return mimo_variant(self.layouts(), colocated=self.colocated)


@dataclass(frozen=True, kw_only=True)
class Verify(core_verify.Verify):
    """Compare two checkpoint folders, HF or MIMO, by names, shapes, dtypes and content.

    The exit code is 1 if they differ.
    """

    def variant(self) -> Variant:
        """With the names of `MimoModel`."""
        from bridge_mimo.checkpoint.stored import mimo_variant

        return mimo_variant()

"""`bridge-mimo import`, `export` and `verify`: bridge-core's verbs, with the names of `MimoModel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge_core.cli import convert
from bridge_core.cli import verify as core_verify
from bridge_mimo.cli.layouts import Colocated, Component, WorldSize, read_components

if TYPE_CHECKING:
    from bridge_core.checkpoint.variant import Variant


@dataclass(frozen=True, kw_only=True)
class Import(convert.Import):
    """Convert an HF folder to a MIMO torch_dist folder, which loads in any layouts of its components.

    Layouts that are given are checked against the model and recorded beside the weights.
    """

    component: Component = ()
    world_size: WorldSize = None
    colocated: Colocated = False

    def variant(self) -> Variant:
        """With the names of `MimoModel`."""
        from bridge_mimo.checkpoint.stored import mimo_variant
        from bridge_mimo.layout import auto_fill_layout

        if not self.component:
            return mimo_variant()
        layouts = auto_fill_layout(read_components(self.component), self.world_size, colocated=self.colocated)
        return mimo_variant(layouts, colocated=self.colocated)


@dataclass(frozen=True, kw_only=True)
class Export(convert.Export):
    """Convert a MIMO torch_dist folder, saved in any layouts, to an HF folder.

    Prediction layers that the checkpoint does not hold come from --source.
    """

    def variant(self) -> Variant:
        """With the names of `MimoModel`."""
        from bridge_mimo.checkpoint.stored import mimo_variant

        return mimo_variant()


@dataclass(frozen=True, kw_only=True)
class Verify(core_verify.Verify):
    """Compare two checkpoint folders, HF or MIMO, by names, shapes, dtypes and content.

    The exit code is 1 if they differ.
    """

    def variant(self) -> Variant:
        """With the names of `MimoModel`."""
        from bridge_mimo.checkpoint.stored import mimo_variant

        return mimo_variant()

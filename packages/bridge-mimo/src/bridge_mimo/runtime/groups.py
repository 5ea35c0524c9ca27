"""Process groups of every component, on ranks of its own or shared ones, without megatron-core's global state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge_core.errors import ConfigError, LayoutError
from bridge_core.runtime.groups import pg_collection
from bridge_mimo.layout import ComponentLayout, Layouts

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class MimoGroups:
    """The groups that this rank is in, by component.

    Attributes:
        layouts: of all components, filled in.
        collections: of every component that this rank has; None for the others.
        grids: who has which ranks, as mcore's `MimoModel` and its schedules want to know it: for all components on
            all ranks, dims "tp", "cp", "dp", "pp", with the groups of "pp".
    """

    layouts: Mapping[str, ComponentLayout]
    collections: Mapping[str, ProcessGroupCollection | None]
    grids: Mapping[str, HyperCommGrid]

    @property
    def mine(self) -> dict[str, ProcessGroupCollection]:
        """The collections of this rank's components."""
        return {name: groups for name, groups in self.collections.items() if groups is not None}

    @property
    def colocated(self) -> bool:
        """Whether all components are on the same ranks."""
        return len({layout.ranks for layout in self.layouts.values()}) == 1

    def destroy(self) -> None:
        """Give the groups of the grids up; those of the collections live as long as the default group."""
        for grid in self.grids.values():
            grid.destroy()


def make_groups(layouts: Layouts, *, timeout_s: float = 600.0) -> MimoGroups:
    """Make the process groups of all components, on the backend of torch's default group.

    Collective over the default group: every rank calls it with the same layouts. No global `parallel_state` is read
    or changed. Components on the same ranks have groups of their own.

    Args:
        layouts: by component, filled in (`auto_fill_layout`).
        timeout_s: how long a collective in these groups may wait for its peers.

    Raises:
        ConfigError: the installed megatron-core is too old (`check_installed`).
        LayoutError: the layouts are for another number of ranks than the default group has.
    """
    check_installed()
    import torch.distributed as dist

    world, needed = dist.get_world_size(), max(layout.ranks.stop for layout in layouts.values())
    if world != needed:
        raise LayoutError(
            "the run has another number of ranks than the layouts",
            where=", ".join(f"{name}: ranks {o.ranks.start}-{o.ranks.stop - 1}" for name, o in layouts.items()),
            expected=f"{needed} ranks",
            got=f"{world} ranks",
            fix=f"start {needed} processes, or pass the layouts through auto_fill_layout(..., world_size={world})",
        )
    collections: dict[str, ProcessGroupCollection | None] = {}
    grids: dict[str, HyperCommGrid] = {}
    for name, layout in layouts.items():
        made = pg_collection(**_sizes(layout), ranks=layout.ranks, timeout_s=timeout_s)
        collections[name] = made if dist.get_rank() in layout.ranks else None
        grids[name] = _grid(layout)
    return MimoGroups(dict(layouts), collections, grids)


def _sizes(layout: ComponentLayout) -> dict[str, int]:
    own = layout.parallel
    return {name: getattr(own, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")}


def _grid(layout: ComponentLayout) -> HyperCommGrid:
    """mcore's grid of a component's dense layout. Collective over the default group."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    own = layout.parallel
    grid = HyperCommGrid(
        [own.tp, own.cp, own.dp, own.pp], ["tp", "cp", "dp", "pp"], rank_offset=layout.ranks.start, backend=None
    )
    grid.create_pg("pp")
    return grid


def check_installed() -> None:
    """Raise unless the installed megatron-core has a `MimoModel` whose components have groups of their own.

    Raises:
        ConfigError: it is older than 0.17. Its `MimoModel` knows neither groups nor stages, and gives the language
            model no positions (0.16.1, models/mimo/model/base.py, `MimoModel.forward`): those of images would be
            wrong in silence, also where all components are on the same ranks.
    """
    if not _takes_grids():
        raise ConfigError(
            "the installed megatron-core cannot build components with groups and positions of their own",
            where="MimoModel",
            expected="megatron-core 0.17 or newer, which needs Python 3.12",
            got="a MimoModelConfig without module_to_grid_map",
            fix="install a newer megatron-core; plans, and bridge-mimo import, export and verify, do without it",
        )


def _takes_grids() -> bool:
    from megatron.core.models.mimo.config import MimoModelConfig

    return "module_to_grid_map" in MimoModelConfig.__dataclass_fields__


def check_live(groups: MimoGroups) -> None:
    """Raise unless `MimoModel` can be built in these layouts.

    Raises:
        LayoutError: a component has several chunks per rank: `MimoModel` takes every chunk of a first stage for the
            first (0.19.2, models/mimo/config/role.py, `RankRole`).
    """
    layouts = {name: layout.parallel for name, layout in groups.layouts.items()}
    if chunked := {name: own.vpp for name, own in layouts.items() if own.vpp > 1}:
        raise LayoutError(
            "megatron-core's MimoModel has no virtual pipeline stages",
            where=", ".join(chunked),
            expected="vpp=1",
            got=", ".join(f"{name}: vpp={vpp}" for name, vpp in chunked.items()),
            fix="leave out vpp on live ranks; plans and offline conversions take it",
        )

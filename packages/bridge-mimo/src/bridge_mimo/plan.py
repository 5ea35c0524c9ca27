"""A plan of a model whose components each have their own layout and ranks."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from bridge_core.codecs import Codec
from bridge_core.dtypes import dtype_of
from bridge_core.errors import BridgeError, ConfigError, CoverageError, LayoutError, preview
from bridge_core.geometry import Shape
from bridge_core.patterns import fill
from bridge_core.plan import Audit, Plan, RankCost, Shard
from bridge_core.topology import ParallelLayout
from bridge_mimo.components import Component, Components
from bridge_mimo.layout import ComponentLayout, Layouts, check_layouts, draw_ranks, of_component


@dataclass(frozen=True)
class ComponentPlan:
    """One component's share of a plan.

    Attributes:
        component: which tensors it has, and what they are called in `MimoModel`.
        layout: its ranks in the world, and its layout on them.
        plan: core's plan of it as a model of its own: own names, ranks from 0.
    """

    component: Component
    layout: ComponentLayout
    plan: Plan

    @property
    def prefix(self) -> str:
        """What its names in `MimoModel` begin with."""
        return self.component.prefix

    def local_rank(self, rank: int) -> int:
        """Its own number of a rank of the world.

        Raises:
            LayoutError: the rank does not have the component.
        """
        if rank not in self.layout.ranks:
            ranks = self.layout.ranks
            raise LayoutError(
                f"rank {rank} does not have the component {self.component.name}",
                expected=f"{ranks.start} <= rank < {ranks.stop}",
                got=rank,
            )
        return rank - self.layout.ranks.start

    def iter_local_shards(self, rank: int) -> Iterator[Shard]:
        """What a rank of the world holds of the component, under the names of `MimoModel`."""
        for shard in self.plan.iter_local_shards(self.local_rank(rank)):
            param = self.component.target(shard.entry, shard.param)
            pieces = tuple(piece._replace(target=piece.target._replace(tensor=param)) for piece in shard.pieces)
            name, entry = self.component.target(shard.entry, shard.name), self.component.targets[shard.entry]
            yield shard._replace(param=param, name=name, pieces=pieces, entry=entry)

    def own(self, shard: Shard) -> Shard:
        """A shard of `iter_local_shards` with its entry and its name as they are in `plan`; the rest is as it was."""
        own = next(own for own, target in self.component.targets.items() if target == shard.entry)
        return shard._replace(entry=own, name=fill(own, shard.layer, shard.expert))


class MimoPlan(Plan):
    """Which part of which HF tensor every rank of the world holds, each component in its own layout.

    It is core's plan with the names of `MimoModel` and ranks of the world; `layout` says no more than how many there
    are. What is the same for all layouts (`hf_tensors`, `metadata`, ...) is inherited, and does not count prediction
    layers, which no rank holds: those are `carried`.

    Args:
        components: of the model.
        layouts: by component, filled in (`auto_fill_layout`).
        colocated: whether all components are on the same ranks.
        world_size: ranks of the run; by default what the layouts say.
        dtype, dtypes, make_vocab_size_divisible_by, padded_vocab, inventory, forms, ignore, codec, quantised: as for
            core's `Plan`; names in `forms` are those of `MimoModel`.

    Raises:
        ConfigError: a layout for a component that the model does not have, or none for one that it has.
        LayoutError: ranks overlap, are idle or outside of the world; or a component does not divide over its layout.
        CoverageError: a row of the family's table does not tile its tensors.

    Attributes:
        components: every component's share by its name.
        carried: shape of the HF tensors of prediction layers, by name.
        colocated: whether all components are on the same ranks.
    """

    def __init__(
        self,
        components: Components,
        layouts: Layouts,
        *,
        colocated: bool = False,
        world_size: int | None = None,
        dtype: str = "BF16",
        dtypes: Mapping[str, str] | None = None,
        make_vocab_size_divisible_by: int = 1,
        padded_vocab: int | None = None,
        inventory: Mapping[str, Shape] | None = None,
        forms: Mapping[str, int] | None = None,
        ignore: Sequence[str] = (),
        codec: Codec | None = None,
        quantised: Collection[str] | None = None,
    ) -> None:
        check_component_names(components, layouts)
        world = check_layouts(layouts, world_size, colocated=colocated)
        same: dict[str, Any] = {"dtype": dtype, "dtypes": dtypes, "inventory": inventory, "ignore": ignore}
        same |= {"codec": codec, "quantised": quantised}
        self.colocated = colocated
        self.components: dict[str, ComponentPlan] = {}
        for name, part in components.parts.items():
            own = {name: form for name, target in part.targets.items() if (form := (forms or {}).get(target))}
            try:
                plan = Plan(
                    part.family,
                    part.fields,
                    layouts[name].parallel,
                    make_vocab_size_divisible_by=make_vocab_size_divisible_by,
                    padded_vocab=padded_vocab if part.fields["vocab_size"] else None,
                    forms=own,
                    **same,
                )
            except BridgeError as error:
                raise of_component(name, error) from error
            if not plan.entries:
                raise ConfigError(
                    "a component would hold no tensor",
                    where=f"component {name}",
                    expected="tensors for each component",
                    got=f"ignore={', '.join(ignore)}",
                    fix="convert the language model alone with bridge-core",
                )
            self.components[name] = ComponentPlan(part, layouts[name], plan)
        super().__init__(
            components.mapped,
            components.fields,
            ParallelLayout(dp=world),
            padded_vocab=max(part.plan.padded_vocab for part in self.components.values()),
            forms=forms,
            **same,
        )
        whole = Plan(components.whole, components.fields, ParallelLayout(), forms=forms, **same)
        self.carried = {name: shape for name, shape in whole.hf_tensors.items() if name not in self.hf_tensors}

    # --- One rank ------------------------------------------------------------------------------

    def components_of(self, rank: int) -> list[str]:
        """The components of a rank of the world.

        Raises:
            LayoutError: there is no such rank.
        """
        self.layout.coords(rank)
        return [name for name, part in self.components.items() if rank in part.layout.ranks]

    def iter_local_shards(self, rank: int) -> Iterator[Shard]:
        """What a rank of the world owns of which HF tensor, component by component."""
        for name in self.components_of(rank):
            yield from self.components[name].iter_local_shards(rank)

    @cached_property
    def component_by_entry(self) -> dict[str, str]:
        """The component of every entry."""
        return {target: name for name, part in self.components.items() for target in part.component.targets.values()}

    def copy_of(self, rank: int, shard: Shard) -> tuple[int, int]:
        """The number of a rank's copy of a shard on its pipeline stage of the component, and how many there are."""
        part = self.components[self.component_by_entry[shard.entry]]
        return part.plan.copy_of(part.local_rank(rank), part.own(shard))

    def holders(self, shard: Shard) -> Hashable:
        """A key of the ranks that hold a shard: those of its component, of its kind."""
        return self.component_by_entry[shard.entry], super().holders(shard)

    def is_second_copy(self, rank: int, shard: Shard) -> bool:
        """Whether it is a later stage's copy of the embedding, for a tied output layer."""
        part = self.components[self.component_by_entry[shard.entry]]
        return part.plan.is_second_copy(part.local_rank(rank), part.own(shard))

    def component_costs(self, rank: int) -> dict[str, RankCost]:
        """Parameters and bytes that a rank of the world holds of each of its components; ranks are the component's."""
        parts = {name: self.components[name] for name in self.components_of(rank)}
        return {name: part.plan.cost(part.local_rank(rank)) for name, part in parts.items()}

    def cost(self, rank: int) -> RankCost:
        """Parameters and bytes of a rank of the world; its parts are called like `language.attention`."""
        costs = self.component_costs(rank)
        parts = {f"{name}.{part}": n for name, cost in costs.items() for part, n in cost.parts.items()}
        return RankCost(
            rank,
            self.layout.coords(rank),
            tuple(layer for cost in costs.values() for layer in cost.layers),
            sum(cost.tensors for cost in costs.values()),
            sum(cost.nbytes for cost in costs.values()),
            parts,
        )

    # --- The whole plan ------------------------------------------------------------------------

    @cached_property
    def carried_nbytes(self) -> int:
        """Bytes of the tensors that are carried."""
        return sum(
            prod(shape) * dtype_of(self.dtypes.get(name, self.dtype)).itemsize for name, shape in self.carried.items()
        )

    def audit(self, inventory: Mapping[str, Shape] | None = None) -> Audit:
        """Prove that the plan covers every element of both sides exactly once, on every component's ranks.

        Args:
            inventory: shapes of the tensors that an HF checkpoint really has; what is carried has to be among them.

        Returns:
            What is held by some rank. Tensors that are carried count nowhere; see `carried`.

        Raises:
            CoverageError: names the first tensors that are missing, unexpected, misshapen, held by no component or by
                several, or not covered exactly once, on either side.
        """
        if inventory is not None:
            self._check_carried(inventory)
        found = super().audit(inventory)
        for part in self.components.values():
            part.plan.audit()
        held = [name for part in self.components.values() for name in part.plan.hf_tensors]
        if len(held) != len(self.hf_tensors) or set(held) != self.hf_tensors.keys():
            wrong = sorted({*held} ^ {*self.hf_tensors}) or sorted({name for name in held if held.count(name) > 1})
            raise CoverageError(
                "the components do not share the model's tensors, each to one",
                where=preview(wrong),
                expected=f"{len(self.hf_tensors)} HF tensors",
                got=f"{len(held)} in all components together",
                fix="correct the routes of the components",
            )
        return found._replace(ignored=tuple(name for name in found.ignored if name not in self.carried))

    def _check_carried(self, inventory: Mapping[str, Shape]) -> None:
        missing = [name for name in self.carried if name not in inventory]
        wrong = [n for n, shape in self.carried.items() if n in inventory and tuple(inventory[n]) != tuple(shape)]
        if missing or wrong:
            raise CoverageError(
                "the HF checkpoint does not hold the prediction layers that its configuration announces",
                where=preview([*missing, *wrong]),
                expected=f"{len(self.carried)} tensors to carry",
                got=f"{len(missing)} missing, {len(wrong)} of another shape",
                fix="check that no shard file is missing, or leave them out with ignore=['mtp.*']",
            )

    def to_dict(self, rank: int | None = None) -> dict[str, Any]:
        """The plan as JSON values: components, what every rank holds, what is carried; or the pieces of one rank."""
        if rank is not None:
            return super().to_dict(rank) | {"components": self.components_of(rank)}
        parts = {
            name: {
                "ranks": [part.layout.ranks.start, part.layout.ranks.stop],
                "modules": [route.target_module_path for route in part.component.routes],
                **part.plan.to_dict(),
            }
            for name, part in self.components.items()
        }
        ranks = [{n: cost.nbytes for n, cost in self.component_costs(r).items()} for r in range(self.layout.world_size)]
        return {"family": self.family.name, "components": parts, "ranks": ranks, "carried": self.carried}

    def draw(self) -> str:
        """Who has which rank, as text."""
        layouts = {name: part.layout for name, part in self.components.items()}
        return draw_ranks(layouts, self.layout.world_size, colocated=self.colocated)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {part.layout}" for name, part in self.components.items())
        return f"MimoPlan({self.family.name}, {parts})"


def check_component_names(components: Components, layouts: Layouts) -> None:
    """Raise unless there is a layout for exactly the components of a model.

    Raises:
        ConfigError: names what is unknown or missing.
    """
    unknown = [name for name in layouts if name not in components.names]
    missing = [name for name in components.names if name not in layouts]
    if unknown or missing:
        raise ConfigError(
            f"a {components.family.name} model has other components",
            where="components",
            expected=", ".join(components.names),
            got=", ".join(layouts) or "none",
            fix="; ".join(
                [f"leave out {', '.join(unknown)}"] * bool(unknown) + [f"give {', '.join(missing)}"] * bool(missing)
            ),
        )

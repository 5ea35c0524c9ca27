"""A plan of a model whose components each have their own layout and ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError, CoverageError, LayoutError, preview
from bridge_core.geometry import Shape
from bridge_core.plan import Audit, Plan, RankCost, Shard
from bridge_core.topology import ParallelLayout

from bridge_mimo.components import Component, Components
from bridge_mimo.layout import ComponentLayout, Layouts, check_layouts, draw_ranks


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
            own, target = shard.entry, self.component.targets[shard.entry]
            head, gone = _change_of_prefix(own, target)
            param, name = head + shard.param[gone:], head + shard.name[gone:]
            pieces = tuple(piece._replace(target=piece.target._replace(tensor=param)) for piece in shard.pieces)
            yield shard._replace(param=param, name=name, pieces=pieces, entry=target)


def _change_of_prefix(own: str, target: str) -> tuple[str, int]:
    """How a name becomes its target: what is put before it, after so many characters were taken away."""
    kept = next(n for n in range(len(own), 0, -1) if target.endswith(own[-n:]))
    return target[: len(target) - kept], len(own) - kept


class MimoAudit(NamedTuple):
    """What an audit found to be covered, each element once.

    Attributes:
        components: per component, tensors of HF and Megatron and their elements.
        carried: HF tensors that no rank holds and that checkpoints carry along.
        ignored: HF tensors left out, by name.
    """

    components: dict[str, Audit]
    carried: int
    ignored: tuple[str, ...]

    @property
    def hf_tensors(self) -> int:
        """HF tensors that some rank holds a part of."""
        return sum(audit.hf_tensors for audit in self.components.values())


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
        codec: Fp8Blocks | None = None,
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
            plan = Plan(
                part.family,
                part.fields,
                layouts[name].parallel,
                make_vocab_size_divisible_by=make_vocab_size_divisible_by,
                padded_vocab=padded_vocab if part.fields["vocab_size"] else None,
                forms=own,
                **same,
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

    def mimo_audit(self, inventory: Mapping[str, Shape] | None = None) -> MimoAudit:
        """Prove that every HF element is held by one component or carried, and every Megatron element is filled once.

        Args:
            inventory: shapes of the tensors that an HF checkpoint really has; carried ones have to be there too.

        Raises:
            CoverageError: names the first tensors that are missing, unexpected, misshapen, or not covered
                exactly once.
        """
        whole = self.audit(inventory)
        found = {name: part.plan.audit() for name, part in self.components.items()}
        held = [name for part in self.components.values() for name in part.plan.hf_tensors]
        if sorted(held) != sorted(self.hf_tensors):
            wrong = sorted({*held} ^ {*self.hf_tensors}) or sorted({name for name in held if held.count(name) > 1})
            raise CoverageError("components do not share the model's tensors", where=preview(wrong), got=len(held))
        ignored = tuple(name for name in whole.ignored if name not in self.carried)
        return MimoAudit(found, len(self.carried), ignored)

    def audit(self, inventory: Mapping[str, Shape] | None = None) -> Audit:
        """Core's audit of the whole model; the carried tensors of an inventory are among the ignored, and checked."""
        if inventory is not None:
            if missing := [name for name in self.carried if name not in inventory]:
                raise CoverageError(
                    "the HF checkpoint lacks prediction layers that its configuration announces",
                    where=preview(missing),
                    expected=f"{len(self.carried)} tensors to carry",
                    got=f"{len(missing)} of them missing",
                    fix="leave them out with ignore=['mtp.*']",
                )
            wrong = [name for name, shape in self.carried.items() if tuple(inventory[name]) != tuple(shape)]
            if wrong:
                raise CoverageError(
                    f"{len(wrong)} carried tensor(s) have another shape than config.json says",
                    where=preview(wrong),
                    expected=self.carried[wrong[0]],
                    got=tuple(inventory[wrong[0]]),
                )
        return super().audit(inventory)

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
        return draw_ranks({name: part.layout for name, part in self.components.items()}, self.layout.world_size)

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

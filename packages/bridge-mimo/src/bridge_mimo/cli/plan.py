"""`bridge-mimo plan`: which rank has which component and how many bytes, from a config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bridge_core.cli.convert import Ignore, IgnoreOption
from bridge_core.cli.plan import rank_ranges, rank_table
from bridge_core.cli.tables import facts, in_bytes, in_count, table
from bridge_mimo.cli.layouts import Colocated, Component, HfTower, WorldSize, read_components

if TYPE_CHECKING:
    from bridge_core.plan import Audit, RankCost
    from bridge_mimo.plan import MimoPlan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show which rank has which component, and how many bytes. Needs a config.json, no weights."""

    config: Annotated[Path, "config.json, or the folder that it is in."]
    component: Component = ()
    world_size: WorldSize = None
    colocated: Colocated = False
    hf_tower: HfTower = ()
    make_vocab_size_divisible_by: Annotated[
        int, "The vocabulary is padded to a multiple of this times the language component's tp."
    ] = 1
    ignore: Ignore = ()
    ignore_option: IgnoreOption = ()
    rank: Annotated[int | None, "Show what this one rank holds; with --json, its manifest of pieces."] = None
    draw: Annotated[Path | None, "Draw the plan to this file as well: .svg, .png or .pdf. Needs the extra `draw`."] = (
        None
    )
    json: Annotated[bool, "Print the plan as JSON."] = False

    def run(self) -> int:
        """Plan, audit, draw, print."""
        plan = self.plan()
        audit = plan.audit()
        if self.draw is not None:
            from bridge_mimo.draw import draw_plan

            draw_plan(plan, self.draw)
        if self.json:
            print(plan.to_json(self.rank))
        elif self.rank is not None:
            print(_one_rank(plan, self.rank))
        else:
            print(_summary(plan, audit), plan.draw(), _costs(plan), sep="\n\n")
        return 0

    def plan(self) -> MimoPlan:
        """The plan that the options ask for.

        Raises:
            BridgeError: the configuration or a layout is not understood, or they do not fit.
        """
        from bridge_core.checkpoint.hf_folder import read_config
        from bridge_mimo.bridge import MegatronMIMOBridge

        bridge = MegatronMIMOBridge.from_hf_config(
            read_config(self.config),
            ignore=self.ignore,
            ignore_options=self.ignore_option,
            parallelism=read_components(self.component) or None,
            world_size=self.world_size,
            colocated=self.colocated,
        ).with_hf_towers(*self.hf_tower)
        return bridge.plan(make_vocab_size_divisible_by=self.make_vocab_size_divisible_by)


def _summary(plan: MimoPlan, audit: Audit) -> str:
    nbytes = sum(meta.nbytes for meta in plan.metadata())
    carried = f"{len(plan.carried)} tensors of prediction layers, {in_bytes(plan.carried_nbytes)}, on no rank"
    return facts([
        ("family", plan.family.name),
        ("HF", f"{audit.hf_tensors} tensors, {in_count(audit.elements)} parameters, {in_bytes(nbytes)} ({plan.dtype})"),
        ("carried", carried if plan.carried else None),
        ("audit", "every element of both sides is covered exactly once"),
    ])  # fmt: skip


def _costs(plan: MimoPlan) -> str:
    """A line per component and group of its ranks that hold the same amounts."""
    groups: dict[object, list[tuple[int, RankCost]]] = {}
    for rank in range(plan.layout.world_size):
        for name, cost in plan.component_costs(rank).items():
            alike = (name, cost.coords.pp, cost.layers, cost.tensors, *sorted(cost.parts.items()))
            groups.setdefault(alike, []).append((rank, cost))
    order = list(plan.components)
    rows = []
    for (name, *_), held in sorted(groups.items(), key=lambda item: order.index(item[0][0])):  # type: ignore[index]
        cost = held[0][1]
        parts = [f"{part} {in_bytes(nbytes)}" for part, nbytes in cost.parts.items() if nbytes]
        ranks = rank_ranges(rank for rank, _ in held)
        rows.append([name, ranks, rank_ranges(cost.layers), cost.tensors, in_bytes(cost.nbytes), ", ".join(parts)])
    head = ["component", "ranks", "layers", "tensors", "bytes", "what"]
    return table(head, rows, right=("tensors", "bytes")) + "\n\nNumbers are per rank."


def _one_rank(plan: MimoPlan, rank: int) -> str:
    costs = plan.component_costs(rank)
    held = [(name, f"layers {rank_ranges(cost.layers)}, {in_bytes(cost.nbytes)}") for name, cost in costs.items()]
    return f"{facts([('rank', rank), *held])}\n\n{rank_table(plan, rank)}"

"""Which ranks a component has, and its parallel layout on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from bridge_core.errors import BridgeError, LayoutError
from bridge_core.topology import ParallelLayout

LANGUAGE = "language"
"""The component that every model has (megatron-core 0.19.2, models/mimo/config/role.py, `MIMO_LANGUAGE_MODULE_KEY`)."""


@dataclass(frozen=True, kw_only=True)
class ComponentLayout:
    """How one component is spread over its ranks, and which ranks these are.

    Attributes:
        tp, pp, vpp, cp, ep, etp, num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage,
            pipeline_model_parallel_layout: as in `bridge_core.ParallelLayout`.
        dp: data-parallel size of dense weights; None leaves it to `auto_fill_layout`.
        rank_offset: the component's first rank in the world; its ranks follow one another. None leaves it to
            `auto_fill_layout`.

    Raises:
        LayoutError: the sizes contradict each other, or the offset is no whole number of at least 0.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int | None = None
    rank_offset: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    pipeline_model_parallel_layout: str | None = None

    def __post_init__(self) -> None:
        offset = self.rank_offset
        if offset is not None and (type(offset) is not int or offset < 0):
            raise LayoutError(
                "rank_offset is not a rank", where="rank_offset", expected="an int >= 0", got=repr(offset)
            )
        _ = self.parallel

    @cached_property
    def parallel(self) -> ParallelLayout:
        """The layout with ranks counted from the component's first; the smallest `dp` that fits if that is open."""
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "rank_offset"}
        return ParallelLayout(**options)

    @property
    def world_size(self) -> int:
        """Number of the component's ranks."""
        return self.parallel.world_size

    @property
    def ranks(self) -> range:
        """The component's ranks in the world; from 0 on while the offset is open."""
        first = self.rank_offset or 0
        return range(first, first + self.world_size)

    def to_dict(self) -> dict[str, Any]:
        """All options that are not at their default, as JSON values; `ComponentLayout(**options)` reads them back."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if value != getattr(ComponentLayout, name)}

    def __str__(self) -> str:
        shown = {"tp": self.tp} | self.to_dict()
        return " ".join(f"{name}={value}" for name, value in shown.items() if name != "rank_offset")


Layouts = Mapping[str, ComponentLayout]


def auto_fill_layout(
    components: Layouts, world_size: int | None = None, *, colocated: bool = False
) -> dict[str, ComponentLayout]:
    """The layouts with all open `dp` and `rank_offset` filled in, checked.

    Components without `dp` share the ranks that those with `dp` leave, equally. Components without `rank_offset` go,
    in the order given, to the first ranks that are free and enough. Colocated components all have all ranks.

    Args:
        components: layout by component; must name `language`.
        world_size: ranks of the run; by default as many as are needed at the least.
        colocated: all components on the same ranks, in place of each on its own.

    Raises:
        LayoutError: no `language`; ranks that do not divide, overlap, are idle or outside of the world. Says the
            numbers and draws who has which rank.
    """
    _check_names(components)
    if world_size is not None and (type(world_size) is not int or world_size < 1):
        raise LayoutError("world_size is no number of ranks", where="world_size", expected=">= 1", got=repr(world_size))
    if colocated:
        filled = _fill_colocated(components, world_size)
    else:
        filled = _fill_disjoint(components, world_size)
    check_layouts(filled, world_size, colocated=colocated)
    return filled


def check_layouts(layouts: Layouts, world_size: int | None = None, *, colocated: bool = False) -> int:
    """Raise unless filled-in layouts give every rank of the world something to do; returns the size of the world.

    Each component has ranks of its own, or (colocated) all have the same; megatron-core 0.19.2 knows nothing between
    (models/mimo/config/role.py, `RankRole.build`). Colocated components have no pipeline there.

    Raises:
        LayoutError: as for `auto_fill_layout`.
    """
    _check_names(layouts)
    if open_ := [n for n, layout in layouts.items() if layout.dp is None or layout.rank_offset is None]:
        raise LayoutError(
            "layouts are not filled in",
            where=", ".join(open_),
            expected="dp and rank_offset",
            fix="pass them through auto_fill_layout",
        )
    needed = max(layout.ranks.stop for layout in layouts.values())
    world = needed if world_size is None else world_size
    if needed > world:
        what = "a component has ranks outside of the world"
        raise _wrong(what, layouts, world, f"ranks 0 to {world - 1}", colocated=colocated)
    if colocated:
        if any(layout.ranks != range(world) for layout in layouts.values()):
            what = "colocated components do not have the same ranks"
            raise _wrong(what, layouts, world, f"all {world} ranks each", colocated=True)
        _check_no_pipeline(layouts)
        return world
    parts = _parts({name: layout.ranks for name, layout in layouts.items()}, world)
    if any(len(names) > 1 for _, names in parts):
        fix = "choose other offsets, leave them out, or ask for colocated components"
        raise _wrong("components overlap", layouts, world, "ranks of its own for each component", fix)
    if not all(names for _, names in parts):
        fix = "raise dp or lower the number of ranks"
        raise _wrong("ranks have no component", layouts, world, "a component on every rank", fix)
    return world


def draw_ranks(layouts: Layouts, world_size: int, *, colocated: bool = False) -> str:
    """Who has which rank: a line per component, a column per rank (or per group of ranks in a large world).

    A rank that two components have is marked `!` unless they are colocated, one that nobody has `?`, one outside of
    the world `+`.
    """
    held = {name: (layout.ranks, str(layout)) for name, layout in layouts.items()}
    return _draw(held, world_size, shared=colocated)


def _draw(held: Mapping[str, tuple[range, str]], world: int, *, shared: bool = False) -> str:
    """Ranks by component, each with what is to be said of them."""
    spans = {name: ranks for name, (ranks, _) in held.items()}
    parts = _parts(spans, world)
    last = parts[-1][0].stop
    step = -(-last // _COLUMNS)
    columns = [range(first, min(first + step, last)) for first in range(0, last, step)]
    width = max(map(len, (*held, "ranks")))
    rows = [f"{'ranks':<{width}}  0 to {world - 1}" + (f", {step} per column" if step > 1 else "")]
    for name, (ranks, said) in held.items():
        marks = "".join("#" if _meet(ranks, column) else "." for column in columns)
        rows.append(f"{name:<{width}}  {marks}  {_span(ranks)}: {said}")
    wrong = "".join(_mark(column, parts, world, shared=shared) for column in columns)
    if wrong.strip():
        rows.append(f"{'':<{width}}  {wrong}".rstrip())
    return "\n".join(rows)


_COLUMNS = 64


def _mark(column: range, parts: list[tuple[range, list[str]]], world: int, *, shared: bool) -> str:
    if column.stop > world:
        return "+"
    held = [names for ranks, names in parts if _meet(ranks, column)]
    if any(len(names) > 1 for names in held) and not shared:
        return "!"
    return " " if all(held) else "?"


def _meet(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def _span(ranks: range) -> str:
    return f"{ranks.start}-{ranks.stop - 1}" if len(ranks) > 1 else str(ranks.start)


def _parts(spans: Mapping[str, range], world: int) -> list[tuple[range, list[str]]]:
    """Ranks that the same components have, as far as anybody reaches; each with these components."""
    cuts = sorted({0, world} | {end for ranks in spans.values() for end in (ranks.start, ranks.stop)})
    parts = [range(first, stop) for first, stop in pairwise(cuts)]
    return [(part, [name for name, ranks in spans.items() if _meet(ranks, part)]) for part in parts]


def _wrong(
    what: str, layouts: Layouts, world: int, expected: str, fix: str | None = None, *, colocated: bool = False
) -> LayoutError:
    drawn = _indented(draw_ranks(layouts, world, colocated=colocated))
    return LayoutError(what, where=", ".join(layouts), expected=expected, got=drawn, fix=fix)


def _indented(drawn: str) -> str:
    return "\n    ".join(["", *drawn.splitlines()])


def of_component(name: str, error: BridgeError) -> BridgeError:
    """The same error, which says the component that it is about."""
    where = f"component {name}" + (f", {error.where}" if error.where is not None else "")
    return type(error)(error.what, where=where, expected=error.expected, got=error.got, fix=error.fix)


def _check_names(layouts: Layouts) -> None:
    if LANGUAGE not in layouts:
        raise LayoutError(
            "no component is called language",
            where="components",
            expected=f"{LANGUAGE} and others",
            got=", ".join(layouts) or "none",
            fix="name the decoder that makes text so",
        )


def _check_no_pipeline(layouts: Layouts) -> None:
    if piped := {name: layout.pp for name, layout in layouts.items() if layout.pp > 1}:
        raise LayoutError(
            "colocated components cannot have a pipeline",
            where=", ".join(piped),
            expected="pp=1: megatron-core builds colocated components whole on every rank",
            got=", ".join(f"{name}: pp={pp}" for name, pp in piped.items()),
            fix="give each component ranks of its own, or leave out pp",
        )


def _fill_colocated(components: Layouts, world: int | None) -> dict[str, ComponentLayout]:
    world = world or max(layout.world_size for layout in components.values())
    shares = {name: world for name, layout in components.items() if not layout.dp}
    filled = {name: replace(layout, rank_offset=layout.rank_offset or 0) for name, layout in components.items()}
    return _with_shares(filled, shares, world, colocated=True)


def _fill_disjoint(components: Layouts, world: int | None) -> dict[str, ComponentLayout]:
    """Sizes first, then places."""
    open_ = [name for name, layout in components.items() if layout.dp is None]
    if world is None:
        found = {name: replace(layout, dp=layout.parallel.dp) for name, layout in components.items()}
        return _with_offsets(found)
    sized = {name: layout for name, layout in components.items() if name not in open_}
    taken = sum(layout.world_size for layout in sized.values())
    left = world - taken
    if open_ and (left <= 0 or left % len(open_)):
        drawn = _indented(draw_ranks(_with_offsets(sized), world)) if sized else ""
        raise LayoutError(
            "ranks do not divide over the components without dp",
            where=", ".join(open_),
            expected=f"a positive multiple of {len(open_)} ranks",
            got=f"{world} ranks - {taken} of components with dp = {left}{drawn}",
            fix="give dp for one of them, or change the number of ranks",
        )
    shares = {name: left // len(open_) for name in open_}
    return _with_offsets(_with_shares(components, shares, world))


def _with_shares(
    components: Layouts, shares: Mapping[str, int], world: int, *, colocated: bool = False
) -> dict[str, ComponentLayout]:
    """The layouts, those of `shares` with the `dp` that gives them so many ranks.

    Raises:
        LayoutError: a share is no multiple of a component's sizes; draws the shares.
    """
    found: dict[str, ComponentLayout] = dict(components)
    for name, ranks in shares.items():
        layout = components[name]
        unit = layout.tp * layout.pp * layout.cp
        if ranks % unit:
            drawn = _draw_shares(components, shares, world, colocated=colocated)
            raise LayoutError(
                "a component's share of the ranks is no multiple of tp*pp*cp",
                where=name,
                expected=f"a multiple of {layout.tp}*{layout.pp}*{layout.cp} = {unit}",
                got=f"{ranks} of {world} ranks{_indented(drawn)}",
                fix="change its sizes or the number of ranks, or give dp for every component",
            )
        try:
            found[name] = replace(layout, dp=ranks // unit)
        except LayoutError as error:
            raise of_component(name, error) from error
    return found


def _draw_shares(components: Layouts, shares: Mapping[str, int], world: int, *, colocated: bool) -> str:
    """Ranks as they would be shared out, one component after the other where they are not colocated."""
    held: dict[str, tuple[range, str]] = {}
    first = 0
    for name, layout in components.items():
        count = shares.get(name, layout.world_size)
        held[name] = (range(first, first + count), str(layout))
        first += 0 if colocated else count
    return _draw(held, world, shared=colocated)


def _with_offsets(layouts: Layouts) -> dict[str, ComponentLayout]:
    """Open offsets filled in: the first ranks that are free and enough, component by component."""
    used = sorted((o.ranks for o in layouts.values() if o.rank_offset is not None), key=lambda ranks: ranks.start)
    filled: dict[str, ComponentLayout] = {}
    for name, layout in layouts.items():
        if layout.rank_offset is None:
            first = 0
            for ranks in used:
                if ranks.start >= first + layout.world_size:
                    break
                first = max(first, ranks.stop)
            layout = replace(layout, rank_offset=first)
            used = sorted([*used, layout.ranks], key=lambda ranks: ranks.start)
        filled[name] = layout
    return filled

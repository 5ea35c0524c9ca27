"""A plan as a picture: ranks from left to right, a row per component, and what each rank of it holds in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.cli.tables import in_bytes
from bridge_core.errors import ConfigError, OutputError
from bridge_core.extras import require

if TYPE_CHECKING:
    from bridge_mimo.plan import ComponentPlan, MimoPlan

FORMATS = (".svg", ".png", ".pdf")
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
_MOST = 512
_ROOM = 0.6  # inches that a text needs


def draw_plan(plan: MimoPlan, path: str | Path) -> Path:
    """Write a picture of who has which rank, and how many bytes each of them holds.

    Args:
        plan: of the model.
        path: file; its suffix says the format.

    Raises:
        ConfigError: the suffix is none of `FORMATS`, or the world is too large to be drawn.
        OutputError: the file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    world = plan.layout.world_size
    if path.suffix not in FORMATS or world > _MOST:
        raise ConfigError(
            "the plan cannot be drawn",
            where=path,
            expected=f"a file name that ends in {', '.join(FORMATS)}, and at most {_MOST} ranks",
            got=f"{path.suffix or 'no suffix'}, {world} ranks",
        )
    figures = require("matplotlib.figure", extra="draw", package="bridge-mimo")
    width = max(6.0, min(24.0, 0.9 * world))
    figure = figures.Figure(figsize=(width, 1.2 + 0.9 * len(plan.components)))
    axes = figure.add_subplot()
    for row, (name, part) in enumerate(plan.components.items()):
        colour = _COLOURS[row % len(_COLOURS)]
        _boxes(axes, row, part, colour)
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        for ranks, text in _texts(plan, name):
            if len(ranks) * width / world >= _ROOM:
                middle = (ranks.start + ranks.stop) / 2
                axes.text(middle, row, text, ha="center", va="center", fontsize=8, color="white", bbox=box)
        axes.text(-0.2, row, f"{name}\n{part.layout}", ha="right", va="center", fontsize=8)
    axes.set_xlim(0, world)
    axes.set_ylim(len(plan.components) - 0.5, -0.5)
    step = max(1, world // 16)
    axes.set_xticks([rank + 0.5 for rank in range(0, world, step)], [str(rank) for rank in range(0, world, step)])
    axes.set_yticks([])
    axes.set_xlabel("rank")
    axes.set_title(f"{plan.family.name}: bytes per rank", fontsize=10)
    try:
        # The same plan gives the same file.
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise OutputError("cannot write a picture", where=path, got=error) from error
    return path


def _boxes(axes: Any, row: int, part: ComponentPlan, colour: str) -> None:
    """A box for every tensor-parallel group, with marks between its ranks."""
    ranks, tp = part.layout.ranks, part.layout.tp
    for first in ranks[::tp]:
        axes.barh(row, tp, left=first, height=0.8, align="center", color=colour, edgecolor="white", linewidth=1.5)
        for rank in range(first + 1, first + tp):
            for top in (row - 0.4, row + 0.25):
                axes.plot([rank, rank], [top, top + 0.15], color="white", linewidth=0.8)


def _texts(plan: MimoPlan, name: str) -> Iterator[tuple[range, str]]:
    """Ranks of a component that follow one another on the same stage and hold the same amount, and what it is."""
    layout = plan.components[name].layout

    def said(rank: int) -> str:
        cost = plan.component_costs(rank)[name]
        return (f"pp {cost.coords.pp}\n" if layout.pp > 1 else "") + in_bytes(cost.nbytes)

    for text, alike in groupby(layout.ranks, key=said):
        ranks = list(alike)
        yield range(ranks[0], ranks[-1] + 1), text

"""The figures of a benchmark, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bars import COMMAND_SECONDS, IMPORT_SECONDS, MANY_SMALL_SECONDS, PLAN_SECONDS, RATIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CP, FIXED, BEYOND, BAR = "#8a8f98", "#c9ccd1", "#2f6f9f", "#b3412e"


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG: a panel for each shape, and one for planning."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shapes = results["shapes"]
    size = (4.2 * (len(shapes) + 1), 3.6)
    figure, grid = pyplot.subplots(1, len(shapes) + 1, figsize=size, layout="constrained", squeeze=False)
    axes = grid[0]
    for panel, (shape, found) in zip(axes, shapes.items(), strict=False):
        _conversion(panel, shape, found)
    _planning(axes[-1], results["planning"])
    machine = results["machine"]
    figure.suptitle(
        f"bridge-core {results['versions']['bridge-core']} on {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB, {machine['file_system']}; medians of {results['rounds']}, dots are runs",
        fontsize=9,
        color="#444444",
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _conversion(panel: Axes, shape: str, found: dict[str, Any]) -> None:
    cp = found["cp"]["seconds"]["median"]
    panel.bar("cp -r", cp, color=CP, width=0.6)
    _dots(panel, "cp -r", found["cp"]["runs"])
    for name in ("import", "export"):
        fixed, beyond = found[name]["fixed"]["median"], found[name]["beyond"]["median"]
        bar = fixed + (MANY_SMALL_SECONDS if shape == "many-small" else RATIO * cp)
        first = name == "import"
        panel.bar(name, fixed, color=FIXED, width=0.6, label="start of Python, imports" if first else None)
        panel.bar(name, beyond, bottom=fixed, color=BEYOND, width=0.6, label="conversion" if first else None)
        panel.hlines(bar, *_extent(name), color=BAR, linewidth=1.5, label="bar" if first else None)
        _dots(panel, name, found[name]["runs"])
    _finish(panel, f"{shape}, {found['bytes'] / 1e9:.2g} GB")
    panel.set_ylim(top=1.3 * panel.get_ylim()[1])  # room for the legend
    panel.legend(fontsize=7, frameon=False, loc="upper left")


def _planning(panel: Axes, found: dict[str, Any]) -> None:
    heights = {
        "import\nbridge_core": (found["import"]["seconds"]["median"], IMPORT_SECONDS),
        "plan, audit,\nall shards": (found["plan"]["seconds"], PLAN_SECONDS),
        "bridge-core\nplan": (found["command"]["seconds"]["median"], COMMAND_SECONDS),
    }
    for place, (name, (height, bar)) in enumerate(heights.items()):
        panel.bar(name, height, color=BEYOND, width=0.6)
        panel.hlines(bar, place - 0.35, place + 0.35, color=BAR, linewidth=1.5)
        panel.annotate(f"{height:.2f}", (place, height), ha="center", va="bottom", fontsize=8)
    layout = found["layout"]
    _finish(panel, f"{found['config']}, TP{layout['tp']} PP{layout['pp']} EP{layout['ep']}")


def _extent(name: str) -> tuple[float, float]:
    place = {"import": 1, "export": 2}[name]
    return place - 0.35, place + 0.35


def _dots(panel: Axes, name: str, runs: list[dict[str, Any]]) -> None:
    panel.plot([name] * len(runs), [run["seconds"] for run in runs], "o", color="#222222", markersize=2.5, alpha=0.7)


def _finish(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_ylabel("seconds", fontsize=8)
    panel.set_ylim(bottom=0)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)

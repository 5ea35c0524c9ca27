"""The bars that figures are held to, and the table that shows both."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

from bridge_core.cli.tables import in_bytes
from bridge_core.extras import require

MIB = 1024 * 1024
RATIO = 1.2
MEMORY = 256 * MIB
# Where tensors are many and small, `cp` is no measure: cost per tensor decides.
MANY_SMALL_SECONDS = 5.0
PLAN_SECONDS = 1.0
# For the shards of all ranks of the widest layout.
WIDE_SECONDS = 30.0
IMPORT_SECONDS = 0.2
COMMAND_SECONDS = 2.0


class Figure(NamedTuple):
    """A line of the table. `met` is None for a figure without a bar."""

    what: str
    value: str
    bar: str = ""
    met: bool | None = None
    note: str = ""


def figures(results: dict[str, Any]) -> Iterator[Figure | None]:
    """The lines of the table; None between groups."""
    for shape, found in results["shapes"].items():
        yield Figure(f"[bold]{shape}[/]", "", note=in_bytes(found["bytes"]))
        yield Figure("cp -r", _seconds(found["cp"]["seconds"]))
        for name in ("import", "export"):
            yield from _direction(name, shape, found[name])
        yield None
    for ranks, found in results["live"].items():
        yield from _live(ranks, found)
        yield None
    yield from _planning(results["planning"])


def _live(ranks: str, found: dict[str, Any]) -> Iterator[Figure]:
    layout = " x ".join(f"{name.upper()}{size}" for name, size in found["layout"].items()) or "one rank"
    yield Figure(f"[bold]live, {ranks} rank(s)[/]", "", note=f"{layout}, {in_bytes(found['bytes'])}")
    yield Figure("cp -r", _seconds(found["cp"]))
    for name, verb in found.items():
        if not isinstance(verb, dict) or "ratio" not in verb:
            continue
        shares = ", ".join(map(in_bytes, verb["bytes"]))
        sent = f"; sent {', '.join(map(in_bytes, verb['sent']))}" if any(verb["sent"]) else ""
        yield Figure(name, _seconds(verb["seconds"]), note=f"each rank's bytes: {shares}{sent}")
        yield Figure("  of cp", f"{verb['ratio']:.2f} x")
        yield Figure("  collectives per rank", f"{max(verb['collectives'])}")
        yield Figure("  peak memory beyond the model", f"{max(verb['memory']) / MIB:.0f} MiB", note="not page cache")
    other = found["megatron-bridge"]
    if isinstance(other, str):
        yield Figure("Megatron-Bridge", other)
        return
    for verb, seconds in other.items():
        yield Figure(f"Megatron-Bridge, {verb}", _seconds(seconds))
        yield Figure("  of cp", f"{seconds['median'] / found['cp']['median']:.2f} x")


def _direction(what: str, shape: str, found: dict[str, Any]) -> Iterator[Figure]:
    fixed, beyond, ratio = found["fixed"]["median"], found["beyond"], found["ratio"]
    note = f"{found['tensors']} tensors, {in_bytes(found['nbytes'])}"
    yield Figure(f"{what}, whole process", _seconds(found["seconds"]), note=note)
    yield Figure("  processor time", _seconds(found["cpu"]))
    yield Figure("  start of Python and imports", f"{fixed:.2f} s")
    if shape == "many-small":
        met = beyond["median"] < MANY_SMALL_SECONDS
        yield Figure("  beyond that", _seconds(beyond), f"< {MANY_SMALL_SECONDS:.0f} s", met)
    else:
        yield Figure("  beyond that", _seconds(beyond))
        yield Figure("  beyond that, of cp", f"{ratio:.2f} x", f"<= {RATIO} x", ratio <= RATIO)
    extra = found["memory_beyond"]
    idle = found["idle_memory"]["anonymous"] / MIB
    yield Figure(
        "  peak memory, not page cache",
        f"{extra / MIB:.0f} MiB",
        f"<= {MEMORY // MIB} MiB",
        extra <= MEMORY,
        f"above {idle:.0f} MiB idle; resident set {found['memory']['resident'] / MIB:.0f} MiB",
    )
    moved = found["moved"]
    ways = ", ".join(f"{name} {in_bytes(moved[name])}" for name in ("kernel", "gathered", "staged") if moved[name])
    yield Figure("  tensors moved", in_bytes(sum(moved.values()) - moved["read"]), note=ways)
    disk = found["io"]["read_bytes"]
    yield Figure(
        "  read and written",
        f"{in_bytes(found['io']['rchar'])}, {in_bytes(found['io']['wchar'])}",
        note=f"{in_bytes(disk)} of it from the disk" if disk else "",
    )


def _planning(found: dict[str, Any]) -> Iterator[Figure]:
    seconds = found["import"]["seconds"]["median"]
    torch = found["import"]["torch"]
    note = "torch is imported" if torch else "no torch"
    yield Figure(
        "import bridge_core", f"{seconds:.3f} s", f"< {IMPORT_SECONDS} s", seconds < IMPORT_SECONDS and not torch, note
    )
    yield from _planned(found, "seconds")
    yield from _planned(found["wide"], "one_rank")
    command = found["command"]["seconds"]
    yield Figure(
        "bridge-core plan, whole command",
        _seconds(command),
        f"< {COMMAND_SECONDS:.0f} s",
        command["median"] < COMMAND_SECONDS,
        f"resident set {found['command']['resident'] / MIB:.0f} MiB",
    )


def _planned(found: dict[str, Any], what: str) -> Iterator[Figure]:
    """The figures of one model; the first bar is for every rank (`seconds`) or for a single one (`one_rank`)."""
    plan, layout = found["plan"], found["layout"]
    sizes = " x ".join(f"{name.upper()}{layout[name]}" for name in ("tp", "pp", "ep"))
    ranks = "every rank" if what == "seconds" else "one rank"
    yield Figure(
        f"planning {found['config']}, {ranks}",
        f"{plan[what]:.2f} s",
        f"< {PLAN_SECONDS:.0f} s",
        plan[what] < PLAN_SECONDS,
        f"{sizes}: {plan['ranks']:,.0f} ranks, {plan['hf_tensors']:,.0f} tensors, {plan['shards']:,.0f} shards",
    )
    yield Figure("  plan, audit", f"{plan['plan']:.3f} s, {plan['audit']:.3f} s")
    yield Figure(
        "  local_shards of every rank",
        f"{plan['local_shards']:.2f} s",
        f"< {WIDE_SECONDS:.0f} s",
        plan["local_shards"] < WIDE_SECONDS,
        f"{plan['pieces']:,.0f} pieces",
    )


def _seconds(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} s ({found['min']:.2f} to {found['max']:.2f})"


def busy_elsewhere(results: dict[str, Any]) -> float:
    """Processors that were busy with something else while conversions were timed: the median of all runs."""
    shapes = results["shapes"].values()
    if not shapes:
        return 0.0
    return median(run["others"] for found in shapes for name in ("import", "export") for run in found[name]["runs"])


def table(results: dict[str, Any]) -> None:
    """Print the figures beside their bars."""
    console = require("rich.console", extra="cli").Console()
    if not console.is_terminal:
        console.width = 120
    load, after = results["load_average"]["before"][0], results["load_average"]["after"][0]
    machine = results["machine"]
    shown = require("rich.table", extra="cli").Table(
        title=f"bridge-core {results['versions']['bridge-core']}, {results['date'][:10]}",
        caption=(
            f"Medians of {results['rounds']} rounds (extremes). {machine['cores']} cores, "
            f"{machine['memory'] / 2**30:.0f} GiB, {machine['file_system']}, Python {machine['python']}. "
            f"Load average {load:.1f} before, {after:.1f} after; "
            f"{busy_elsewhere(results):.1f} cores busy with other things during the runs."
        ),
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "measured", "bar", "", "note"):
        shown.add_column(column, no_wrap=column != "note")
    for figure in figures(results):
        if figure is None:
            shown.add_section()
            continue
        verdict = {None: "", True: "[green]met[/]", False: "[bold red]not met[/]"}[figure.met]
        shown.add_row(figure.what, figure.value, figure.bar, verdict, figure.note)
    console.print(shown)

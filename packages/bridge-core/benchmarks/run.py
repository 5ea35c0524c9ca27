"""`hatch run bench`: conversions and live models beside `cp -r` of the same bytes, and planning.

See docs/benchmarks.md.

Writes `bench.json` and `bench.png`, and prints a table with the bars that the figures are held to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bars import table
from conversions import make_source, measure_shape, program
from live import LAYOUTS
from measure import ChildFailedError, peak_memory, spread, timed
from synthetic import SHAPES

from bridge_core.errors import BridgeError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIVE = "qwen3-0.6b"
CONVERTED = ("qwen3-1.7b", "many-small")
PLANNED = "qwen3-235b-a22b"
LAYOUT = {
    "tp": 4,
    "pp": 4,
    "ep": 8,
    # 94 layers do not divide by 4.
    "num_layers_in_first_pipeline_stage": 23,
    "num_layers_in_last_pipeline_stage": 23,
}
# The most tensors that anybody publishes: fp8 weights with their scales.
WIDE = "deepseek-v3"
WIDE_CONFIG = Path(__file__).parents[1] / "tests/published/deepseek-v3.json"
WIDE_LAYOUT = {
    "tp": 8,
    "pp": 16,
    "ep": 64,
    "etp": 1,
    "dp": 8,
    "pipeline_model_parallel_layout": "|".join(["Et*3", *["t*4"] * 14, "t*2mL"]),
}

_IMPORT = """
import time
start = time.perf_counter()
import bridge_core
seconds = time.perf_counter() - start
import json, sys
print(json.dumps({"seconds": seconds, "torch": "torch" in sys.modules, "modules": len(sys.modules)}))
"""


def measure_planning(folder: Path, *, rounds: int) -> dict[str, Any]:
    """`import bridge_core`, planning for all ranks, and `bridge-core plan` as a whole command."""
    config = folder / "config.json"
    config.write_text(json.dumps(SHAPES[PLANNED]), encoding="utf-8")
    options = [part for name, value in LAYOUT.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    planner = [sys.executable, str(Path(__file__).with_name("planning.py"))]
    planning = [*planner, str(config), json.dumps(LAYOUT)]
    wide = [*planner, str(WIDE_CONFIG), json.dumps(WIDE_LAYOUT)]
    command = [program(), "plan", str(config), *options]
    imports, plans, wides, commands, bare = [], [], [], [], []
    for warm in ([sys.executable, "-c", _IMPORT], planning, command):
        timed(warm)
    for _ in range(rounds):
        imports.append(json.loads(timed([sys.executable, "-c", _IMPORT]).output))
        plans.append(json.loads(timed(planning).output))
        wides.append(json.loads(timed(wide).output))
        commands.append(timed(command))
        bare.append(timed([sys.executable, "-c", ""]))
    return {
        "config": PLANNED,
        "layout": LAYOUT,
        "python": spread([run.seconds for run in bare]),
        "import": {
            "seconds": spread([found["seconds"] for found in imports]),
            "torch": any(found["torch"] for found in imports),
        },
        "plan": _medians(plans),
        "wide": {"config": WIDE, "layout": WIDE_LAYOUT, "plan": _medians(wides)},
        "command": {
            "seconds": spread([run.seconds for run in commands]),
            "cpu": spread([run.cpu for run in commands]),
            "resident": peak_memory(command).resident,
        },
    }


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: spread([found[name] for found in runs])["median"] for name in runs[0]}


def measure_live(folder: Path, ranks: list[int], *, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Load and save of a live model, by the number of ranks; each in a process of its own, which starts them."""
    source = make_source(LIVE, folder)
    results = {}
    for number in ranks:
        say(f"{LIVE}: live on {number} rank(s)")
        command = [sys.executable, str(Path(__file__).with_name("live.py")), str(source), str(folder)]
        results[str(number)] = json.loads(timed([*command, str(number), str(rounds)]).output.splitlines()[-1])
    return results


def machine() -> dict[str, Any]:
    """What the figures depend on, without names of the machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": page * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on."""
    path, found = str(folder.resolve()), ("", "unknown")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind, *_ = line.split()
        inside = mount == "/" or path == mount or path.startswith(f"{mount}/")
        if inside and len(mount) >= len(found[0]):
            found = mount, kind
    return found[1]


@contextmanager
def workplace(folder: Path | None, out: Path) -> Iterator[Path]:
    """The folder given, which keeps the synthetic checkpoints for the next time, or one that goes away."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    # Not the system's temporary folder: that is often in memory.
    with tempfile.TemporaryDirectory(prefix="work-", dir=out) as made:
        yield Path(made)


def measure(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that was asked for, as JSON values."""
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("bridge-core", "numpy", "ml-dtypes")},
        "rounds": arguments.rounds,
        "options": arguments.option,
        "load_average": {"before": os.getloadavg()},
    }
    with workplace(arguments.folder, arguments.out) as folder:
        # Every import finds compiled modules, as it does in an installed package.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str((folder / "bytecode").resolve())
        results["machine"]["file_system"] = file_system(folder)
        say(f"planning {PLANNED}")
        results["planning"] = measure_planning(folder, rounds=arguments.rounds)
        results["live"] = measure_live(folder, arguments.live, rounds=arguments.rounds, say=say)
        results["shapes"] = {
            shape: measure_shape(shape, folder, rounds=arguments.rounds, options=arguments.option, say=say)
            for shape in arguments.shape
        }
    results["load_average"]["after"] = os.getloadavg()
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [shape for shape in SHAPES if shape not in (PLANNED, LIVE)]
    parser.add_argument("--shape", nargs="*", choices=shapes, default=list(CONVERTED), help="default: both")
    parser.add_argument(
        "--live", nargs="*", type=int, choices=LAYOUTS, default=list(LAYOUTS), help="numbers of ranks; default: 1 2 4"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are put, and sources kept; default: a folder that goes away"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="passed on to import and export, for example --option=--threads=1"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print. 0 whether the bars were met or not: a busy machine is no error."""
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        results = measure(arguments, say)
    except (BridgeError, ChildFailedError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    (arguments.out / "bench.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    # Late, and after everything was measured: the plot's library is large.
    from plot import draw

    draw(results, arguments.out / "bench.png")
    table(results)
    print(f"written: {arguments.out / 'bench.json'}, {arguments.out / 'bench.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

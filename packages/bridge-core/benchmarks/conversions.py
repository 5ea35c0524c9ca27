"""Import and export of one synthetic checkpoint, in alternation with `cp -r` of the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import ChildFailedError, Memory, Timed, idle, idle_memory, peak_memory, probe, spread, timed
from synthetic import SHAPES

from bridge_core import verify
from bridge_core.checkpoint.hf_folder import CONFIG
from bridge_core.checkpoint.output import check_space
from bridge_core.families import family_for
from bridge_core.plan import Plan
from bridge_core.topology import ParallelLayout

DIRECTIONS = ("import", "export")
Say = Callable[[str], None]


def program() -> str:
    """The `bridge-core` command that was installed beside this Python.

    Raises:
        ChildFailedError: there is none.
    """
    found = shutil.which("bridge-core", path=str(Path(sys.executable).parent))
    if found is None:
        raise ChildFailedError(f"no bridge-core command beside {sys.executable}: install the package")
    return found


def make_source(shape: str, folder: Path) -> Path:
    """The synthetic checkpoint of a shape; made unless it is there already.

    Raises:
        OutputError: no room for it, its conversion and a copy of both.
    """
    source = folder / shape
    if not (source / CONFIG).is_file():  # written last
        config = SHAPES[shape]
        plan = Plan(family_for(config), family_for(config).to_megatron(config), ParallelLayout())
        # Small tensors take more room in a Megatron folder, with a header for each.
        check_space(source, 4 * sum(tensor.nbytes for tensor in plan.metadata()) + 200_000_000)
        # Not here: this process stays small, because a child's peak memory begins with that of its parent.
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("synthetic.py")), shape, source],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return source


def measure_shape(shape: str, folder: Path, *, rounds: int, options: Sequence[str], say: Say) -> dict[str, Any]:
    """All figures of one shape.

    Args:
        shape: a key of `SHAPES`.
        folder: where the source, its conversion and the copies are put.
        rounds: how often everything is timed.
        options: further options of `import` and `export`.
        say: told what happens.

    Raises:
        ChildFailedError: a command failed, or the export is not what was imported.
    """
    say(f"{shape}: making the checkpoint")
    source = make_source(shape, folder)
    megatron, out = folder / f"{shape}-megatron", folder / f"{shape}-out"
    for left in (megatron, out):
        _remove(left)
    commands = {
        "cp": ["cp", "-r", str(source), str(out)],
        "import": [program(), "import", str(source), str(out), "--json", *options],
        "export": [program(), "export", str(megatron), str(out), "--json", *options],
    }
    say(f"{shape}: converting there and back once, to warm up and to compare")
    modules = {
        "import": probe(["import", str(source), str(megatron), *options]),
        "export": probe(["export", str(megatron), str(out), *options]),
    }
    check_equal(source, out)
    say(f"{shape}: watching memory")
    memory: dict[str, tuple[Memory, Memory]] = {}
    for name in DIRECTIONS:
        _remove(out)
        memory[name] = peak_memory(commands[name]), idle_memory(modules[name])
    runs: dict[str, list[Timed]] = {name: [] for name in ("cp", *DIRECTIONS, "idle-import", "idle-export")}
    loads = []
    for number in range(rounds):
        loads.append(os.getloadavg()[0])
        for name in order(number):
            _remove(out)
            if name in DIRECTIONS:
                runs[f"idle-{name}"].append(timed(idle(modules[name])))
            runs[name].append(timed(commands[name]))
        last = ", ".join(f"{name} {runs[name][-1].seconds:.2f} s" for name in commands)
        say(f"{shape}: round {number + 1} of {rounds}: {last}")
    for left in (megatron, out):
        _remove(left)
    return {
        "bytes": sum(file.stat().st_size for file in source.iterdir()),
        "load_average": loads,
        "cp": summary(runs["cp"]),
        **{name: direction(runs, name, *memory[name]) for name in DIRECTIONS},
    }


def order(number: int) -> list[str]:
    """The timed commands of a round; each comes first in turn, so that none profits from its place."""
    names = ["cp", *DIRECTIONS]
    first = number % len(names)
    return names[first:] + names[:first]


def direction(runs: dict[str, list[Timed]], name: str, memory: Memory, idle: Memory) -> dict[str, Any]:
    """The figures of import or export. "Beyond" is beyond the fixed cost, round by round."""
    fixed = [run.seconds for run in runs[f"idle-{name}"]]
    beyond = [run.seconds - cost for run, cost in zip(runs[name], fixed, strict=True)]
    report = json.loads(runs[name][-1].output)
    cp = spread([run.seconds for run in runs["cp"]])["median"]
    return summary(runs[name]) | {
        "fixed": spread(fixed),
        "beyond": spread(beyond),
        "ratio": spread(beyond)["median"] / cp,
        "memory": {"anonymous": memory.anonymous, "resident": memory.resident},
        "idle_memory": {"anonymous": idle.anonymous, "resident": idle.resident},
        "memory_beyond": memory.anonymous - idle.anonymous,
        "tensors": report["tensors"],
        "nbytes": report["nbytes"],
        "moved": report["moved"],
    }


def summary(runs: Sequence[Timed]) -> dict[str, Any]:
    """Wall time of runs of one command, what it cost the processor, what it read and wrote, and every run."""
    return {
        "seconds": spread([run.seconds for run in runs]),
        "cpu": spread([run.cpu for run in runs]),
        "max_rss": max(run.max_rss for run in runs),
        # rchar and wchar count what system calls moved; read_bytes what had to come from the disk.
        "io": {name: spread([run.io[name] for run in runs])["median"] for name in ("rchar", "wchar", "read_bytes")},
        "runs": [run.to_dict() for run in runs],
    }


def check_equal(source: Path, out: Path) -> None:
    """Raise unless two HF folders hold the same tensors, bit for bit: wrong bytes have no speed."""
    found = verify(source, out)
    if not found.ok:
        raise ChildFailedError(f"an export is not what was imported: {found.counts}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)

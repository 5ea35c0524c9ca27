"""What a child process costs: wall time, CPU, bytes, memory. Linux only: it reads /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

SAMPLING = 0.002
"""Seconds between two looks at the memory of a process."""

# Imports the modules named by its argument, says so, and stays until its input ends.
_IDLE = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
print("ready", flush=True)
sys.stdin.read()
"""

# Runs a command line of bridge-core, then writes down which modules that took.
_PROBE = """
import sys
from bridge_core.cli import main
code = main(sys.argv[2:])
found = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None) and name != "__main__"]
with open(sys.argv[1], "w") as out:
    out.write(" ".join(found))
sys.exit(code)
"""


class ChildFailedError(RuntimeError):
    """A measured command did not succeed; its figures would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One run of a command.

    Attributes:
        seconds: wall time, from before the process is made until it has ended.
        cpu: seconds of processor time, its own and the system's on its behalf.
        others: processors that were busy with something else meanwhile (the system's write-back included).
        stolen: processors that the hypervisor gave to another machine meanwhile.
        io: the counters of /proc/PID/io at the end.
        max_rss: largest resident set, page cache that is mapped included. Not below that of the measuring
            process, whose memory a child has until it becomes another program.
        output: what the command printed.
    """

    seconds: float
    cpu: float
    others: float
    stolen: float
    io: dict[str, int]
    max_rss: int
    output: str

    def to_dict(self) -> dict[str, Any]:
        """All but the output, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


class Memory(NamedTuple):
    """Peak bytes of a process: what is not page cache (anonymous and shared memory), and the resident set."""

    anonymous: int
    resident: int


def timed(command: Sequence[str]) -> Timed:
    """Run a command after all dirty pages were written, so that it does not pay for what ran before it.

    Raises:
        ChildFailedError: its exit code is not 0.
    """
    os.sync()
    with _child(command, stdin=subprocess.DEVNULL) as (child, output):
        # Waits for its end and leaves it there, so that its counters can be read, complete.
        os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - child.started
        after = _machine_cpu()
        io = _numbers(f"/proc/{child.process.pid}/io")
        _, status, usage = os.wait4(child.process.pid, 0)
        child.process.returncode = os.waitstatus_to_exitcode(status)
        printed = output()
    cpu = usage.ru_utime + usage.ru_stime
    return Timed(
        seconds=seconds,
        cpu=cpu,
        others=max(0.0, after.busy - child.before.busy - cpu) / seconds,
        stolen=(after.stolen - child.before.stolen) / seconds,
        io=io,
        max_rss=usage.ru_maxrss * 1024,
        output=printed,
    )


def peak_memory(command: Sequence[str]) -> Memory:
    """Run a command and watch its memory. Not to be timed: watching takes processor time.

    Raises:
        ChildFailedError: its exit code is not 0.
    """
    peak = Memory(0, 0)
    with _child(command, stdin=subprocess.DEVNULL) as (child, _):
        while child.process.poll() is None:
            now = memory_of(child.process.pid)
            peak = Memory(max(peak.anonymous, now.anonymous), max(peak.resident, now.resident))
            time.sleep(SAMPLING)
    return peak


def memory_of(pid: int | str) -> Memory:
    """What a process holds now, and its largest resident set so far; zeros if it is about to end."""
    try:
        found = _numbers(f"/proc/{pid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return Memory(0, 0)
    return Memory((found.get("RssAnon", 0) + found.get("RssShmem", 0)) * 1024, found.get("VmHWM", 0) * 1024)


def probe(arguments: Sequence[str]) -> str:
    """Run a command line of bridge-core; returns the names of the modules that were imported for it, in order.

    Raises:
        ChildFailedError: it failed.
    """
    with tempfile.NamedTemporaryFile("r") as found:
        with _child([sys.executable, "-c", _PROBE, found.name, *arguments], stdin=subprocess.DEVNULL) as (child, _):
            child.process.wait()
        return found.read()


def idle(modules: str) -> list[str]:
    """A command that imports modules and does nothing else."""
    return [sys.executable, "-c", _IDLE, modules]


def idle_memory(modules: str) -> Memory:
    """Memory of a process that has imported modules and waits."""
    child = subprocess.Popen(idle(modules), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise ChildFailedError("a process that only imports modules ended early")
        return memory_of(child.pid)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": median(values), "min": min(values), "max": max(values)}


class _Cpu(NamedTuple):
    busy: float
    stolen: float


def _machine_cpu() -> _Cpu:
    """Processor seconds of the whole machine since it started: spent, and given to other machines."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, irq, soft, stolen = map(int, file.readline().split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return _Cpu((user + nice + system + irq + soft) / tick, stolen / tick)


def _numbers(path: str) -> dict[str, int]:
    """The lines `Name: number ...` of a file in /proc."""
    found = {}
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        if (first := rest.split()[:1]) and first[0].isdigit():
            found[name] = int(first[0])
    return found


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    started: float
    before: _Cpu


@contextmanager
def _child(command: Sequence[str], *, stdin: int) -> Iterator[tuple[_Child, Callable[[], str]]]:
    """A running command, and a function that gives what it printed.

    It prints into files: a pipe would have to be read, and it would not look like a quiet batch job.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:

        def output() -> str:
            out.seek(0)
            return out.read().decode()

        before, started = _machine_cpu(), time.perf_counter()
        process = subprocess.Popen(command, stdin=stdin, stdout=out, stderr=err)
        try:
            yield _Child(process, started, before), output
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        if process.returncode:
            err.seek(0)
            shown = textwrap.shorten(" ".join(command), 120)
            raise ChildFailedError(f"exit code {process.returncode}: {shown}\n{err.read().decode()}")

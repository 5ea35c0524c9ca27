"""`bridge-core`: plan, import, export, verify, inspect, demo.

Exit codes: 0 all is well; 1 an error, or a verification that found differences; 2 wrong usage;
130 interrupted. Errors go to stderr in the form that `BridgeError` gives them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bridge_core import __version__
from bridge_core.cli.command import guarded, run_command
from bridge_core.cli.convert import Export, Import
from bridge_core.cli.inspect import Inspect
from bridge_core.cli.plan import Plan
from bridge_core.cli.verify import Verify

PROGRAM = "bridge-core"
DESCRIPTION = """\
Hugging Face <-> Megatron-Core checkpoints: planned, audited, bit-exact.

Every verb has its own --help. Verbs with --json print one JSON value to stdout."""


@dataclass(frozen=True)
class Demo:
    """Make small real models, convert them both ways, and show that logits and bytes are equal."""

    def run(self, arguments: Sequence[str] = ()) -> int:
        """Hand over to the demo, which has options of its own."""
        return import_module("bridge_core.cli.demo").main(list(arguments)) or 0


VERBS: dict[str, type[Any]] = {
    "plan": Plan,
    "import": Import,
    "export": Export,
    "verify": Verify,
    "inspect": Inspect,
    "demo": Demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `run_command`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        return guarded(PROGRAM, lambda: Demo().run(arguments[1:]))
    return run_command(arguments, VERBS, program=PROGRAM, description=DESCRIPTION, version=__version__)

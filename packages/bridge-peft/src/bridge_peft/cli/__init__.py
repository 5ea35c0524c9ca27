"""`bridge-peft`: export, import, merge, inspect.

Exit codes: 0 all is well; 1 an error; 2 wrong usage; 130 interrupted. Errors go to stderr in the form that
`BridgeError` gives them, warnings in one line each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge_core.cli.command import run_command
from bridge_peft import __version__
from bridge_peft.cli.verbs import Export, Import, Inspect, Merge

PROGRAM = "bridge-peft"
DESCRIPTION = """\
LoRA adapters between Megatron-Core and Hugging Face, without a model, a GPU or the base's weights.

Every verb has its own --help. Verbs with --json print one JSON value to stdout."""

VERBS: dict[str, type[Any]] = {"export": Export, "import": Import, "merge": Merge, "inspect": Inspect}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `bridge_core.cli.command.run_command`."""
    return run_command(argv, VERBS, program=PROGRAM, description=DESCRIPTION, version=__version__)

"""`bridge-mimo`: plan, import, export, verify.

Exit codes: 0 all is well; 1 an error; 2 wrong usage; 130 interrupted. Errors go to stderr in the form that
`BridgeError` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge_core.cli.command import run_command
from bridge_mimo import __version__
from bridge_mimo.cli.plan import Plan
from bridge_mimo.cli.verbs import Export, Import, Verify

PROGRAM = "bridge-mimo"
DESCRIPTION = """\
Multimodal models between Hugging Face and Megatron-Core's MimoModel, each component in its own parallel layout.

Every verb has its own --help. Verbs with --json print one JSON value to stdout."""

VERBS: dict[str, type[Any]] = {"plan": Plan, "import": Import, "export": Export, "verify": Verify}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `bridge_core.cli.command.run_command`."""
    return run_command(argv, VERBS, program=PROGRAM, description=DESCRIPTION, version=__version__)

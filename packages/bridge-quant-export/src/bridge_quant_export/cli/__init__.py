"""`bridge-quant-export`: export saved models; inspect, verify and retag quantised checkpoint folders.

Exit codes: 0 all is well; 1 an error, or a verification that found something wrong; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge_core.cli.command import run_command
from bridge_quant_export import __version__
from bridge_quant_export.cli.verbs import Export, Inspect, Retag, Verify

PROGRAM = "bridge-quant-export"
DESCRIPTION = """\
Quantised checkpoints for serving engines: what they hold, whether they are sound, and in the other format.

Live models are exported with bridge_quant_export.export_quantized. Every verb has its own --help."""

VERBS: dict[str, type[Any]] = {"export": Export, "inspect": Inspect, "verify": Verify, "retag": Retag}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `bridge_core.cli.command.run_command`."""
    return run_command(argv, VERBS, program=PROGRAM, description=DESCRIPTION, version=__version__)

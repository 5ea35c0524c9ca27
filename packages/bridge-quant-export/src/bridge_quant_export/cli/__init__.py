"""`bridge-quant-export`: export saved models; inspect, verify and retag quantised checkpoint folders.

Exit codes: 0 all is well; 1 an error, or a verification that found something wrong; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bridge_core.cli.options import UsageError, parse
from bridge_core.errors import BridgeError
from bridge_quant_export import __version__
from bridge_quant_export.cli.verbs import Export, Inspect, Retag, Verify

PROGRAM = "bridge-quant-export"
DESCRIPTION = """\
Quantised checkpoints for serving engines: what they hold, whether they are sound, and in the other format.

Live models are exported with bridge_quant_export.export_quantized. Every verb has its own --help."""

VERBS: dict[str, type[Any]] = {"export": Export, "inspect": Inspect, "verify": Verify, "retag": Retag}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, by default that of this process.

    Returns:
        The exit code. Wrong usage and `--help` end in a `SystemExit`, as command lines do.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = parse(arguments, VERBS, program=PROGRAM, description=DESCRIPTION, version=__version__).run()
        sys.stdout.flush()
        return code
    except BridgeError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130

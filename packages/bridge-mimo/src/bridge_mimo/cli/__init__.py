"""`bridge-mimo`: plan, import, export, verify.

Exit codes: 0 all is well; 1 an error; 2 wrong usage; 130 interrupted. Errors go to stderr in the form that
`BridgeError` gives them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from bridge_core.cli.options import UsageError, parse
from bridge_core.errors import BridgeError
from bridge_mimo import __version__
from bridge_mimo.cli.plan import Plan
from bridge_mimo.cli.verbs import Export, Import, Verify

PROGRAM = "bridge-mimo"
DESCRIPTION = """\
Multimodal models between Hugging Face and Megatron-Core's MimoModel, each component in its own parallel layout.

Every verb has its own --help. Verbs with --json print one JSON value to stdout."""

VERBS: dict[str, type[Any]] = {"plan": Plan, "import": Import, "export": Export, "verify": Verify}


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
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BridgeError as error:
        # Under torchrun every worker learns of an error; one of them says it.
        if int(os.environ.get("RANK") or 0) == 0:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1

"""`bridge-peft`: export, import, merge, inspect.

Exit codes: 0 all is well; 1 an error; 2 wrong usage; 130 interrupted. Errors go to stderr in the form that
`BridgeError` gives them, warnings in one line each.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from bridge_core.cli.options import UsageError, parse
from bridge_core.errors import BridgeError
from bridge_peft import __version__
from bridge_peft.cli.verbs import Export, Import, Inspect, Merge

PROGRAM = "bridge-peft"
DESCRIPTION = """\
LoRA adapters between Megatron-Core and Hugging Face, without a model, a GPU or the base's weights.

Every verb has its own --help. Verbs with --json print one JSON value to stdout."""

VERBS: dict[str, type[Any]] = {"export": Export, "import": Import, "merge": Merge, "inspect": Inspect}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, by default that of this process.

    Returns:
        The exit code. Wrong usage and `--help` end in a `SystemExit`, as command lines do.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *rest: print(f"{PROGRAM}: {message}", file=sys.stderr)  # type: ignore[assignment]
    try:
        code = parse(arguments, VERBS, program=PROGRAM, description=DESCRIPTION, version=__version__).run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BridgeError as error:
        return _failed(error)
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = "a file could not be read or written"
        return _failed(BridgeError(what, where=error.filename, got=error.strerror or error))
    finally:
        warnings.showwarning = shown


def _failed(error: BridgeError) -> int:
    from bridge_core.runtime.workers import RendezvousError

    # Under torchrun every worker learns of an error; one of them says it. Workers that have not met all do.
    if int(os.environ.get("RANK") or 0) == 0 or isinstance(error, RendezvousError):
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1

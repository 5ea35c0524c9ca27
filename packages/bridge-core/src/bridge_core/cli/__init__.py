"""`bridge-core`: plan, import, export, verify, inspect, demo.

Exit codes: 0 all is well; 1 an error, or a verification that found differences; 2 wrong usage;
130 interrupted. Errors go to stderr in the form that `BridgeError` gives them.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bridge_core import __version__
from bridge_core.cli.convert import Export, Import
from bridge_core.cli.inspect import Inspect
from bridge_core.cli.options import UsageError, parse
from bridge_core.cli.plan import Plan
from bridge_core.cli.verify import Verify
from bridge_core.errors import BridgeError

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
    """Run one command; `argv` without the program's name, by default that of this process.

    Returns:
        The exit code. Wrong usage and `--help` end in a `SystemExit`, as command lines do.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _allow_many_files()
    try:
        if arguments[:1] == ["demo"]:
            return Demo().run(arguments[1:])
        code = parse(arguments, VERBS, program=PROGRAM, description=DESCRIPTION, version=__version__).run()
        sys.stdout.flush()
        return code
    except BridgeError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = "a file could not be read or written"
        return _failed(BridgeError(what, where=error.filename, got=error.strerror or error))


def _allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may: a checkpoint of 512 ranks has 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _failed(error: BridgeError) -> int:
    from bridge_core.runtime.workers import RendezvousError

    # Under torchrun every worker learns of an error; one of them says it. Workers that have not met all do.
    if int(os.environ.get("RANK") or 0) == 0 or isinstance(error, RendezvousError):
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1

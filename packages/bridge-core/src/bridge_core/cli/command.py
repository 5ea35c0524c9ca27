"""How every `bridge-*` command runs: options are parsed, a verb runs, errors and warnings are said in one form."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bridge_core.cli.options import UsageError, parse
from bridge_core.errors import BridgeError


def run_command(
    argv: Sequence[str] | None, verbs: Mapping[str, type[Any]], *, program: str, description: str, version: str
) -> int:
    """Run one command line.

    Args:
        argv: arguments without the program's name; by default those of this process.
        verbs: a dataclass per verb, whose fields are its options and whose `run` returns the exit code.
        program, description, version: what `--help` and `--version` say.

    Returns:
        The verb's exit code; 1 after an error, 2 for wrong usage, 130 if interrupted. Wrong usage of options and
        `--help` end in a `SystemExit`, as command lines do. Errors and warnings go to stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(
        program, lambda: parse(arguments, verbs, program=program, description=description, version=version).run()
    )


def guarded(program: str, step: Callable[[], int]) -> int:
    """The exit code of a step of a command, whose errors and warnings are said in the program's name."""
    _allow_many_files()
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *rest: print(f"{program}: {message}", file=sys.stderr)  # type: ignore[assignment]
    try:
        code = step()
        sys.stdout.flush()
        return code
    except BridgeError as error:
        return _failed(program, error)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = "a file could not be read or written"
        return _failed(program, BridgeError(what, where=error.filename, got=error.strerror or error))
    finally:
        warnings.showwarning = shown


def _allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may: a checkpoint of 512 ranks has 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _failed(program: str, error: BridgeError) -> int:
    from bridge_core.runtime.workers import RendezvousError

    # Under torchrun every worker learns of an error; one of them says it. Workers that have not met all do.
    if int(os.environ.get("RANK") or 0) == 0 or isinstance(error, RendezvousError):
        print(f"{program}: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1

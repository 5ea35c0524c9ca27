"""Command lines from dataclasses: a verb is a frozen dataclass, its fields are its options.

argparse does the work. It starts in 20 ms; typed command-line libraries that were tried here took half a
second, which is more than all of planning a model with 37,000 tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from bridge_core.errors import BridgeError


class UsageError(BridgeError, ValueError):
    """An option has a value that it cannot have. The command ends with exit code 2."""


class Verb(Protocol):
    """One verb of a command, with its options."""

    def run(self) -> int:
        """Do it; returns the exit code."""
        ...


def parse(
    arguments: Sequence[str], verbs: Mapping[str, type[Any]], *, program: str, description: str, version: str
) -> Verb:
    """The verb that a command line asks for, with its options.

    Args:
        arguments: the command line without the program's name.
        verbs: dataclasses by the word that asks for them; the first line of their docstring is their help.

    Raises:
        SystemExit: `--help` and `--version` (0), or a command line that is not understood (2).
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{program} {version}")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for word, verb in verbs.items():
        text = verb.__doc__ or ""
        sub = subparsers.add_parser(word, help=text.partition("\n")[0], description=text, allow_abbrev=False)
        # Types are looked up for the verb that is asked for alone.
        if word in arguments:
            _add_options(sub, verb)
    values = vars(parser.parse_args(arguments))
    return verbs[values.pop("verb")](**{name: _frozen(value) for name, value in values.items()})


def _add_options(parser: argparse.ArgumentParser, verb: type[Any]) -> None:
    """Fields are `Annotated[type, help]`; one without a default is given by its place."""
    hints = get_type_hints(verb, include_extras=True)
    for field in fields(verb):
        annotation, text = get_args(hints[field.name])
        name, text, how = field.name.replace("_", "-"), text.replace("%", "%%"), _how(annotation)
        if field.default is MISSING:
            how["metavar"] = name.upper()
            parser.add_argument(field.name, help=text, **how)
            continue
        # argparse collects in a list what becomes a tuple again in `_frozen`.
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        shown = f" Default: {default}." if default or type(default) is int else ""
        parser.add_argument(f"--{name}", default=default, help=text + shown, **how)


def _how(annotation: Any) -> dict[str, Any]:
    """What argparse has to know of a type: bool, X, X | None, tuple[X, ...], or a Literal of strings as X."""
    if annotation is bool:
        return {"action": "store_true"}
    many = get_origin(annotation) is tuple
    if get_origin(annotation) in (tuple, Union, UnionType):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    how = {"type": annotation, "metavar": "TEXT" if annotation is str else annotation.__name__.upper()}
    return how | {"nargs": "+", "action": "extend"} if many else how


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

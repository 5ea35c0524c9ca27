"""Layouts of components as they are written on a command line: `language=tp=4,pp=2`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

from bridge_core.cli.options import UsageError
from bridge_core.errors import LayoutError
from bridge_mimo.layout import ComponentLayout, of_component

Component = Annotated[
    tuple[str, ...],
    "A component and its layout: language=tp=4,pp=2. Sizes are tp, pp, vpp, cp, ep, etp, dp, rank_offset; what is left "
    "out is 1, dp and rank_offset are filled in. Give the option once per component.",
]
WorldSize = Annotated[int | None, "Ranks of the run; as many as the layouts need at the least if not given."]
HfTower = Annotated[
    tuple[str, ...],
    "A component whose tower is to be HF's own, whole on every rank (images). Give the option once per component.",
]
Colocated = Annotated[bool, "All components on the same ranks, in place of each on its own."]

_NUMBERS = tuple(item.name for item in fields(ComponentLayout) if item.name != "pipeline_model_parallel_layout")


def read_components(texts: Sequence[str]) -> dict[str, ComponentLayout]:
    """Layouts by component, in the order given.

    Raises:
        UsageError: a text is not understood, or a component is named twice.
        LayoutError: sizes contradict each other.
    """
    found: dict[str, ComponentLayout] = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        if not name or name in found:
            raise _misread("a component is named twice" if name else "a component has no name", text)
        options: dict[str, Any] = {}
        for size in filter(None, sizes.split(",")):
            option, _, value = size.partition("=")
            if option not in _NUMBERS or option in options or not value.isascii() or not value.isdigit():
                raise _misread(f"a size of {name} is not understood: {size!r}", text)
            options[option] = int(value)
        try:
            found[name] = ComponentLayout(**options)
        except LayoutError as error:
            raise of_component(name, error) from error
    return found


def _misread(what: str, text: str) -> UsageError:
    return UsageError(
        what,
        where=f"--component {text}",
        expected=f"NAME=SIZE=NUMBER,..., each once; sizes are {', '.join(_NUMBERS)}",
        got=text,
        fix="write it like --component language=tp=4,pp=2 --component images=tp=2",
    )

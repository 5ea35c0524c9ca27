"""Names with holes: `model.layers.{layer}.mlp.{gate,up}_proj.weight`.

Two kinds of braces. `{layer}` and `{expert}` are holes, filled with a number; the closed list of
holes is `HOLES`. Braces with a comma are alternatives, as in a shell: they make several names.
"""

from __future__ import annotations

import re
from functools import lru_cache

HOLES = ("layer", "expert")
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")
_HOLE = re.compile(r"\\\{(layer|expert)\\\}")


def alternatives(pattern: str) -> tuple[str, ...]:
    """All names that the comma braces of `pattern` stand for, in the order written."""
    found = _ALTERNATIVES.search(pattern)
    if found is None:
        return (pattern,)
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return tuple(name for choice in found[1].split(",") for name in alternatives(head + choice + tail))


def holes(pattern: str) -> tuple[str, ...]:
    """Which holes a pattern has, in the order of `HOLES`."""
    return tuple(hole for hole in HOLES if f"{{{hole}}}" in pattern)


def fill(pattern: str, layer: int = 0, expert: int = 0) -> str:
    """The name with its holes filled; numbers that the pattern has no hole for are ignored."""
    return pattern.replace("{layer}", str(layer)).replace("{expert}", str(expert))


@lru_cache(maxsize=4096)
def at_layer(pattern: str, layer: int) -> tuple[str, ...]:
    """The parts of a name around its expert's number: `str(expert).join(parts)` is `fill(pattern, layer, expert)`.

    Where names are made by the hundred thousand, most of a name is the same for all experts of a layer.
    """
    return tuple(pattern.replace("{layer}", str(layer)).split("{expert}"))


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(_HOLE.sub(r"(?P<\1>[0-9]+)", re.escape(pattern)))


def match(pattern: str, name: str) -> dict[str, int] | None:
    """The numbers that fill the holes of `pattern` so that it becomes `name`; None if none do."""
    found = _regex(pattern).fullmatch(name)
    return None if found is None else {hole: int(number) for hole, number in found.groupdict().items()}

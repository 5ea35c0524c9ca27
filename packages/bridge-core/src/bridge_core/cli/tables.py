"""Plain text for people: aligned columns, and numbers with units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> str:
    """Rows below a head, in aligned columns; columns whose head is in `right` are aligned to the right."""
    cells = [list(head), *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = set(right)
    lines = []
    for row in [cells[0], ["-" * width for width in widths], *cells[1:]]:
        padded = (
            cell.rjust(width) if name in aligned else cell.ljust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A fact per line, names to the left; facts that are None or empty are left out."""
    held = [(name, str(value)) for name, value in pairs if value is not None and str(value)]
    width = max(len(name) for name, _ in held)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in held)


def in_bytes(nbytes: float) -> str:
    """A number of bytes with a decimal unit, as disks are sold: `3.4 GB`."""
    return _scaled(nbytes, (" B", " kB", " MB", " GB", " TB"))


def in_count(number: float) -> str:
    """A number of parameters: `235.1 B`."""
    return _scaled(number, ("", " K", " M", " B", " T"))


def _scaled(number: float, units: Sequence[str]) -> str:
    """A number below 1000 and its unit; units grow by 1000, the last one has no bound."""
    step = 0
    while number >= 1000 and step < len(units) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.1f}{units[step]}" if step else f"{number:.0f}{units[0]}"

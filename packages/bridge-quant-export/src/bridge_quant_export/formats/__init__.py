"""The formats that weights are packed into, by name. Importing this needs no torch; packing does."""

from __future__ import annotations

from collections.abc import Callable

from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import fp8, fp8_block, fp8_channel, int4, int8, mxfp4, mxfp8, nvfp4
from bridge_quant_export.formats.format import Format

_FIXED = (
    fp8.FORMAT,
    fp8_channel.FORMAT,
    fp8_block.FORMAT,
    nvfp4.FORMAT,
    nvfp4.W4A16,
    mxfp4.FORMAT,
    mxfp4.W4A16,
    mxfp4.W4A8,
    mxfp8.FORMAT,
    int8.FORMAT,
    int8.WEIGHT_ONLY,
    int8.SMOOTHQUANT,
)
_GROUPED: dict[str, Callable[[int], Format]] = {
    "int4": int4.int4,
    "int4_awq": int4.int4_awq,
    "w4a8_awq": int4.w4a8_awq,
}
FORMATS: dict[str, Format] = {found.name: found for found in (*_FIXED, *(make(128) for make in _GROUPED.values()))}
"""Every format, by name; those with a free group size with 128."""


def format_of(name: str, group_size: int | None = None) -> Format:
    """The format of a given name.

    Args:
        name: a key of `FORMATS`.
        group_size: elements that share a scale; only the INT4 formats have a choice.

    Raises:
        FormatError: there is none, or it has another group size.
    """
    if name in _GROUPED:
        size = 128 if group_size is None else group_size
        if size < 8 or size % 8:
            raise FormatError("no such group size", where=name, expected="a multiple of 8", got=group_size)
        return _GROUPED[name](size)
    found = FORMATS.get(name)
    if found is None:
        raise FormatError("no such format", expected=", ".join(FORMATS), got=name)
    if group_size not in (None, found.group_size):
        raise FormatError(
            f"{found.title} has a fixed group size", where=name, expected=found.group_size, got=group_size
        )
    return found

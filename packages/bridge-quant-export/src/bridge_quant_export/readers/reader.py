"""What a serving engine requires of a quantised layer, as data, and the comparison with what would be written.

Shapes are written in terms of the weight's: N rows (output features), K columns (input features), G the group size.
They are taken from the engine's loader, not from the formats here, so that one can be checked against the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bridge_core.geometry import Shape
from bridge_quant_export.formats.format import TensorSpec, Writer

SCALAR = "scalar"
"""A shape of no dims or of one element: loaders of scales per tensor take either."""
MODEL_DTYPES = ("F32", "F16", "BF16")


class Takes(NamedTuple):
    """One tensor that a loader looks for.

    Attributes:
        dtypes: safetensors' names that it takes as they are, or casts without harm.
        shape: `SCALAR`, or one expression per dim: `N`, `K/16`, `ceil(N/128)`, `1`.
    """

    dtypes: tuple[str, ...]
    shape: str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a loader requires of each layer in one format.

    Attributes:
        tensors: by suffix; all must be there.
        optional: further suffixes that it ignores or takes.
        shared: suffixes whose values must be equal in layers that the engine fuses (q/k/v, gate/up).
        source: file and version of the loader.
    """

    tensors: Mapping[str, Takes]
    optional: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    source: str


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A program that loads checkpoints.

    Attributes:
        name: its name.
        reads: what it needs, by writer and format.
        refuses: why it does not read the others, by writer and format.
        mixes: formats that may stand beside each other in one checkpoint, by writer.
        config: keys that it requires in `quantization_config`, by writer.
        own_config: keys that it requires under `quantization` in `hf_quant_config.json`, by format.
    """

    name: str
    reads: Mapping[tuple[Writer, str], Needs]
    refuses: Mapping[tuple[Writer, str], str]
    mixes: Mapping[Writer, frozenset[str]] = field(default_factory=dict)
    config: Mapping[Writer, tuple[str, ...]] = field(default_factory=dict)
    own_config: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def misfits(needs: Needs, tensors: Iterable[TensorSpec], weight: Shape, group_size: int | None = None) -> list[str]:
    """How the tensors of a layer differ from what a loader requires; empty if they do not.

    Args:
        needs: what it requires.
        tensors: what would be, or was, written for the layer.
        weight: shape of the unquantised weight.
        group_size: of the format, where it has one.
    """
    found = {spec.suffix: spec for spec in tensors}
    wrong = [f"{suffix} is missing" for suffix in needs.tensors if suffix not in found]
    wrong += [f"{suffix} is not known" for suffix in found if suffix not in {*needs.tensors, *needs.optional}]
    for suffix, takes in needs.tensors.items():
        if suffix not in found:
            continue
        spec = found[suffix]
        if spec.dtype not in takes.dtypes:
            wrong.append(f"{suffix} is {spec.dtype}, not {' or '.join(takes.dtypes)}")
        if takes.shape == SCALAR:
            fits = spec.shape in ((), (1,))
        else:
            fits = spec.shape == tuple(_length(part, weight, group_size) for part in takes.shape)
        if not fits:
            wrong.append(f"{suffix} has shape {list(spec.shape)}, not {takes.shape}")
    return wrong


_EXPRESSION = re.compile(r"(?P<ceil>ceil\()?(?P<size>[NK]|\d+)(?:/(?P<by>G|\d+))?\)?")


def _length(expression: str, weight: Shape, group_size: int | None) -> int | None:
    """The value of an expression; None if it does not divide."""
    match = _EXPRESSION.fullmatch(expression)
    assert match is not None, expression
    size = {"N": weight[0], "K": weight[1]}.get(match["size"]) or int(match["size"])
    by = group_size if match["by"] == "G" else int(match["by"] or 1)
    assert by is not None, expression
    if match["ceil"]:
        return -(-size // by)
    return size // by if size % by == 0 else None

"""The HF side of a plan as it is stored: what is known of every tensor, and what a codec makes of quantised weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from math import prod
from operator import attrgetter
from typing import NamedTuple

from bridge_core.codecs import Codec
from bridge_core.dtypes import dtype_of
from bridge_core.errors import check_count
from bridge_core.geometry import Shape
from bridge_core.plan.entries import Entry


class TensorMeta(NamedTuple):
    """What a receiver of HF weights must know of one of them before it arrives.

    Tensors of one `group` are made from the same Megatron tensors, or are a quantised weight and its scales, and
    have to travel together.
    """

    name: str
    dtype: str
    shape: Shape
    nbytes: int
    group: str


def quantised_names(entries: Iterable[Entry], patterns: Sequence[str]) -> frozenset[str]:
    """HF names of the weights that fit one of a family's patterns. Work is per row of the table, not per tensor."""
    entries = tuple(entries)
    rows = {tensor.name for entry in entries for tensor in entry.hf}
    wanted = {row for row in rows if any(fnmatchcase(row, pattern) for pattern in patterns)}
    found = (pair for entry in entries if wanted & entry.shifts.keys() for pair in entry.hf_names())
    return frozenset(name for name, tensor in found if tensor.name in wanted)


def as_stored(metadata: Iterable[TensorMeta], codec: Codec | None, quantised: Collection[str]) -> list[TensorMeta]:
    """Metadata of plain weights as that of the tensors which store them: a quantised one as its parts."""
    if codec is None:
        return list(metadata)
    found: list[TensorMeta] = []
    for meta in metadata:
        if meta.name not in quantised:
            found.append(meta)
            continue
        for name, (dtype, shape) in codec.parts(meta.name, meta.shape).items():
            nbytes = prod(shape) * dtype_of(dtype).itemsize
            found.append(meta._replace(name=name, dtype=dtype, shape=shape, nbytes=nbytes))
    return found


def subsets(metadata: Iterable[TensorMeta], nbytes: int, *, align: int = 1) -> list[list[TensorMeta]]:
    """Metadata in its order, cut into parts of at most `nbytes`; a group is never split, and may make a larger part.

    A part is a stream of its own with `names=[meta.name for meta in part]`: a sync can be spread over several steps.

    Args:
        metadata: of a plan or a stream; tensors of one group follow one another.
        nbytes: bytes of a part.
        align: bytes of which every tensor takes a multiple.

    Raises:
        ConfigError: `nbytes` is no positive number of bytes.
    """
    check_count("the size of a part", nbytes)
    found: list[list[TensorMeta]] = []
    room = -1
    for _, group in groupby(metadata, key=attrgetter("group")):
        members = list(group)
        size = sum(-(-meta.nbytes // align) * align for meta in members)
        if size > room:
            found.append([])
            room = nbytes
        found[-1] += members
        room -= size
    return found

"""The closed set of mapping rules: how one Megatron tensor is made of HF tensors.

A rule is written in a family's table, right of the Megatron name it explains. It names the HF
tensors and the sizes of their dims; `expand` turns it into pieces. Nothing here knows ranks or
files: a rule also *says* how tensor parallelism cuts the Megatron tensor (`Split`), it never cuts.

Sizes are written as names of the model's dims, or products of them: `"heads*head_dim"`.

Shape legend:
    G  query groups (= key/value heads)     Q  query heads per group     H  head dimension
    F  width of the feed-forward network    D  whatever dims follow the rows (none for a bias)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from bridge_core.errors import ConfigError, LayoutError
from bridge_core.geometry import Box, Piece, Shape, View, row_major
from bridge_core.patterns import alternatives, holes

Dims = Mapping[str, int]
Size = str | int


class Tensor(NamedTuple):
    """A tensor as a pattern: its name with holes, and the shape of one filled-in instance."""

    name: str
    shape: Shape


class Split(NamedTuple):
    """How tensor parallelism cuts a Megatron tensor: along `dim`, each segment on its own.

    A gated `linear_fc1` is `[gate; up]`: two segments, and every rank holds a part of both.
    """

    dim: int
    segments: tuple[int, ...]

    def blocks(self, shape: Shape, size: int, rank: int, *, name: str) -> tuple[tuple[Box, Shape], ...]:
        """The regions that `rank` of `size` ranks holds, each with its index in the local tensor."""
        found: list[tuple[Box, Shape]] = []
        begin = local = 0
        for segment in self.segments:
            if segment % size:
                raise LayoutError(
                    "a tensor does not divide over the tensor-parallel ranks",
                    where=f"{name}, shape {shape}, dim {self.dim}",
                    expected=f"{segment} rows to be a multiple of {size}",
                    got=f"{segment} % {size} = {segment % size}",
                    fix=f"choose a tensor-parallel size that divides {segment}",
                )
            part = segment // size
            start = tuple(begin + rank * part if d == self.dim else 0 for d in range(len(shape)))
            at = tuple(local if d == self.dim else 0 for d in range(len(shape)))
            extent = tuple(part if d == self.dim else n for d, n in enumerate(shape))
            found.append((Box(start, extent), at))
            begin, local = begin + segment, local + part
        return tuple(found)


class Expansion(NamedTuple):
    """What a rule says of one Megatron tensor: its shape, its HF tensors, the pieces between them."""

    shape: Shape
    hf: tuple[Tensor, ...]
    pieces: tuple[Piece, ...]
    split: Split | None
    padding: Box | None = None  # part of the Megatron tensor that no HF element fills


@dataclass(frozen=True)
class Rule:
    """One row of a mapping table: the HF side of a Megatron tensor.

    Attributes:
        hf: HF name pattern; comma braces name several tensors, in the order the rule expects.
        sizes: sizes of the HF tensor's dims, as names of the model's dims.
        build: from the Megatron pattern, the HF names, `sizes` and the dims to the pieces.
        layers: the layers that have this tensor, where not all of them do.
    """

    hf: str
    sizes: tuple[Size, ...]
    build: Callable[[str, tuple[str, ...], tuple[Size, ...], Dims], Expansion]
    layers: tuple[int, ...] | None = None

    def expand(self, target: str, dims: Dims) -> Expansion:
        """Pieces of the Megatron tensor `target`, with the holes of all names still open."""
        names = alternatives(self.hf)
        expansion = self.build(target, names, self.sizes, dims)
        return _stack_experts(target, expansion, dims)


def size(expression: Size, dims: Dims) -> int:
    """The number that a size stands for: an int, the name of a dim, or a product such as `"heads*head_dim"`."""
    if isinstance(expression, int):
        return expression
    try:
        return prod(dims[name] for name in expression.split("*"))
    except KeyError as error:
        raise ConfigError(
            "a mapping table uses a size that the configuration does not give",
            where=expression,
            expected=f"one of {', '.join(sorted(dims))}",
            got=str(error.args[0]),
            fix="correct the row; sizes come from the configuration, in plan/entries.py `model_dims`",
        ) from None


def Replicated(hf: str, *sizes: Size) -> Rule:  # noqa: N802 - rules read as nouns in a table
    """The same tensor on every tensor-parallel rank: norms, routers."""
    return Rule(hf, sizes, _copy(None))


def Column(hf: str, *sizes: Size) -> Rule:  # noqa: N802
    """Output rows (dim 0) are split over tensor-parallel ranks."""
    return Rule(hf, sizes, _copy(0))


def Row(hf: str, *sizes: Size) -> Rule:  # noqa: N802
    """Input columns (dim 1) are split over tensor-parallel ranks."""
    return Rule(hf, sizes, _copy(1))


def Vocab(hf: str, *sizes: Size) -> Rule:  # noqa: N802
    """Embedding or output layer: dim 0 is split, after padding to the dim `padded_vocab`."""
    return Rule(hf, sizes, _vocab)


def QKV(hf: str, *sizes: Size) -> Rule:  # noqa: N802
    """Attention projections q, k, v to `linear_qkv`: rows group by group, Q queries, one key, one value.

    `sizes` are those of the dims after the rows: `"hidden"` for the weight, none for the bias.
    Layout: megatron-core 0.19, transformer/attention.py, `SelfAttention.get_query_key_value_tensors`.
    """
    return Rule(hf, sizes, _qkv)


def GateUp(hf: str, *sizes: Size) -> Rule:  # noqa: N802
    """Gate and up projections to `linear_fc1`: all gate rows, then all up rows, each split on its own.

    Layout: megatron-core 0.19, transformer/mlp.py, `MLP` with `gated_linear_unit`.
    """
    return Rule(hf, sizes, _gate_up)


def _copy(dim: int | None) -> Callable[[str, tuple[str, ...], tuple[Size, ...], Dims], Expansion]:
    def build(target: str, names: tuple[str, ...], sizes: tuple[Size, ...], dims: Dims) -> Expansion:
        shape = tuple(size(s, dims) for s in sizes)
        split = None if dim is None else Split(dim, (shape[dim],))
        return Expansion(shape, (Tensor(names[0], shape),), (_straight(names[0], target, shape),), split)

    return build


def _vocab(target: str, names: tuple[str, ...], sizes: tuple[Size, ...], dims: Dims) -> Expansion:
    shape = tuple(size(s, dims) for s in sizes)
    rows, padded = shape[0], dims["padded_vocab"]
    full = (padded, *shape[1:])
    padding = Box((rows, *(0 for _ in shape[1:])), (padded - rows, *shape[1:])) if padded > rows else None
    piece = _straight(names[0], target, shape)
    return Expansion(full, (Tensor(names[0], shape),), (piece,), Split(0, (padded,)), padding)


def _qkv(target: str, names: tuple[str, ...], sizes: tuple[Size, ...], dims: Dims) -> Expansion:
    G, H = dims["groups"], dims["head_dim"]
    Q = dims["heads"] // G
    return interleave(target, names, groups=G, rows=(Q * H, H, H), tail=tuple(size(s, dims) for s in sizes))


def _gate_up(target: str, names: tuple[str, ...], sizes: tuple[Size, ...], dims: Dims) -> Expansion:
    F, *D = (size(s, dims) for s in sizes)
    made = interleave(target, names, groups=1, rows=(F, F), tail=tuple(D))
    return made._replace(split=Split(0, (F, F)))


def interleave(target: str, names: tuple[str, ...], *, groups: int, rows: tuple[int, ...], tail: Shape) -> Expansion:
    """Several HF tensors as the rows of one: in every group `rows[i]` rows of the i-th, in order.

    Args:
        target: Megatron name.
        names: one HF name per part.
        groups: how many groups of rows follow one another; 1 is plain concatenation.
        rows: rows that each part gives to one group.
        tail: extents of the dims after the rows.
    """
    inner, tail_strides = prod(tail), row_major(tail)
    slots = sum(rows)
    pieces: list[Piece] = []
    tensors: list[Tensor] = []
    before = 0
    for name, count in zip(names, rows, strict=True):
        source = View(name, 0, (count * inner, inner, *tail_strides))
        view = View(target, before * inner, (slots * inner, inner, *tail_strides))
        pieces.append(Piece((groups, count, *tail), source, view))
        tensors.append(Tensor(name, (groups * count, *tail)))
        before += count
    total = groups * slots
    return Expansion((total, *tail), tuple(tensors), tuple(pieces), Split(0, (total,)))


def _straight(source: str, target: str, shape: Shape) -> Piece:
    strides = row_major(shape)
    return Piece(shape, View(source, 0, strides), View(target, 0, strides))


def _stack_experts(target: str, expansion: Expansion, dims: Dims) -> Expansion:
    """Give HF tensors a leading expert dim when only the Megatron name has an `{expert}` hole."""
    if "expert" not in holes(target) or all("expert" in holes(tensor.name) for tensor in expansion.hf):
        return expansion
    stacked = tuple(Tensor(t.name, (dims["experts"], *t.shape)) for t in expansion.hf)
    return expansion._replace(hf=stacked)

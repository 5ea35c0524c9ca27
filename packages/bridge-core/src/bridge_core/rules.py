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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    Segments with `names` are tensors of their own in a checkpoint: `in_proj.weight.z`, `in_proj.weight.x`, ...
    """

    dim: int
    segments: tuple[int, ...]
    names: tuple[str, ...] = ()

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
        dtype: its dtype where that is not the model's: it is never cast, whatever dtype is asked for.
        shift: Megatron's values are HF's plus this: -1 where one side stores a norm's weight and the other
            its distance from 1.
        otherwise: the same Megatron tensor from other HF tensors. Which form a checkpoint has, its names say.
        transposed: HF stores the matrix [in, out], Megatron [out, in].
    """

    hf: str
    sizes: tuple[Size, ...]
    build: Callable[[str, tuple[str, ...], tuple[Size, ...], Dims], Expansion]
    layers: tuple[int, ...] | None = None
    dtype: str | None = None
    shift: float = 0.0
    otherwise: Rule | None = None

    transposed: bool = False

    def expand(self, target: str, dims: Dims) -> Expansion:
        """Pieces of the Megatron tensor `target`, with the holes of all names still open."""
        names = alternatives(self.hf)
        expansion = self.build(target, names, self.sizes, dims)
        if self.transposed:
            expansion = _transpose(expansion)
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


def QKV(hf: str, *sizes: Size, of: str = "") -> Rule:  # noqa: N802
    """Attention projections q, k, v to `linear_qkv`: rows group by group, Q queries, one key, one value.

    `sizes` are those of the dims after the rows: `"hidden"` for the weight, none for the bias. `of` is a
    prefix of the dims `heads`, `groups` and `head_dim`, for attention beside the decoder's.
    Layout: megatron-core 0.19, transformer/attention.py, `SelfAttention.get_query_key_value_tensors`.
    """
    return Rule(hf, sizes, partial(_qkv, of=of))


def FusedQKV(hf: str, *sizes: Size, of: str = "") -> Rule:  # noqa: N802
    """The same from one HF tensor that holds all queries, then all keys, then all values, as vision towers do."""
    return Rule(hf, sizes, partial(_fused_qkv, of=of))


def GatedQKV(hf: str, *sizes: Size) -> Rule:  # noqa: N802
    """The same with an output gate: HF's q_proj gives every head its query, then its gate.

    Megatron's rows, group by group: Q queries, Q gates, one key, one value.
    Layout: megatron-core 0.19, transformer/attention.py, `get_query_key_value_tensors` with `output_gate`;
    transformers 5.23, models/qwen3_next/modeling_qwen3_next.py, `Qwen3NextAttention.forward`.
    """
    return Rule(hf, sizes, _gated_qkv)


def GateUp(hf: str, *sizes: Size) -> Rule:  # noqa: N802
    """Gate and up projections to `linear_fc1`: all gate rows, then all up rows, each split on its own.

    Layout: megatron-core 0.19, transformer/mlp.py, `MLP` with `gated_linear_unit`.
    """
    return Packed(hf, ((sizes[0],), (sizes[0],)), *sizes[1:])


def Packed(  # noqa: N802
    hf: str, rows: Sequence[Sequence[Size]], *tail: Size, names: Sequence[str] = (), groups: Size = 1
) -> Rule:
    """Segments of rows, one after the other, each split over tensor-parallel ranks on its own.

    Args:
        hf: names of the HF tensors that hold the segments.
        rows: for each HF tensor, the rows of the segments in it, in order.
        tail: sizes of the dims after the rows.
        names: what a checkpoint calls the segments, where it stores each as a tensor of its own.
        groups: HF gives its rows in so many equal groups, each with its part of every segment of the tensor.
    """
    return Rule(hf, tail, partial(_packed, rows=tuple(map(tuple, rows)), names_of_segments=tuple(names), groups=groups))


def Transposed(rule: Rule) -> Rule:  # noqa: N802
    """The same matrix where HF stores it [in, out]."""
    return replace(rule, transposed=True)


def Either(first: Rule, *others: Rule) -> Rule:  # noqa: N802
    """One Megatron tensor that published checkpoints name in several ways; the first is what is written by default."""
    if not others:
        return first
    return replace(first, otherwise=Either(*others))


# --- From sizes to pieces -------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of the HF tensor number `tensor`, in an HF and a Megatron order; offsets and strides count rows."""

    tensor: int
    shape: Shape
    source: tuple[int, Shape]
    target: tuple[int, Shape]


def assemble(target: str, tensors: Sequence[Tensor], parts: Sequence[Rows], split: Split) -> Expansion:
    """A Megatron tensor made of rows of HF tensors whose dims after the rows are all alike."""
    tail = tensors[0].shape[1:]
    inner, tail_strides = prod(tail), row_major(tail)

    def view(name: str, rows: tuple[int, Shape]) -> View:
        return View(name, rows[0] * inner, (*(stride * inner for stride in rows[1]), *tail_strides))

    pieces = tuple(
        Piece((*part.shape, *tail), view(tensors[part.tensor].name, part.source), view(target, part.target))
        for part in parts
    )
    return Expansion((sum(split.segments), *tail), tuple(tensors), pieces, split)


def interleave(
    target: str, names: Sequence[str], *, groups: int, rows: Sequence[int], tail: Shape, fused: bool = False
) -> Expansion:
    """HF tensors as the rows of one: in every group `rows[i]` rows of the i-th, in order.

    Args:
        target: Megatron name.
        names: one HF name per part; a single one if `fused`.
        groups: how many groups of rows follow one another; 1 is plain concatenation.
        rows: rows that each part gives to one group.
        tail: extents of the dims after the rows.
        fused: the parts follow one another in one HF tensor.
    """
    slots, parts = sum(rows), []
    before = 0
    for number, count in enumerate(rows):
        tensor, start = (0, before * groups) if fused else (number, 0)
        parts.append(Rows(tensor, (groups, count), (start, (count, 1)), (before, (slots, 1))))
        before += count
    held = [groups * slots] if fused else [groups * count for count in rows]
    tensors = [Tensor(name, (count, *tail)) for name, count in zip(names, held, strict=True)]
    return assemble(target, tensors, parts, Split(0, (groups * slots,)))


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


def _heads(dims: Dims, of: str) -> tuple[int, int, int]:
    """Query groups, query heads per group, head dimension."""
    groups = size(of + "groups", dims)
    return groups, size(of + "heads", dims) // groups, size(of + "head_dim", dims)


def _qkv(
    target: str, names: tuple[str, ...], sizes: tuple[Size, ...], dims: Dims, *, of: str, fused: bool = False
) -> Expansion:
    G, Q, H = _heads(dims, of)
    tail = tuple(size(s, dims) for s in sizes)
    return interleave(target, names, groups=G, rows=(Q * H, H, H), tail=tail, fused=fused)


_fused_qkv = partial(_qkv, fused=True)


def _gated_qkv(target: str, names: tuple[str, ...], sizes: tuple[Size, ...], dims: Dims) -> Expansion:
    G, Q, H = _heads(dims, "")
    slots = (2 * Q + 2) * H
    per_head = (2 * Q * H, 2 * H, 1), (slots, H, 1)
    parts = [
        Rows(0, (G, Q, H), (0, per_head[0]), (0, per_head[1])),
        Rows(0, (G, Q, H), (H, per_head[0]), (Q * H, per_head[1])),
        Rows(1, (G, H), (0, (H, 1)), (2 * Q * H, (slots, 1))),
        Rows(2, (G, H), (0, (H, 1)), (2 * Q * H + H, (slots, 1))),
    ]
    tail = tuple(size(s, dims) for s in sizes)
    tensors = [Tensor(n, (rows, *tail)) for n, rows in zip(names, (2 * G * Q * H, G * H, G * H), strict=True)]
    return assemble(target, tensors, parts, Split(0, (G * slots,)))


def _packed(
    target: str,
    names: tuple[str, ...],
    sizes: tuple[Size, ...],
    dims: Dims,
    *,
    rows: tuple[tuple[Size, ...], ...],
    names_of_segments: tuple[str, ...],
    groups: Size,
) -> Expansion:
    tail, count = tuple(size(s, dims) for s in sizes), size(groups, dims)
    parts: list[Rows] = []
    tensors: list[Tensor] = []
    segments: list[int] = []
    for number, (name, sections) in enumerate(zip(names, rows, strict=True)):
        extents = [size(section, dims) for section in sections]
        if wrong := [n for n in extents if n % count]:
            raise ConfigError("segments do not divide into groups", where=name, expected=f"x {count}", got=wrong)
        slots, before = sum(extents) // count, 0
        for extent in extents:
            each = extent // count
            parts.append(Rows(number, (count, each), (before, (slots, 1)), (sum(segments), (each, 1))))
            segments.append(extent)
            before += each
        tensors.append(Tensor(name, (sum(extents), *tail)))
    return assemble(target, tensors, parts, Split(0, tuple(segments), names_of_segments))


def _straight(source: str, target: str, shape: Shape) -> Piece:
    strides = row_major(shape)
    return Piece(shape, View(source, 0, strides), View(target, 0, strides))


def _transpose(expansion: Expansion) -> Expansion:
    """The HF matrices stored the other way round: element (row, column) moves from `row * C + column`."""
    shapes = {tensor.name: tensor.shape for tensor in expansion.hf}

    def moved(view: View) -> View:
        rows, columns = shapes[view.tensor]
        strides = tuple(s // columns if s % columns == 0 else s * rows for s in view.strides)
        return View(view.tensor, view.offset // columns + view.offset % columns * rows, strides)

    return expansion._replace(
        hf=tuple(Tensor(tensor.name, tensor.shape[::-1]) for tensor in expansion.hf),
        pieces=tuple(piece._replace(source=moved(piece.source)) for piece in expansion.pieces),
    )


def _stack_experts(target: str, expansion: Expansion, dims: Dims) -> Expansion:
    """Give HF tensors a leading expert dim when only the Megatron name has an `{expert}` hole."""
    if "expert" not in holes(target) or all("expert" in holes(tensor.name) for tensor in expansion.hf):
        return expansion
    stacked = tuple(Tensor(t.name, (dims["experts"], *t.shape)) for t in expansion.hf)
    return expansion._replace(hf=stacked)

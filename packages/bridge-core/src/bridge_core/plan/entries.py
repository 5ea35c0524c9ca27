"""A family's table, compiled for one model: every row becomes an `Entry`, once for all its layers.

Work is per *row*, never per tensor: a model with 90,000 tensors has about 15 rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from bridge_core.errors import ConfigError, CoverageError
from bridge_core.families import Family, Fields, Table
from bridge_core.geometry import Box, Piece, Shape, View, row_major, tiling_error
from bridge_core.patterns import alternatives, at_layer, fill, holes
from bridge_core.rules import Dims, Rule, Split, Tensor

OpenPiece = tuple[Shape, tuple[str, ...], int, int, Shape, int, Shape]
"""A piece of one layer before an expert's number is in it: its shape; on the HF side the parts of the name around the
number, offset, stride from expert to expert, strides; on the Megatron side offset and strides."""


def filled(pieces: Iterable[OpenPiece], expert: int, target: str) -> list[Piece]:
    """The pieces of one expert, moved to its place in stacked HF tensors, into the parameter `target`."""
    number = str(expert)
    # This runs for every parameter of every rank: two calls for each piece, and no attribute is looked up.
    return [
        Piece(shape, View(number.join(parts), at + shift * expert, strides), View(target, to, steps))
        for shape, parts, at, shift, strides, to, steps in pieces
    ]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of a mapping table for one model: all instances of one kind of Megatron tensor.

    Attributes:
        name: Megatron name pattern, holes open.
        shape: global shape of one instance (one layer, one expert).
        hf: the HF tensors it is made of, as patterns.
        pieces: HF to Megatron, for one instance; a stacked HF tensor needs `instance` to shift them.
        split: how tensor parallelism cuts it; None if every rank holds all of it.
        padding: rows that no HF element fills.
        layers: global numbers of the layers that have it; `(0,)` when the name has no layer.
        experts: number of experts; 1 when the name has no expert.
        depth: layers of its block; 1 when the name has no layer.
        dtype: its dtype where that is not the model's; never cast.
        shift: Megatron's values are HF's plus this.
        form: which of the HF forms of the row this is; 0 for the one that is written by default.
    """

    name: str
    shape: Shape
    hf: tuple[Tensor, ...]
    pieces: tuple[Piece, ...]
    split: Split | None
    padding: Box | None
    layers: tuple[int, ...]
    experts: int
    depth: int = 1
    dtype: str | None = None
    shift: float = 0.0
    form: int = 0

    @property
    def block(self) -> str:
        """The stack of layers it belongs to, such as `decoder.layers`; empty when the name has no layer."""
        return self.name.partition(".{layer}")[0] if self.has_layer else ""

    @property
    def is_expert(self) -> bool:
        """Whether expert parallelism places it, and expert-tensor parallelism cuts it."""
        return "{expert}" in self.name

    @property
    def has_layer(self) -> bool:
        """Whether it exists once per layer."""
        return "{layer}" in self.name

    @property
    def numel(self) -> int:
        """Elements of one instance."""
        return prod(self.shape)

    @cached_property
    def shifts(self) -> dict[str, int]:
        """`stack_stride` by HF name pattern."""
        return {tensor.name: self.stack_stride(tensor) for tensor in self.hf}

    def instances(self) -> Iterator[tuple[int, int]]:
        """All (layer, expert) numbers."""
        return ((layer, expert) for layer in self.layers for expert in range(self.experts))

    def instance(self, pieces: tuple[Piece, ...], layer: int, expert: int, target: str | None = None) -> list[Piece]:
        """`pieces` with names filled in, moved to the expert's place in stacked HF tensors.

        `target` is the name on the Megatron side, where it is not the canonical one.
        """
        into = str(expert).join(at_layer(self.name, layer)) if target is None else target
        return filled(self.opened(pieces, layer), expert, into)

    def opened(self, pieces: tuple[Piece, ...], layer: int) -> Iterator[OpenPiece]:
        """`pieces` with the layer's number in their names, for `filled`: what all experts of the layer share."""
        return (
            (shape, at_layer(name, layer), at, self.shifts[name], strides, to, steps)
            for shape, (name, at, strides), (_, to, steps) in pieces
        )

    def stack_stride(self, tensor: Tensor) -> int:
        """Elements from one expert to the next in a stacked HF tensor; 0 if it is not stacked."""
        stacked = self.is_expert and "{expert}" not in tensor.name
        return row_major(tensor.shape)[0] if stacked else 0

    def hf_names(self) -> Iterator[tuple[str, Tensor]]:
        """Filled-in names of all HF tensors, each once, with the tensor they are instances of."""
        for tensor in self.hf:
            found = holes(tensor.name)
            layers = self.layers if "layer" in found else (0,)
            experts = range(self.experts) if "expert" in found else (0,)
            for layer in layers:
                at_layer = tensor.name.replace("{layer}", str(layer))
                if "expert" not in found:
                    yield at_layer, tensor
                    continue
                head, tail = at_layer.split("{expert}")
                for expert in experts:
                    yield f"{head}{expert}{tail}", tensor

    def check(self) -> None:
        """Raise unless the pieces tile the Megatron instance and the HF tensors exactly once.

        Raises:
            CoverageError: names the tensor, the family's row, and the first element that is wrong.
        """
        targets = [(piece.shape, piece.target) for piece in self.pieces]
        error = tiling_error_with(self.shape, targets, self.padding)
        where = self.name
        for tensor in self.hf:
            shape = tensor.shape[1:] if self.stack_stride(tensor) else tensor.shape
            sources = [(p.shape, p.source) for p in self.pieces if p.source.tensor == tensor.name]
            if error is None and (error := tiling_error(shape, sources)):
                where = tensor.name
        if error:
            raise CoverageError(
                "a mapping does not cover a tensor exactly once",
                where=where,
                expected="every element once",
                got=error,
                fix=f"mend the row of {self.name} in the family's table, or its rule",
            )


def tiling_error_with(shape: Shape, views: list, padding: Box | None) -> str | None:
    """`tiling_error` of a tensor some of whose elements are padding."""
    if padding is None:
        return tiling_error(shape, views)
    filled = tuple(p if p else n for p, n in zip(padding.start, shape, strict=True))
    return tiling_error(filled, views)


def model_dims(family: Family, fields: Fields, padded_vocab: int) -> Dims:
    """The sizes that rules may name, from a model's Megatron fields: those of every decoder, and the family's own."""
    dims = {
        "hidden": fields["hidden_size"],
        "ffn": fields["ffn_hidden_size"],
        "heads": fields["num_attention_heads"],
        "groups": fields["num_query_groups"],
        "head_dim": fields["kv_channels"],
        "vocab": fields["vocab_size"],
        "padded_vocab": padded_vocab,
        "experts": fields.get("num_moe_experts") or 0,
        "moe_ffn": fields.get("moe_ffn_hidden_size") or 0,
        "shared_ffn": fields.get("moe_shared_expert_intermediate_size") or 0,
        **family.dims(fields),
    }
    for name, value in dims.items():
        if not isinstance(value, int) or value < 0:
            raise ConfigError("a size is not a whole number", where=name, expected="an int >= 0", got=repr(value))
    if dims["groups"] < 1 or dims["heads"] % dims["groups"]:
        raise ConfigError(
            "query heads do not divide into groups",
            where="num_attention_heads, num_key_value_heads",
            expected="a number of heads that is a multiple of the number of key/value heads",
            got=f"{dims['heads']} heads, {dims['groups']} groups",
            fix="correct config.json",
        )
    return dims


def compile_entries(
    family: Family,
    fields: Fields,
    *,
    padded_vocab: int | None = None,
    inventory: Mapping[str, Shape] | None = None,
    forms: Mapping[str, int] | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Entry, ...]:
    """All rows of a family's table for one model, each checked to be an exact tiling.

    Args:
        family: the model family.
        fields: Megatron fields of the model.
        padded_vocab: rows of the embedding on the Megatron side; None for no padding.
        inventory: shapes of the HF tensors that a checkpoint has, which choose between the forms of a row.
        forms: numbers of the forms by Megatron name, without an inventory; 0 for those that it does not name.
        ignore: patterns (as in a shell) of HF names to leave out, with the Megatron tensors made of them.

    Raises:
        CoverageError: a row does not tile its tensors, or a checkpoint fits two forms of one.
    """
    dims = model_dims(family, fields, padded_vocab or fields["vocab_size"])
    table = family.table(fields)
    depths = {"decoder.layers": fields["num_layers"]}
    for name, row in table.items():
        if "layer" in holes(name):
            block = name.partition(".{layer}")[0]
            depths[block] = max(depths.get(block, 0), 1 + max(row.layers or (0,)))
    chosen = dict.fromkeys(table, 0) | dict(forms or {})
    if inventory is not None:
        chosen = _forms_in(table, inventory, dims)
    entries: list[Entry] = []
    for name, row in table.items():
        rule = replace(_forms_of(row)[chosen[name]], layers=row.layers)
        if not _left_out(name, rule, ignore):
            entries.append(_entry(name, rule, chosen[name], dims, depths))
            entries[-1].check()
    return tuple(entries)


def _forms_of(row: Rule) -> list[Rule]:
    """A row in all forms in which it is published."""
    return [row, *(_forms_of(row.otherwise) if row.otherwise else ())]


def _forms_in(table: Table, inventory: Mapping[str, Shape], dims: Dims) -> dict[str, int]:
    """Which form of every row a checkpoint has, by names and shapes; the first where it has none of them."""
    fitting = {name: _fitting(name, row, inventory, dims) if row.otherwise else [0] for name, row in table.items()}
    # A square matrix fits either way round; the other rows of the same forms then say which it is.
    told = {found[0] for name, found in fitting.items() if len(found) == 1 and table[name].otherwise}
    chosen: dict[str, int] = {}
    for name, found in fitting.items():
        if len(found) > 1:
            found = [form for form in found if form in told]
            if len(found) != 1:
                raise CoverageError(
                    "a checkpoint fits several forms of a tensor",
                    where=name,
                    expected="names and shapes that only one of its forms has",
                    got=", ".join(rule.hf for rule in _forms_of(table[name])),
                    fix="convert it with the library that wrote it to one of the published forms",
                )
        chosen[name] = found[0] if found else 0
    return chosen


def _fitting(name: str, row: Rule, inventory: Mapping[str, Shape], dims: Dims) -> list[int]:
    layer = (row.layers or (0,))[0]
    return [
        form
        for form, rule in enumerate(_forms_of(row))
        if all(inventory.get(fill(t.name, layer)) == t.shape for t in rule.expand(name, dims).hf)
    ]


def _entry(name: str, rule: Rule, form: int, dims: Dims, depths: Mapping[str, int]) -> Entry:
    found = holes(name)
    depth = depths[name.partition(".{layer}")[0]] if "layer" in found else 1
    return Entry(
        name=name,
        **rule.expand(name, dims)._asdict(),
        layers=(rule.layers or tuple(range(depth))) if "layer" in found else (0,),
        experts=dims["experts"] if "expert" in found else 1,
        depth=depth,
        dtype=rule.dtype,
        shift=rule.shift,
        form=form,
    )


def _left_out(target: str, rule: Rule, ignore: Sequence[str]) -> bool:
    """Whether patterns leave a row out; they have to name all of its HF tensors or none."""
    found = [any(fnmatchcase(name, pattern) for pattern in ignore) for name in alternatives(rule.hf)]
    if any(found) and not all(found):
        raise CoverageError(
            "a part of a Megatron tensor would be left out",
            where=target,
            expected=f"all or none of {', '.join(alternatives(rule.hf))}",
            got=f"ignore={', '.join(ignore)}",
            fix="name all of them, or none",
        )
    return any(found)

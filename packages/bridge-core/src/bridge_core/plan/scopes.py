"""A part of a model, or all of it under other names, as a family of its own: rows are renamed or left out, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from bridge_core.errors import CoverageError
from bridge_core.families import Family, Fields
from bridge_core.patterns import alternatives, holes
from bridge_core.plan.entries import model_dims
from bridge_core.plan.placement import DECODER_LAYERS
from bridge_core.rules import Rule
from bridge_core.topology import PipelineStage

Names = Callable[[str], str | None]


def scoped(
    family: Family,
    fields: Fields,
    names: Names,
    *,
    reason: str,
    holds: Callable[[str, PipelineStage], bool] | None = None,
) -> Family:
    """The family of one model with its Megatron tensors under other names, those without a name left out.

    What was left out is known by name on the HF side: a checkpoint of the whole model holds nothing unexpected.
    The result is for this one model. The rows are those of the family's table, sizes are those of `fields`, whatever
    fields a plan of the part itself is made with.

    Args:
        family: the model family.
        fields: Megatron fields of the whole model.
        names: from a row's Megatron name (holes open) to the one it gets, or None.
        reason: why tensors that are left out are, for reports.
        holds: as for a `Family`, with the new names.

    Raises:
        CoverageError: two rows would get the same name.
    """
    table = family.table(fields)
    kept: dict[str, Rule] = {}
    left: list[Rule] = []
    for name, row in table.items():
        if (new := names(name)) is None:
            left.append(row)
            continue
        if new in kept:
            raise CoverageError("two Megatron tensors would get the same name", where=new, got=name)
        kept[new] = _with_layers(name, new, row, fields)
    made = {hf for row in kept.values() for hf in _hf_names(row)}
    dims = {name: size for name, size in model_dims(family, fields, 0).items() if name != "padded_vocab"}
    copies = family.copies(fields)
    elsewhere = {hf for row in left for hf in _hf_names(row)} | {n for n, copy in copies.items() if copy.of not in made}
    return replace(
        family,
        table=lambda _: kept,
        dims=lambda _: dims,
        copies=lambda _: {name: copy for name, copy in copies.items() if copy.of in made},
        ignored={**dict.fromkeys(sorted(elsewhere - made), reason), **family.ignored},
        holds=holds,
        towers={},
    )


def _with_layers(old: str, new: str, row: Rule, fields: Fields) -> Rule:
    """A row that is for all decoder layers says so itself, where its name does not any more."""
    moved = old.startswith(f"{DECODER_LAYERS}.") and not new.startswith(f"{DECODER_LAYERS}.")
    if moved and row.layers is None and "layer" in holes(old):
        return replace(row, layers=tuple(range(fields["num_layers"])))
    return row


def _hf_names(row: Rule) -> Iterator[str]:
    yield from alternatives(row.hf)
    if row.otherwise:
        yield from _hf_names(row.otherwise)

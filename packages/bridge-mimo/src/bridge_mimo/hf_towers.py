"""A family whose towers are HF's own modules: every tensor of theirs is there as it is, whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os.path import commonprefix

from bridge_core.errors import ConfigError
from bridge_core.families import Family, Fields, Table
from bridge_core.patterns import fill, holes
from bridge_core.plan.entries import model_dims
from bridge_core.rules import Replicated, Rule

MODULE = "hf."
"""Where `towers.ReplicatedTower` keeps the HF module."""


def with_hf_towers(family: Family, fields: Fields, names: Sequence[str]) -> Family:
    """The family of one model with the rows of some towers replaced: a row for each HF tensor, under its HF name.

    Layers are not stacked, as they are not in a checkpoint of the HF module.

    Raises:
        ConfigError: the family has no such tower.
    """
    if unknown := [name for name in names if name not in family.towers]:
        raise ConfigError(
            f"the {family.name} family has no such tower",
            where="hf_towers",
            expected=f"some of {', '.join(family.towers) or 'none'}",
            got=", ".join(unknown),
        )
    if not names:
        return family

    def table(given: Fields) -> Table:
        rows = dict(family.table(given))
        for tower in (family.towers[name] for name in names):
            own = {name: rows.pop(name) for name in list(rows) if name.startswith(tower.prefix)}
            tensors = dict(tensor for name, row in own.items() for tensor in _tensors(family, given, name, row))
            shared = commonprefix(list(tensors)).rpartition(".")[0]  # noqa: RUF071 - of names, cut at a dot
            rows |= {f"{tower.prefix}{MODULE}{hf[len(shared) + 1 :]}": rule for hf, rule in tensors.items()}
        return rows

    return replace(family, table=table)


def _tensors(family: Family, fields: Fields, name: str, row: Rule) -> Iterator[tuple[str, Rule]]:
    """The HF tensors of a row, each with the rule that it is the same on both sides."""
    for tensor in row.expand(name, model_dims(family, fields, 0)).hf:
        for layer in (row.layers or (0,)) if "layer" in holes(tensor.name) else (0,):
            hf = fill(tensor.name, layer)
            yield hf, Replicated(hf, *tensor.shape)

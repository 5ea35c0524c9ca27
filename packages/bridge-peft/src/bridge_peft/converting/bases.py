"""Which HF weights a Megatron layer is made of, row by row: read off bridge-core's plan, so said only once.

An adapter adds B A to a weight W [out, in]. Where W is made of several HF weights, each of them takes some of
its rows and all of its columns, so it takes the same rows of B and all of A. That is all an adapter needs to
know of a mapping; every rule of a family that moves whole rows is therefore understood here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from bridge_core.bridge import AutoBridge
from bridge_core.errors import CoverageError, preview
from bridge_core.geometry import Box, Piece, restrict
from bridge_core.patterns import fill
from bridge_core.plan import Entry, Plan
from bridge_core.rules import Tensor
from bridge_core.topology import ParallelLayout
from bridge_peft.placement import Linear, fused_parts

_WEIGHT = re.compile(r"\.weight(\{expert\})?$")
_NUMBERED_LAYER = re.compile(r"(?<=\.layers\.)(\d+)(?=\.)")
_NUMBERED_EXPERT = re.compile(r"(?<=\.experts\.)(?:local_experts\.)?(\d+)\.")


@dataclass(frozen=True)
class Part:
    """An HF weight inside a Megatron layer.

    Attributes:
        name: HF tensor name, holes open.
        rows: the layer's row of each of its rows.
        stacked: whether it holds all experts in its first dim.
        transposed: whether it is stored [in, rows].
    """

    name: str
    rows: np.ndarray
    stacked: bool
    transposed: bool

    @property
    def module(self) -> str:
        """The module that holds it, for a plain weight; the name of the parameter itself for a stacked one."""
        return self.name.removesuffix(".weight")


class Base:
    """A Megatron layer that may carry an adapter: all instances of it, one for each layer number.

    Attributes:
        name: its name, with `{layer}` open; the experts of a layer are one.
        entry: the plan's entry of its weight.
    """

    def __init__(self, entry: Entry, fields: Mapping[str, object]) -> None:
        self.name = _WEIGHT.sub("", entry.name)
        self.entry = entry
        self._fields = fields

    @property
    def is_expert(self) -> bool:
        """Whether it is a layer of routed experts."""
        return self.entry.is_expert

    @cached_property
    def linear(self) -> Linear:
        """The layer as `placement` describes it."""
        out, within = self.entry.shape
        split = self.entry.split
        mode = "replicated" if split is None else "column" if split.dim == 0 else "row"
        numbers = {
            "query_groups": "num_query_groups",
            "heads": "num_attention_heads",
            "head_size": "kv_channels",
        }
        parts = fused_parts(
            self.name.rpartition(".")[2],
            out,
            gated=bool(self._fields.get("gated_linear_unit")),
            **{name: self._fields.get(field) for name, field in numbers.items()},  # type: ignore[arg-type]
        )
        blocks = len(split.segments) if mode == "column" and split is not None else 1
        experts = self.entry.experts if self.is_expert else 0
        return Linear(mode, within, out, experts=experts, blocks=blocks, parts=parts)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The HF weights it is made of, in the order of the family's table."""
        return tuple(
            Part(tensor.name, rows, bool(self.entry.stack_stride(tensor)), transposed)
            for tensor in self.entry.hf
            for rows, transposed in [_rows(self.entry, tensor)]
        )

    def named(self, layer: int) -> str:
        """Its name in one layer."""
        return fill(self.name, layer)


class Bases:
    """All layers of a model that may carry adapters, found by any name they go by.

    Args:
        plan: of the model; its layout does not matter.
        beside: entries of layers that have no weight of their own and may carry adapters all the same.
    """

    def __init__(self, plan: Plan, beside: Iterable[Entry] = ()) -> None:
        self.plan = plan
        linear = [entry for entry in (*plan.entries, *beside) if _WEIGHT.search(entry.name) and len(entry.shape) == 2]
        self.all: dict[str, Base] = {}
        for entry in linear:
            base = Base(entry, plan.fields)
            self.all[base.name] = base

    def find(self, name: str) -> tuple[Base, int | None, int | None]:
        """The layer that a name means, its number, and the number of its expert.

        Names are those of modules (`decoder.layers.3.mlp.linear_fc1`) or those in checkpoints, where the number
        of the layer may be missing (then it is None), experts may have one (`...experts.experts.5.linear_fc1`), and
        a language model may be a part of another (`language_model.decoder...`).

        Raises:
            CoverageError: the model has no such layer.
        """
        plain = name.replace(".experts.experts.", ".experts.")
        expert = _NUMBERED_EXPERT.search(plain)
        plain = _NUMBERED_EXPERT.sub("", plain)
        base, number = self._numbered(plain)
        if base is None:
            base, number = self._numbered(plain.removeprefix("language_model."))
        if base is None or (number is not None and number not in base.entry.layers):
            raise CoverageError(
                "an adapter is for a layer that the model does not have",
                where=name,
                expected=f"one of {preview(self.all, limit=12)}",
                got=f"{name}; the model is a {self.plan.family.name} with {self.plan.fields['num_layers']} layers",
                fix="check that the adapter belongs to this model; exclude_adapter_base_prefix leaves layers out",
            )
        return base, number, int(expert[1]) if expert else None

    def _numbered(self, plain: str) -> tuple[Base | None, int | None]:
        """The layer of a name without experts' numbers, and its number; None where the name does not say it."""
        if plain in self.all:  # no layer of a block, or one whose number is a part of its name: a prediction layer
            return self.all[plain], 0
        layer = _NUMBERED_LAYER.search(plain)
        if layer:
            return self.all.get(_NUMBERED_LAYER.sub("{layer}", plain, count=1)), int(layer[1])
        return self.all.get(plain.replace(".layers.", ".layers.{layer}.", 1)), None

    def in_order(self, names: Iterable[str]) -> list[tuple[Base, int]]:
        """Layers by name, in the order of the family's table and of their numbers."""
        order = {name: number for number, name in enumerate(self.all)}
        found = {(order[base.name], layer or 0): base for base, layer, _ in map(self.find, names)}
        return [(base, layer) for (_, layer), base in sorted(found.items(), key=lambda item: item[0])]


def bases_for(bridge: AutoBridge, *, padded_vocab: int | None = None) -> Bases:
    """The layers of a bridge's model; its vocabulary is not padded unless `padded_vocab` says so."""
    plan = Plan(bridge.family, bridge.fields, ParallelLayout(), padded_vocab=padded_vocab, ignore=bridge.ignore)
    if not bridge.fields["share_embeddings_and_output_weights"]:
        return Bases(plan)
    # A tied output layer can be adapted without the embedding, and is then what it is in an untied model.
    untied = {**bridge.fields, "share_embeddings_and_output_weights": False}
    own = {entry.name for entry in plan.entries}
    others = Plan(bridge.family, untied, ParallelLayout(), padded_vocab=padded_vocab, ignore=bridge.ignore).entries
    return Bases(plan, [entry for entry in others if entry.name not in own])


def _rows(entry: Entry, tensor: Tensor) -> tuple[np.ndarray, bool]:
    """The row of the Megatron weight of each row of an HF one, and whether that is stored [in, rows]."""
    shape = tensor.shape[1:] if entry.stack_stride(tensor) else tensor.shape
    out, within = entry.shape
    pieces = [piece for piece in entry.pieces if piece.source.tensor == tensor.name]
    sources, targets = _offsets(pieces, entry, Box((0, 0), (out, 1)))
    across, along = _offsets(pieces, entry, Box((int(targets.min()), 0), (1, within)))
    across = across[np.argsort(along)]
    transposed = shape[1] != within or bool((sources % within).any())
    if not transposed:
        rows, straight = sources // within, (np.diff(across) == 1).all()
    else:
        rows, straight = sources, (np.diff(across) == shape[1]).all()
    if not straight or len(across) != within or len(rows) != prod(shape) // within:
        raise CoverageError(
            "the columns of a weight are not those of its HF weight, so an adapter cannot follow",
            where=f"{tensor.name} in {entry.name}",
            expected="whole rows",
            fix="leave this layer out of the adapter",
        )
    return targets[np.argsort(rows)], transposed


def _offsets(pieces: list[Piece], entry: Entry, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the elements of a box of the Megatron tensor: in the HF tensor, and in the box."""
    both: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for piece in pieces:
        for part in restrict(piece, "target", entry.shape, box, box.shape, (0, 0)):
            grid = np.indices(part.shape).reshape(len(part.shape), -1)
            for found, view in zip(both, (part.source, part.target), strict=True):
                found.append(view.offset + np.asarray(view.strides, np.int64) @ grid)
    return np.concatenate(both[0]), np.concatenate(both[1])

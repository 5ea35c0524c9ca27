"""What one rank holds of a plan: its parameters, and the pieces that fill them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bridge_core.geometry import Box, Piece, Shape
from bridge_core.patterns import at_layer
from bridge_core.plan.entries import Entry, filled
from bridge_core.plan.placement import DECODER_LAYERS, EMBEDDING, OUTPUT
from bridge_core.topology import PipelineStage


class Shard(NamedTuple):
    """One parameter of one rank, and the pieces of HF tensors that it holds.

    Attributes:
        param: name in the rank's model chunk, with local layer and expert numbers.
        chunk: virtual pipeline stage, the index in the list of model chunks.
        name: canonical Megatron name, with global numbers.
        shape: local shape.
        pieces: HF tensor (source) to the local parameter (target).
        pad: regions of the local parameter that no HF element fills.
        entry, layer, expert: the plan's entry that it is an instance of, and its global numbers.
    """

    param: str
    chunk: int
    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    pad: tuple[Box, ...]
    entry: str
    layer: int
    expert: int


class LocalForm(NamedTuple):
    """An entry as one tensor-parallel coordinate holds it, holes open."""

    shape: Shape
    pieces: tuple[Piece, ...]
    blocks: tuple[tuple[Box, Shape], ...]
    pad: tuple[Box, ...]


def shards_of(
    entry: Entry, form: LocalForm, stage: PipelineStage, layers: Iterable[int], experts: range
) -> Iterator[Shard]:
    local = OUTPUT if entry.name == EMBEDDING and not stage.has_embedding else entry.name
    offset = stage.layer_offset if entry.block == DECODER_LAYERS else 0
    for layer in layers:
        names, params = at_layer(entry.name, layer), at_layer(local, layer - offset)
        opened = list(entry.opened(form.pieces, layer))
        for expert in experts:
            param = str(expert - experts.start).join(params)
            pieces = tuple(filled(opened, expert, param))
            name = str(expert).join(names)
            yield Shard(param, stage.vp_stage, name, form.shape, pieces, form.pad, entry.name, layer, expert)


def local_padding(entry: Entry, blocks: tuple[tuple[Box, Shape], ...]) -> tuple[Box, ...]:
    if entry.padding is None:
        return ()
    found: list[Box] = []
    for box, at in blocks:
        begin = max(box.start[0], entry.padding.start[0])
        rows = box.start[0] + box.shape[0] - begin
        if rows > 0:
            found.append(Box((begin - box.start[0] + at[0], *at[1:]), (rows, *box.shape[1:])))
    return tuple(found)

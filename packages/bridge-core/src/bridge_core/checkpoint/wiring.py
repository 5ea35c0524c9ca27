"""From a plan to jobs: pieces between HF tensors and the chunks of a torch_dist checkpoint.

A piece of the plan goes from an HF tensor to a global Megatron tensor. In a checkpoint that tensor is
a slice of a stacked one, cut into chunks in whatever layout it was saved. Moving a piece there is an
addition to its offset (stacking) and a cut by the chunk's box; both are geometry's.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path

from bridge_core.checkpoint.dcp import DcpChunk
from bridge_core.checkpoint.dcp_layout import DcpLayout, plan_dcp
from bridge_core.checkpoint.files import create_file, write_all
from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.checkpoint.items import KnownHeads, locate_tensor, tensor_item
from bridge_core.checkpoint.keys import (
    Place,
    alias_keys,
    extra_state_keys,
    places,
    stacked_shape,
    written_forms,
)
from bridge_core.checkpoint.matching import NARROW, Wired, cast_to
from bridge_core.checkpoint.megatron_files import extra_state_object
from bridge_core.checkpoint.safetensors import Encoded, Stored
from bridge_core.checkpoint.transfer import Job
from bridge_core.checkpoint.zips import ALIGNMENT
from bridge_core.codecs import Fp8Blocks
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Box, Piece, Shape, View, restrict, row_major
from bridge_core.patterns import fill
from bridge_core.plan import Entry, Plan

# --- HF to Megatron -------------------------------------------------------------------------------


def lay_out_megatron(
    plan: Plan, source: HfFolder, *, dtype: str | None, files: int
) -> tuple[DcpLayout, dict[str, str]]:
    """Lay a torch_dist folder out: one chunk per layer and expert. Also returns each key's dtype.

    Raises:
        CheckpointError: HF tensors that become one Megatron tensor differ in dtype, and none was asked for.
    """
    forms = written_forms(plan.entries)
    boxes: dict[str, list[tuple[Shape, Shape]]] = defaultdict(list)
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for entry in plan.entries:
        for layer, expert in entry.instances():
            stored = _one_dtype(entry, layer, expert, source, dtype)
            for place in places(entry, forms[entry.block], layer, expert):
                if dtypes.setdefault(place.key, stored) != stored:
                    raise _mixed(place.key, dtypes[place.key], stored)
                shapes[place.key] = stacked_shape(place)
                boxes[place.key].append(_chunk_of(place))
    tensors = {key: (dtypes[key], shapes[key], boxes[key]) for key in shapes}
    nothing = extra_state_object()
    objects = dict.fromkeys(extra_state_keys(plan.entries, forms), nothing)
    layout = plan_dcp(tensors, objects, files=files)
    # An alias is a second entry in the table of contents for the same bytes.
    aliases = {alias: layout.tensors[key] for key, alias in alias_keys(plan.entries, forms)}
    return replace(layout, tensors=layout.tensors | aliases), dtypes


def _one_dtype(entry: Entry, layer: int, expert: int, source: HfFolder, wanted: str | None) -> str:
    """The dtype of a Megatron tensor: that of all its HF tensors, or the one wanted.

    Shifted values are stored in float32: in a narrower dtype most of them would not come back as they were.
    """
    dtypes: dict[str, str] = {}
    for tensor in entry.hf:
        name = fill(tensor.name, layer, expert)
        stored = source.tensors[name].dtype
        dtypes[name] = cast_to(stored, None if entry.dtype else wanted)
    if len(set(dtypes.values())) > 1:
        first, *others = dtypes.items()
        raise _mixed(next(name for name, found in others if found != first[1]), first[1], dtypes)
    found = next(iter(dtypes.values()))
    return "F32" if entry.shift and found in NARROW else found


def shifted_dtypes(plan: Plan, source: HfFolder, wanted: str | None) -> dict[str, str]:
    """The dtype in HF of every row whose values are shifted, where it is the same on all layers; by Megatron name."""
    found = {
        entry.name: {
            cast_to(source.tensors[fill(tensor.name, layer, expert)].dtype, wanted)
            for tensor in entry.hf
            for layer, expert in entry.instances()
        }
        for entry in plan.entries
        if entry.shift and entry.dtype is None
    }
    return {name: dtypes.pop() for name, dtypes in found.items() if len(dtypes) == 1}


def _mixed(where: str, expected: object, got: object) -> CheckpointError:
    return CheckpointError(
        "HF tensors that become one Megatron tensor differ in dtype",
        where=where,
        expected=expected,
        got=got,
        fix="choose one with --dtype (dtype=...)",
    )


def _chunk_of(place: Place) -> tuple[Shape, Shape]:
    ones = (1,) * len(place.stack)
    return (*place.stack, *(0 for _ in place.box.shape)), (*ones, *place.box.shape)


def create_files(folder: Path, layout: DcpLayout, names: Collection[str]) -> None:
    """Create files of a layout at their full size, with the objects that lie in them."""
    written: set[tuple[str, int]] = set()
    for name in names:
        create_file(folder / name, layout.files[name])
        descriptor = os.open(folder / name, os.O_WRONLY)
        try:
            for key, place in layout.objects.items():
                if place.file == name and (name, place.offset) not in written:
                    written.add((name, place.offset))
                    write_all(descriptor, layout.payloads[key], place.offset)
        finally:
            os.close(descriptor)


def import_jobs(plan: Plan, source: HfFolder, layout: DcpLayout, folder: Path) -> Iterator[Job]:
    """One job per Megatron tensor, in the order of the layout's files."""
    forms = written_forms(plan.entries)
    placed = {(p.key, p.offsets): p for p in layout.placed()}
    paths = {name: str(folder / name) for name in layout.files}
    cuts = _Cuts()
    for entry in plan.entries:
        for layer, expert in entry.instances():
            for place in places(entry, forms[entry.block], layer, expert):
                offsets, sizes = _chunk_of(place)
                chunk = placed[place.key, offsets]
                dtype = layout.tensors[place.key].dtype
                target = Stored(paths[chunk.file], chunk.data_offset, dtype, place.box.shape)
                item = tensor_item(dtype, sizes)
                # The gap up to the next item is filled as well, so that items follow one another without a hole.
                end = chunk.data_offset + item.nbytes + len(item.tail)
                padding = bytes(min(-end % ALIGNMENT, layout.files[chunk.file] - end))
                pieces = entry.instance(cuts.inside(entry, place.box), layer, expert)
                parts = tuple((source.tensors[piece.source.tensor], piece) for piece in pieces)
                yield Job(target, parts, item.head, item.tail + padding, entry.shift)


# --- Megatron to HF -------------------------------------------------------------------------------


def export_jobs(
    plan: Plan,
    wired: Wired,
    layout: HfLayout,
    folder: Path,
    *,
    dtype: str | None = None,
    others: Mapping[str, Stored] | None = None,
) -> list[Job]:
    """One job per HF tensor, in the order of the files and of bytes within them; scales are their weights' jobs'.

    Args:
        plan: of the export.
        wired: what the checkpoint holds of it.
        layout: of the files to be written.
        folder: where these files are.
        dtype: the one asked for: what a weight is cast to before it is quantised.
        others: where the HF tensors lie that the checkpoint does not hold.
    """
    parts: dict[str, list[tuple[Stored, Piece]]] = defaultdict(list)
    shifts: dict[str, float] = {}
    cuts = _Cuts()
    with ExitStack() as stack:
        stored = _Chunks(wired, stack)
        for entry in wired.plan.entries:
            for layer, expert in entry.instances():
                for place in places(entry, wired.forms[entry.block], layer, expert):
                    for chunk in wired.chunks(place):
                        item = stored.find(place.key, chunk)
                        inside, shift = _inside(place, chunk)
                        for piece in entry.instance(cuts.inside(entry, inside), layer, expert):
                            back = piece.inverse()
                            if shift:
                                back = back._replace(source=back.source.moved(shift))
                            parts[back.target.tensor].append((item, back))
                            if entry.shift:
                                shifts[back.target.tensor] = -entry.shift
    others = others or {}
    for name, tensor in others.items():
        view = View(name, 0, row_major(tensor.shape))
        parts[name] = [(tensor, Piece(tensor.shape, view, view))]
    for name, copy in plan.copies.items():
        parts[name] = parts[copy.of]  # the names in pieces are not looked at
    placed = {
        name: Stored(str(folder / file.name), offset, dtype, shape)
        for file in layout.files
        for name, (offset, dtype, shape) in file.tensors.items()
    }
    codec = plan.codec
    if isinstance(codec, Fp8Blocks):
        plain = wired.hf_dtypes(dtype) | {name: cast_to(tensor.dtype, dtype) for name, tensor in others.items()}
        for name in plan.quantised:
            scales = placed.pop(codec.scale_name(name))
            placed[name] = placed[name]._replace(
                dtype=plain[name], encoded=Encoded(codec, name, (placed[name], scales))
            )
    return [Job(target, tuple(parts[name]), shift=shifts.get(name, 0.0)) for name, target in placed.items()]


def _inside(place: Place, chunk: DcpChunk) -> tuple[Box, int]:
    """The region of the Megatron tensor that a chunk holds, and the elements before it in the chunk."""
    depth = len(place.stack)
    start = tuple(o + s for o, s in zip(chunk.offsets[depth:], place.box.start, strict=True))
    sizes = chunk.sizes[depth:]
    shift, step = 0, prod(sizes)
    for number, offset, extent in zip(
        reversed(place.stack), reversed(chunk.offsets[:depth]), reversed(chunk.sizes[:depth]), strict=True
    ):
        shift += (number - offset) * step
        step *= extent
    return Box(start, sizes), shift


class _Cuts:
    """An entry's pieces in one region of its Megatron tensor, in the coordinates of that region; each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, Box], tuple[Piece, ...]] = {}

    def inside(self, entry: Entry, box: Box) -> tuple[Piece, ...]:
        if box.shape == entry.shape:
            return entry.pieces
        if (made := self._made.get((entry.name, box))) is None:
            at = (0,) * len(box.shape)
            cut = (restrict(piece, "target", entry.shape, box, box.shape, at) for piece in entry.pieces)
            made = self._made[entry.name, box] = tuple(part for parts in cut for part in parts)
        return made


class _Chunks:
    """Where the data of chunks lies; every item's head is read and checked."""

    def __init__(self, wired: Wired, stack: ExitStack) -> None:
        self._wired = wired
        self._stack = stack
        self._known: dict[tuple[str, int], Stored] = {}
        self._heads: KnownHeads = {}
        self._open: dict[str, int] = {}

    def find(self, key: str, chunk: DcpChunk) -> Stored:
        found = self._known.get((chunk.file, chunk.offset))
        if found is None:
            found = self._known[chunk.file, chunk.offset] = self._read(key, chunk)
        return found

    def _read(self, key: str, chunk: DcpChunk) -> Stored:
        path = self._wired.folder / chunk.file
        descriptor = self._open.get(chunk.file)
        if descriptor is None:
            descriptor = self._open[chunk.file] = os.open(path, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
        item = locate_tensor(
            lambda offset, length: os.pread(descriptor, length, offset),
            chunk.offset,
            chunk.length,
            where=path,
            known=self._heads,
        )
        expected = (self._wired.tensors[key].dtype, chunk.sizes)
        if (item.dtype, item.shape) != expected or not item.contiguous:
            raise CheckpointError(
                "an item of the checkpoint is not the tensor that its metadata says",
                where=f"{path}, byte {chunk.offset}: {key}",
                expected=f"{expected[0]} {expected[1]}, contiguous",
                got=f"{item.dtype} {item.shape}, strides {item.strides}",
                fix="save the checkpoint again",
            )
        return Stored(str(path), chunk.offset + item.data_offset, item.dtype, item.shape)

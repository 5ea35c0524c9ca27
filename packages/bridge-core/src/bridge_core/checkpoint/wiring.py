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
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path

from bridge_core.checkpoint.dcp import DcpChunk, DcpTensor
from bridge_core.checkpoint.dcp_layout import DcpLayout, plan_dcp
from bridge_core.checkpoint.files import create_file, write_all
from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.checkpoint.items import KnownHeads, locate_tensor, tensor_item
from bridge_core.checkpoint.keys import Form, Place, alias_keys, extra_state_keys, places, stacked_shape
from bridge_core.checkpoint.megatron_files import extra_state_object
from bridge_core.checkpoint.megatron_folder import MegatronFolder, check_weights, form_of
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.checkpoint.transfer import Job
from bridge_core.checkpoint.zips import ALIGNMENT
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Box, Piece, Shape, restrict
from bridge_core.patterns import fill
from bridge_core.plan import Entry, Plan

FLOATING = ("F64", "F32", "F16", "BF16")


def cast_to(stored: str, wanted: str | None) -> str:
    """The dtype a tensor gets when `wanted` is asked for: integers and fp8 keep theirs."""
    return dtype_of(wanted).name if wanted and stored in FLOATING else stored


# --- HF to Megatron -------------------------------------------------------------------------------


def lay_out_megatron(
    plan: Plan, source: HfFolder, *, dtype: str | None, files: int
) -> tuple[DcpLayout, dict[str, str]]:
    """Lay a torch_dist folder out: one chunk per layer and expert. Also returns each key's dtype.

    Raises:
        CheckpointError: HF tensors that become one Megatron tensor differ in dtype, and none was asked for.
    """
    form, num_layers = written_form(plan), plan.fields["num_layers"]
    boxes: dict[str, list[tuple[Shape, Shape]]] = defaultdict(list)
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for entry in plan.entries:
        for layer, expert in entry.instances():
            (place,) = places(entry, form, layer, expert, num_layers=num_layers)
            for tensor in entry.hf:
                name = fill(tensor.name, layer, expert)
                found = cast_to(source.tensors[name].dtype, dtype)
                if dtypes.setdefault(place.key, found) != found:
                    raise CheckpointError(
                        "HF tensors that become one Megatron tensor differ in dtype",
                        where=name,
                        expected=dtypes[place.key],
                        got=found,
                        fix="choose one with --dtype (dtype=...)",
                    )
            shapes[place.key] = stacked_shape(place)
            boxes[place.key].append(_chunk_of(place))
    tensors = {key: (dtypes[key], shapes[key], boxes[key]) for key in shapes}
    nothing = extra_state_object()
    objects = dict.fromkeys(extra_state_keys(plan.entries, form, num_layers=num_layers), nothing)
    layout = plan_dcp(tensors, objects, files=files)
    # An alias is a second entry in the table of contents for the same bytes.
    aliases = {alias: layout.tensors[key] for key, alias in alias_keys(plan.entries, form)}
    return replace(layout, tensors=layout.tensors | aliases), dtypes


def written_form(plan: Plan) -> Form:
    """The form that megatron-core will ask for: stacked if all layers are alike."""
    alike = all(len(e.layers) == plan.fields["num_layers"] for e in plan.entries if e.has_layer)
    return Form.STACKED if alike else Form.PER_LAYER


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
    form, num_layers = written_form(plan), plan.fields["num_layers"]
    placed = {(p.key, p.offsets): p for p in layout.placed()}
    paths = {name: str(folder / name) for name in layout.files}
    for entry in plan.entries:
        for layer, expert in entry.instances():
            (place,) = places(entry, form, layer, expert, num_layers=num_layers)
            offsets, sizes = _chunk_of(place)
            chunk = placed[place.key, offsets]
            dtype = layout.tensors[place.key].dtype
            target = Stored(paths[chunk.file], chunk.data_offset, dtype, entry.shape)
            item = tensor_item(dtype, sizes)
            # The gap up to the next item is filled as well, so that items follow one another without a hole.
            end = chunk.data_offset + item.nbytes + len(item.tail)
            padding = bytes(min(-end % ALIGNMENT, layout.files[chunk.file] - end))
            pieces = entry.instance(entry.pieces, layer, expert)
            parts = tuple((source.tensors[piece.source.tensor], piece) for piece in pieces)
            yield Job(target, parts, item.head, item.tail + padding)


# --- Megatron to HF -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wired:
    """A plan's entries and where a checkpoint holds them."""

    plan: Plan
    form: Form
    tensors: Mapping[str, DcpTensor]
    folder: Path
    _by_index: dict[str, dict[Shape, list[DcpChunk]]] = field(default_factory=dict, repr=False)

    def hf_dtypes(self, wanted: str | None) -> dict[str, str]:
        """Dtype of every HF tensor, from the Megatron tensor it comes from or as asked for."""
        num_layers = self.plan.fields["num_layers"]
        found: dict[str, str] = {}
        for entry in self.plan.entries:
            for layer, expert in entry.instances():
                keys = [place.key for place in places(entry, self.form, layer, expert, num_layers=num_layers)]
                dtypes = {cast_to(self.tensors[key].dtype, wanted) for key in keys}
                if len(dtypes) > 1:
                    raise CheckpointError(
                        "parts of one Megatron tensor differ in dtype",
                        where=", ".join(keys),
                        expected="one dtype",
                        got=", ".join(sorted(dtypes)),
                        fix="choose one with --dtype (dtype=...)",
                    )
                (dtype,) = dtypes
                for tensor in entry.hf:
                    found[fill(tensor.name, layer, expert)] = dtype
        return found

    def chunks(self, place: Place) -> list[DcpChunk]:
        """The chunks that hold parts of a place."""
        depth = len(place.stack)
        by_index = self._by_index.get(place.key)
        if by_index is None:
            by_index = self._by_index[place.key] = defaultdict(list)
            for chunk in self.tensors[place.key].chunks:
                for index in _indices(chunk, depth):
                    by_index[index].append(chunk)
        return by_index[place.stack]


def _indices(chunk: DcpChunk, depth: int) -> Iterator[Shape]:
    """The stacked indices (layer, expert) that a chunk covers; nearly always one."""
    yield from product(*(range(o, o + n) for o, n in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)))


def megatron_entries(plan: Plan, checkpoint: MegatronFolder) -> Wired:
    """Match a plan against a checkpoint's tensors, exactly.

    Raises:
        CoverageError: tensors are missing, unexpected or of another shape.
    """
    num_layers = plan.fields["num_layers"]
    weights = without_aliases(plan.entries, checkpoint.weights())
    form = form_of(plan.entries, weights, num_layers=num_layers, where=checkpoint.path)
    check_weights(plan.entries, form, weights, num_layers=num_layers, where=checkpoint.path)
    return Wired(plan, form, weights, checkpoint.path)


def without_aliases(entries: tuple[Entry, ...], tensors: Mapping[str, DcpTensor]) -> dict[str, DcpTensor]:
    """The tensors under their own keys; an alias is renamed, or dropped where it stands for the same bytes."""
    found = dict(tensors)
    for form in Form:
        for key, alias in alias_keys(entries, form):
            if alias in found and (key not in found or found[key] == found[alias]):
                found[key] = found.pop(alias)
    return found


def export_jobs(plan: Plan, wired: Wired, layout: HfLayout, folder: Path) -> list[Job]:
    """One job per HF tensor, in the order of the files and of bytes within them."""
    parts: dict[str, list[tuple[Stored, Piece]]] = defaultdict(list)
    num_layers = plan.fields["num_layers"]
    cuts: dict[tuple[str, Box], tuple[Piece, ...]] = {}
    with ExitStack() as stack:
        stored = _Chunks(wired, stack)
        for entry in plan.entries:
            for layer, expert in entry.instances():
                for place in places(entry, wired.form, layer, expert, num_layers=num_layers):
                    for chunk in wired.chunks(place):
                        item = stored.find(place.key, chunk)
                        inside, shift = _inside(place, chunk)
                        if (local := cuts.get((entry.name, inside))) is None:
                            local = cuts[entry.name, inside] = _cut(entry, inside)
                        for piece in entry.instance(local, layer, expert):
                            back = piece.inverse()
                            if shift:
                                back = back._replace(source=back.source.moved(shift))
                            parts[back.target.tensor].append((item, back))
    paths = {file.name: str(folder / file.name) for file in layout.files}
    return [
        Job(Stored(paths[file.name], offset, dtype, shape), tuple(parts[name]))
        for file in layout.files
        for name, (offset, dtype, shape) in file.tensors.items()
    ]


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


def _cut(entry: Entry, box: Box) -> tuple[Piece, ...]:
    """The entry's pieces in one region of its Megatron tensor, in the coordinates of that region."""
    at = (0,) * len(box.shape)
    return tuple(p for piece in entry.pieces for p in restrict(piece, "target", entry.shape, box, box.shape, at))


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

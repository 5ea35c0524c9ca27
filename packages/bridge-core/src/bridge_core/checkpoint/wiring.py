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
from bridge_core.checkpoint.keys import (
    Form,
    Forms,
    Place,
    alias_keys,
    by_block,
    extra_state_keys,
    is_adapter,
    places,
    stacked_shape,
    written_forms,
)
from bridge_core.checkpoint.megatron_files import extra_state_object
from bridge_core.checkpoint.megatron_folder import MegatronFolder, check_no_adapters, check_weights, forms_of
from bridge_core.checkpoint.safetensors import Encoded, Stored
from bridge_core.checkpoint.transfer import Job
from bridge_core.checkpoint.zips import ALIGNMENT
from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, ConfigError
from bridge_core.geometry import Box, Piece, Shape, restrict
from bridge_core.patterns import fill
from bridge_core.plan import Entry, Plan, compile_entries

FLOATING = ("F64", "F32", "F16", "BF16")
NARROW = ("F16", "BF16")


def check_wanted(dtype: str | None) -> None:
    """Raise unless weights can be converted to a dtype without a scale: to a floating-point one of 16 bits or more."""
    if dtype is not None and dtype_of(dtype).name not in FLOATING:
        raise ConfigError(
            "weights are not converted to this dtype",
            where="dtype",
            expected="bf16, fp16, fp32 or fp64",
            got=dtype,
            fix="choose one of these; quantised checkpoints have options of their own",
        )


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


@dataclass(frozen=True)
class Wired:
    """A plan's entries and where a checkpoint holds them."""

    plan: Plan
    forms: Forms
    tensors: Mapping[str, DcpTensor]
    folder: Path
    shifted: Mapping[str, str] = field(default_factory=dict)
    _by_index: dict[str, dict[Shape, list[DcpChunk]]] = field(default_factory=dict, repr=False)

    def hf_dtypes(self, wanted: str | None) -> dict[str, str]:
        """Dtype of every HF tensor, from the Megatron tensor it comes from or as asked for.

        A shifted one is wider here than in HF (`lay_out_megatron`): its import recorded what it had there. Without
        a record it gets the dtype that all others have, or stays as wide as it is.
        """
        found: dict[str, str] = {}
        shifted: list[str] = []
        for entry in self.plan.entries:
            for layer, expert in entry.instances():
                keys = [place.key for place in places(entry, self.forms[entry.block], layer, expert)]
                dtypes = {cast_to(self.tensors[key].dtype, None if entry.dtype else wanted) for key in keys}
                if len(dtypes) > 1:
                    raise CheckpointError(
                        "parts of one Megatron tensor differ in dtype",
                        where=", ".join(keys),
                        expected="one dtype",
                        got=", ".join(sorted(dtypes)),
                        fix="choose one with --dtype (dtype=...)",
                    )
                (dtype,) = dtypes
                names = [fill(tensor.name, layer, expert) for tensor in entry.hf]
                found |= dict.fromkeys(names, dtype)
                if entry.shift and entry.dtype is None and wanted is None:
                    recorded = self.shifted.get(entry.name)
                    found |= dict.fromkeys(names, recorded or dtype)
                    shifted += () if recorded else names
        others = {found[name] for name in found.keys() - set(shifted)}
        if len(others) == 1:
            found |= dict.fromkeys(shifted, others.pop())
        return found | {name: found[copy.of] for name, copy in self.plan.copies.items()}

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
        CoverageError: tensors are missing, unexpected or of another shape; or there are adapters beside the model's
            tensors, and no pattern of the plan's `ignore` says that they are to be left out.
    """
    weights = without_aliases(plan.entries, checkpoint.weights())
    for key in _left_out(plan, checkpoint, weights):
        del weights[key]
    weights = {key: tensor for key, tensor in weights.items() if not (is_adapter(key) and plan.ignores(key))}
    check_no_adapters(weights, where=checkpoint.path)
    forms = forms_of(plan.entries, weights, where=checkpoint.path)
    check_weights(plan.entries, forms, weights, where=checkpoint.path)
    return Wired(plan, forms, weights, checkpoint.path, checkpoint.shifted)


def _left_out(plan: Plan, checkpoint: MegatronFolder, weights: Mapping[str, DcpTensor]) -> set[str]:
    """Keys of a checkpoint that hold what the plan was asked to ignore."""
    if not plan.ignore:
        return set()
    kept = {entry.name for entry in plan.entries}
    whole = compile_entries(checkpoint.family, checkpoint.fields, padded_vocab=plan.padded_vocab)
    ignored = tuple(entry for entry in whole if entry.name not in kept)
    keys = {
        place.key
        for form in Form
        for entry in ignored
        for layer, expert in entry.instances()
        for place in places(entry, form, layer, expert)
    }
    return keys & weights.keys()


def without_aliases(entries: tuple[Entry, ...], tensors: Mapping[str, DcpTensor]) -> dict[str, DcpTensor]:
    """The tensors under their own keys; an alias is renamed, or dropped where it stands for the same bytes."""
    found = dict(tensors)
    for form in Form:
        for key, alias in alias_keys(entries, dict.fromkeys(by_block(entries), form)):
            if alias in found and (key not in found or found[key] == found[alias]):
                found[key] = found.pop(alias)
    return found


def export_jobs(plan: Plan, wired: Wired, layout: HfLayout, folder: Path, *, dtype: str | None = None) -> list[Job]:
    """One job per HF tensor, in the order of the files and of bytes within them; scales are their weights' jobs'.

    `dtype` is the one asked for: what a weight is cast to before it is quantised.
    """
    parts: dict[str, list[tuple[Stored, Piece]]] = defaultdict(list)
    shifts: dict[str, float] = {}
    cuts = _Cuts()
    with ExitStack() as stack:
        stored = _Chunks(wired, stack)
        for entry in plan.entries:
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
    for name, copy in plan.copies.items():
        parts[name] = parts[copy.of]  # the names in pieces are not looked at
    placed = {
        name: Stored(str(folder / file.name), offset, dtype, shape)
        for file in layout.files
        for name, (offset, dtype, shape) in file.tensors.items()
    }
    codec = plan.codec
    if isinstance(codec, Fp8Blocks):
        plain = wired.hf_dtypes(dtype)
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

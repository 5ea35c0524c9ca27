"""Adapter checkpoints of Megatron: found and matched from their table of contents, read tensor by tensor.

Two kinds of keys, both below the key of the adapted layer:

* ours: `<layer>.adapter.<name>.[layers.<number>.]lora_A`, `lora_B`, `lora_magnitude`, for canonical adapters
  `lora_A_q` and so on (`bridge_peft.sharded`);
* Megatron-Bridge's: `<layer>.adapter.linear_in.weight`, `.linear_out.weight`, `.weight_magnitude`, with `adapter_q.`
  and the like in front for canonical ones (0.7, peft/utils.py, canonical_lora.py, dora_layers.py). Equal layers are
  stacked: the first dim is then the layer's.

A checkpoint of a whole model, or one with an optimizer, may hold them too: nothing but adapter tensors is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from bridge_core.checkpoint.dcp import DcpChunk, DcpFolder, DcpTensor, read_dcp
from bridge_core.checkpoint.items import KnownHeads, locate_tensor
from bridge_core.checkpoint.megatron_folder import NOT_WEIGHTS, find_iteration
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, ConfigError, CoverageError, preview
from bridge_core.runtime.tensors import torch_dtype
from bridge_peft.converting.adapter_file import Layer
from bridge_peft.converting.bases import Base, Bases
from bridge_peft.converting.exclude import excluded_by
from bridge_peft.converting.fuse import check_rank
from bridge_peft.converting.reading import read_into
from bridge_peft.converting.run_config import Said
from bridge_peft.errors import MissingCheckpointError
from bridge_peft.placement import MAGNITUDE, A, B, Sharing, factors

if TYPE_CHECKING:
    from torch import Tensor

_OURS = re.compile(
    r"^(?P<stem>.+?)\.adapter\.(?P<name>[^.]+)\.(?:layers\.(?P<layer>\d+)\.)?"
    r"(?P<factor>lora_(?:A|B|magnitude)(?:_[a-z]+)?)$"
)
_THEIRS = re.compile(
    r"^(?P<stem>.+?)\.adapter\.(?:adapter_(?P<part>[a-z]+)\.)?"
    r"(?P<factor>linear_in|linear_out|weight_magnitude)(?:\.weight)?$"
)
_FACTORS = {"linear_in": A, "linear_out": B, "weight_magnitude": MAGNITUDE}
THEIR_NAME = "default"


class Place(NamedTuple):
    """Where a factor, or that of one expert, lies: the key, and the index of its layer if layers are stacked."""

    key: str
    layer: int | None


@dataclass
class _Found:
    base: Base
    number: int
    factors: dict[str, dict[int | None, Place]] = field(default_factory=dict)


def find_checkpoint(path: str | Path) -> Path:
    """The folder of one iteration, for a run's folder or that of an iteration.

    Raises:
        MissingCheckpointError: there is no such folder.
        CheckpointError: it holds no torch_dist checkpoint.
    """
    if not Path(path).exists():
        raise MissingCheckpointError(
            "no such checkpoint folder",
            where=path,
            expected="the folder of a run, or of one iteration, with an adapter that Megatron saved",
            got="nothing",
            fix="check the path",
        )
    return find_iteration(Path(path))


class AdapterCheckpoint:
    """The adapter of one name in a checkpoint, matched against a model; no tensor data was read.

    Args:
        folder: of one iteration.
        bases: the layers of the model.
        said: what is known of the adapters' settings.
        name: of the adapter; may be left out where there is only one.
        exclude: beginnings of Megatron names to leave out, before they are looked up in the model.

    Attributes:
        name: of the adapter.
        layers: the adapted layers, in the order of the family's table.
        excluded: those of `exclude` that fitted something.
        nbytes: bytes of its tensors.
        read_nbytes: bytes of tensor data that were read so far.

    Raises:
        CheckpointError: there is no adapter in it, or a tensor of one is not understood.
        CoverageError: it is for another model, or a half of something is missing.
        ConfigError: its tensors are not what its configuration says, or there are several adapters.
    """

    def __init__(
        self, folder: Path, bases: Bases, said: Said, *, name: str | None = None, exclude: Sequence[str] = ()
    ) -> None:
        self.path, self._bases = folder, bases
        self._dcp: DcpFolder = read_dcp(folder)
        self.excluded: set[str] = set()
        self.read_nbytes = 0
        self._heads: KnownHeads = {}
        keys = [key for key in self._dcp.tensors if ".adapter." in key and not key.startswith(NOT_WEIGHTS)]
        named = self._by_name(keys)
        self.name = _one(name, named, folder)
        self._found = self._matched(named[self.name], exclude)
        self.layers = [self._layer(self._found[base.name, number], said) for base, number in self._order()]
        self.nbytes = sum(
            self._dcp.tensors[place.key].nbytes // self._stack_size(place)
            for found in self._found.values()
            for places in found.factors.values()
            for place in places.values()
        )

    def _stack_size(self, place: Place) -> int:
        return 1 if place.layer is None else self._dcp.tensors[place.key].shape[0]

    def _by_name(self, keys: Sequence[str]) -> dict[str, list[tuple[str, re.Match[str]]]]:
        named: dict[str, list[tuple[str, re.Match[str]]]] = {}
        for key in keys:
            if found := _OURS.match(key):
                named.setdefault(found["name"], []).append((key, found))
            elif found := _THEIRS.match(key):
                named.setdefault(THEIR_NAME, []).append((key, found))
            else:
                raise CheckpointError(
                    "a tensor of an adapter is not understood",
                    where=f"{self.path}: {key}",
                    expected="lora_A, lora_B, lora_magnitude; or linear_in, linear_out, weight_magnitude",
                    fix="exclude_adapter_base_prefix leaves layers out",
                )
        return named

    def _matched(
        self, keys: Sequence[tuple[str, re.Match[str]]], exclude: Sequence[str]
    ) -> dict[tuple[str, int], _Found]:
        found: dict[tuple[str, int], _Found] = {}
        for key, match in keys:
            if prefix := excluded_by(match["stem"], exclude):
                self.excluded.add(prefix)
                continue
            base, layer, expert = self._bases.find(match["stem"])
            said = match.groupdict().get("layer")
            numbers: Sequence[int] = (layer,) if layer is not None else base.entry.layers
            if said is not None:
                self._bases.find(base.named(int(said)))  # refuses a number that the model does not have
                numbers = (int(said),)
            stacked = layer is None and said is None
            if stacked and self._dcp.tensors[key].shape[0] != base.entry.depth:
                raise CoverageError(
                    "an adapter is for a model with another number of layers",
                    where=f"{self.path}: {key}",
                    expected=f"{base.entry.depth} layers",
                    got=self._dcp.tensors[key].shape[0],
                    fix="check that the adapter belongs to this model",
                )
            factor = match["factor"]
            if factor in _FACTORS:
                factor = _FACTORS[factor] + (f"_{match['part']}" if match["part"] else "")
            for number in numbers:
                at = found.setdefault((base.name, number), _Found(base, number))
                at.factors.setdefault(factor, {})[expert] = Place(key, number if stacked else None)
        if not found:
            raise _nothing(self.path, "nothing is left of the adapter" if exclude else "there is no adapter")
        return found

    def _order(self) -> list[tuple[Base, int]]:
        return self._bases.in_order(found.base.named(found.number) for found in self._found.values())

    def _layer(self, found: _Found, said: Said) -> Layer:
        base, name = found.base, found.base.named(found.number)
        shapes = {factor: self._shape(base, places, name) for factor, places in sorted(found.factors.items())}
        _check_pairs(name, shapes, self.path)
        parts = tuple(part.name for part in base.linear.parts if f"{A}_{part.name}" in shapes)
        sharing = _sharing(base, shapes)
        first = next(shape for factor, (shape, _) in shapes.items() if factor.startswith(A))
        settings = said.settings(
            self.name,
            name,
            rank=first[-2],
            topk=int(self._bases.plan.fields.get("moe_router_topk") or 1),
            is_expert=base.is_expert,
            dora=MAGNITUDE in shapes,
            parts=parts,
            sharing=sharing,
        )
        check_rank(settings, {factor: shape for factor, (shape, _) in shapes.items()}, f"{self.path}: {name}")
        wanted = factors(base.linear, settings.r, sharing=sharing, parts=parts, magnitude=settings.dora)
        _check_factors(name, {key: factor.shape for key, factor in wanted.items()}, shapes, self.path)
        return Layer(base, found.number, settings, shapes)

    def _shape(self, base: Base, places: dict[int | None, Place], name: str) -> tuple[tuple[int, ...], str]:
        """Shape of a whole factor, and its dtype."""
        tensors = ((self._dcp.tensors[place.key], place.layer) for place in places.values())
        held = {(tensor.shape[index is not None :], tensor.dtype) for tensor, index in tensors}
        if len(held) > 1:
            raise CheckpointError(
                "experts of one layer differ", where=f"{self.path}: {name}", expected="one shape and dtype", got=held
            )
        shape, dtype = held.pop()
        if None in places:
            return shape, dtype
        if lacking := set(range(base.linear.experts)) - places.keys():
            raise _incomplete(f"{name}: experts {preview(sorted(lacking))}", self.path)
        return (base.linear.experts, *shape), dtype

    def read(self, layers: Sequence[Layer] | None = None) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
        """Layers (all by default) with their whole factors, one layer in memory at a time."""
        with ExitStack() as stack:
            files: dict[str, int] = {}
            for layer in self.layers if layers is None else layers:
                found = self._found[layer.base.name, layer.number]
                yield (
                    layer,
                    {
                        factor: self._read(found.factors[factor], *layer.factors[factor], files, stack)
                        for factor in layer.factors
                    },
                )

    def _read(
        self,
        places: dict[int | None, Place],
        shape: tuple[int, ...],
        dtype: str,
        files: dict[str, int],
        stack: ExitStack,
    ) -> Tensor:
        whole = torch.empty(shape, dtype=torch_dtype(dtype))
        for expert, place in places.items():
            target = whole if expert is None else whole[expert]
            tensor = self._dcp.tensors[place.key]
            target = target if place.layer is None else target.unsqueeze(0)
            for chunk in tensor.chunks:
                self._copy(tensor, chunk, place.layer, target, files, stack)
        return whole

    def _copy(
        self,
        tensor: DcpTensor,
        chunk: DcpChunk,
        index: int | None,
        target: Tensor,
        files: dict[str, int],
        stack: ExitStack,
    ) -> None:
        """The part of a chunk that belongs to one layer, into its place."""
        sizes, offsets, first = list(chunk.sizes), list(chunk.offsets), 0
        if index is not None:
            if not offsets[0] <= index < offsets[0] + sizes[0]:
                return
            first, sizes[0], offsets[0] = index - offsets[0], 1, 0
        if chunk.file not in files:
            files[chunk.file] = os.open(self.path / chunk.file, os.O_RDONLY)
            stack.callback(os.close, files[chunk.file])
        descriptor, where = files[chunk.file], self.path / chunk.file
        item = locate_tensor(
            lambda at, length: os.pread(descriptor, length, at),
            chunk.offset,
            chunk.length,
            where=where,
            known=self._heads,
        )
        if (item.dtype, item.shape) != (tensor.dtype, chunk.sizes) or not item.contiguous:
            raise CheckpointError(
                "an item of the checkpoint is not the tensor that its metadata says",
                where=f"{where}, byte {chunk.offset}",
                expected=f"{tensor.dtype} {chunk.sizes}, contiguous",
                got=f"{item.dtype} {item.shape}, strides {item.strides}",
                fix="save the checkpoint again",
            )
        part = torch.empty(sizes, dtype=target.dtype)
        nbytes = part.numel() * dtype_of(tensor.dtype).itemsize
        read_into(descriptor, part, chunk.offset + item.data_offset + first * nbytes, where)
        self.read_nbytes += nbytes
        region = target
        for dim, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
            region = region.narrow(dim, start, length)
        region.copy_(part)


def _one(name: str | None, named: Collection[str], folder: Path) -> str:
    if not named:
        raise _nothing(folder, "there is no adapter")
    if name is None and len(named) == 1:
        return next(iter(named))
    if name is None or name not in named:
        raise ConfigError(
            "a checkpoint holds several adapters" if name is None else "there is no adapter of this name",
            where=folder,
            expected=", ".join(sorted(named)),
            got="no name" if name is None else repr(name),
            fix="say which: adapter_name (--adapter-name)",
        )
    return name


def _nothing(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} in the checkpoint",
        where=folder,
        expected="tensors such as decoder.layers.self_attention.linear_qkv.adapter.<...>",
        got="none",
        fix="give the folder of the adapter's checkpoint, not of its base",
    )


def _incomplete(what: str, folder: Path) -> CoverageError:
    return CoverageError(
        "a half of an adapter is missing in the checkpoint",
        where=folder,
        expected="lora_A and lora_B (linear_in, linear_out) of every adapted layer, part and expert",
        got=f"no {what}",
        fix="save or copy the checkpoint again, completely",
    )


def _sharing(base: Base, shapes: dict[str, tuple[tuple[int, ...], str]]) -> Sharing:
    """What experts share, by the dims of their factors."""
    if not base.is_expert:
        return "each"
    flat = {key[: len(A)] for key, (shape, _) in shapes.items() if key != MAGNITUDE and len(shape) == 2}
    return "shared" if flat == {A, B} else "shared_outer" if flat else "each"


def _check_pairs(name: str, found: Collection[str], folder: Path) -> None:
    """Every A has its B, and there is one at all."""
    others = {A + key[len(B) :] if key.startswith(B) else B + key[len(A) :] for key in found if key != MAGNITUDE}
    if missing := sorted((others or {A, B}) - set(found)):
        raise _incomplete(f"{preview(missing)} of {name}", folder)


def _check_factors(
    name: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[tuple[int, ...], str]], folder: Path
) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise _incomplete(f"{preview(missing)} of {name}", folder)
    for key, (shape, _) in found.items():
        if wanted.get(key) != shape:
            raise CoverageError(
                "an adapter is for another model",
                where=f"{folder}: {name}, {key}",
                expected=f"shape {wanted.get(key, 'none')}",
                got=f"shape {shape}",
                fix="check that the adapter belongs to this model, and that --hf-model is right",
            )

"""A conversion plan: entries x layout -> the pieces of every rank. Printed, audited, costed; no weights.

Planning is lazy where names are concerned: a plan holds about 15 entries, and for each of them the
pieces of one tensor-parallel coordinate, computed once. Names and numbers are filled in when asked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from bridge_core.codecs import Codec
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError
from bridge_core.families import Copy, Family, Fields
from bridge_core.geometry import Piece, Shape, restrict, whole
from bridge_core.patterns import at_layer, fill
from bridge_core.plan.audit import Audit, audit
from bridge_core.plan.entries import Entry, compile_entries
from bridge_core.plan.manifest import to_dict
from bridge_core.plan.placement import (
    DECODER_LAYERS,
    EMBEDDING,
    check_layout,
    holds,
    layout_of_model,
    part_of,
    place,
)
from bridge_core.plan.shards import LocalForm, Shard, local_padding, shards_of
from bridge_core.plan.stored import TensorMeta, as_stored, quantised_names
from bridge_core.topology import ParallelLayout, PipelineStage, RankCoords, expert_range


class RankCost(NamedTuple):
    """What one rank holds: how many parameters, how many bytes, and where the bytes lie."""

    rank: int
    coords: RankCoords
    layers: tuple[int, ...]
    tensors: int
    nbytes: int
    parts: dict[str, int]


class Plan:
    """Which part of which HF tensor every rank of a layout holds.

    Made by `AutoBridge.plan`, or directly from a family and the Megatron fields of a model.

    Args:
        family: the model family.
        fields: Megatron fields (see `Family.to_megatron`).
        layout: the parallel layout.
        dtype: safetensors dtype of the HF tensors, where `dtypes` does not say otherwise.
        dtypes: safetensors dtype by HF name.
        make_vocab_size_divisible_by: the Megatron vocabulary is padded to a multiple of this times `tp`.
        padded_vocab: rows of the Megatron vocabulary, where they are known already.
        inventory: shapes of the HF tensors that a checkpoint has; they choose between the forms in which a family
            is published.
        forms: or the forms themselves, as another plan's `forms` has them.
        ignore: patterns (as in a shell) of HF names to leave out: `mtp.*`, `model.visual.*`.
        codec: the form in which the HF side stores its quantised weights; None for plain weights.
        quantised: HF names of the weights that are quantised, where they are known already; else those that
            the family's fp8 checkpoints quantise.

    Raises:
        ConfigError: a codec is given, and the family has no such checkpoints.
        LayoutError: heads, experts, layers or widths do not divide over the layout.
        CoverageError: a row of the family's table does not tile its tensors.
    """

    def __init__(
        self,
        family: Family,
        fields: Fields,
        layout: ParallelLayout,
        *,
        dtype: str = "BF16",
        dtypes: Mapping[str, str] | None = None,
        make_vocab_size_divisible_by: int = 1,
        padded_vocab: int | None = None,
        inventory: Mapping[str, Shape] | None = None,
        forms: Mapping[str, int] | None = None,
        ignore: Sequence[str] = (),
        codec: Codec | None = None,
        quantised: Collection[str] | None = None,
    ) -> None:
        self.family = family
        self.fields = fields
        self.layout = layout = layout_of_model(fields, layout)
        self.dtype = dtype
        self.dtypes = dict(dtypes or {})
        unit = make_vocab_size_divisible_by * layout.tp
        self.padded_vocab = padded_vocab or -(-fields["vocab_size"] // unit) * unit
        self.ignore = tuple(ignore)
        self.codec = codec
        self._quantised = quantised
        if codec is not None and quantised is None and not codec.names_weights and not family.quantised:
            raise ConfigError(
                f"it is not known which weights of a {family.name} checkpoint are quantised",
                where="fp8",
                expected="a family that is published in fp8",
                got=family.name,
                fix=f"export plain weights, or teach families/{family.name}.py: `quantised`",
            )
        self.entries = compile_entries(
            family, fields, padded_vocab=self.padded_vocab, inventory=inventory, forms=forms, ignore=self.ignore
        )
        self.placement = place(fields, layout, mtp=any(entry.name.startswith("mtp.") for entry in self.entries))
        check_layout(fields, layout)
        self._by_name = {entry.name: entry for entry in self.entries}
        self._forms: dict[tuple[str, int], LocalForm] = {}
        self._dense: dict[tuple[str, int, int, int], list[Shard]] = {}
        self._held: dict[int, tuple[Shard, ...]] = {}

    # --- Both sides, whole ---------------------------------------------------------------------

    @cached_property
    def hf_tensors(self) -> dict[str, Shape]:
        """Shape of every HF tensor that is written, by name, in the order of the table; copies last."""
        found = {name: tensor.shape for entry in self.entries for name, tensor in entry.hf_names()}
        return found | {name: found[copy.of] for name, copy in self.written_copies.items()}

    @cached_property
    def copies(self) -> dict[str, Copy]:
        """HF tensors that repeat others, by name."""
        made = {name for entry in self.entries for tensor in entry.hf for name in [tensor.name]}
        found = self.family.copies(self.fields)
        return {n: c for n, c in found.items() if c.of in made and not self.ignores(n)}

    @cached_property
    def written_copies(self) -> dict[str, Copy]:
        """Those of `copies` that exports write."""
        return {name: copy for name, copy in self.copies.items() if copy.written}

    @cached_property
    def quantised(self) -> frozenset[str]:
        """Names of the HF weights that are stored quantised; empty without a codec."""
        if self.codec is None:
            return frozenset()
        if self._quantised is not None:
            return frozenset(name for name in self._quantised if name in self.hf_tensors)
        if self.codec.names_weights:
            return self.codec.chosen(self.hf_tensors)
        return quantised_names(self.entries, self.family.quantised)

    @cached_property
    def parts(self) -> dict[str, Shape]:
        """Shape of every HF tensor that stores a quantised weight or a part of it (its codes, its scales), by name."""
        codec, shapes = self.codec, self.hf_tensors
        if codec is None:
            return {}
        quantised = [name for name in shapes if name in self.quantised]
        return {part: meta.shape for n in quantised for part, meta in codec.parts(n, shapes[n]).items()}

    def stores(self, inventory: Mapping[str, Shape]) -> bool:
        """Whether an HF inventory has quantised weights as they are stored, and not as they are read."""
        return any(name in inventory and name not in self.hf_tensors for name in self.parts)

    @property
    def forms(self) -> dict[str, int]:
        """Which form of its row every entry has, where that is not the first."""
        return {entry.name: entry.form for entry in self.entries if entry.form}

    def ignores(self, name: str) -> bool:
        """Whether an HF name is left out by one of the patterns of `ignore`."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    @cached_property
    def megatron_tensors(self) -> dict[str, Shape]:
        """Global shape of every Megatron tensor by canonical name."""
        return {fill(e.name, *instance): e.shape for e in self.entries for instance in e.instances()}

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype, shape, bytes and group of every HF tensor, in the order of export; with a codec, as stored.

        Tensors of one group follow one another.
        """
        return self.as_stored(self.plain_metadata())

    def plain_metadata(self) -> list[TensorMeta]:
        """`metadata` as it is without a codec."""
        return list(self._plain_metadata)

    @cached_property
    def _plain_metadata(self) -> tuple[TensorMeta, ...]:
        found: dict[str, TensorMeta] = {}
        for entry in self.entries:
            for layer, expert in entry.instances():
                number = str(expert)
                name = number.join(at_layer(entry.name, layer))
                for tensor in entry.hf:
                    hf = number.join(at_layer(tensor.name, layer))
                    group = hf if entry.shifts[tensor.name] else name
                    dtype = self.dtypes.get(hf, entry.dtype or self.dtype)
                    nbytes = prod(tensor.shape) * dtype_of(dtype).itemsize
                    found.setdefault(hf, TensorMeta(hf, dtype, tensor.shape, nbytes, group))
        for name, copy in self.written_copies.items():
            found[name] = found[copy.of]._replace(name=name)
        groups: dict[str, list[TensorMeta]] = {}
        for meta in found.values():
            groups.setdefault(meta.group, []).append(meta)
        return tuple(chain.from_iterable(groups.values()))

    def as_stored(self, metadata: Iterable[TensorMeta]) -> list[TensorMeta]:
        """Metadata of plain weights as that of the tensors which store them: a quantised one as its parts."""
        return as_stored(metadata, self.codec, self.quantised)

    def pieces(self) -> Iterator[Piece]:
        """All pieces of the conversion, HF tensor to global Megatron tensor, whatever the layout."""
        for entry in self.entries:
            for layer, expert in entry.instances():
                yield from entry.instance(entry.pieces, layer, expert)

    # --- One rank ------------------------------------------------------------------------------

    def local_shards(self, rank: int) -> list[Shard]:
        """What `rank` owns of which HF tensor: one shard per parameter of its model chunks.

        With tied embeddings and several pipeline stages, the last stage holds a copy of the embedding
        under the name `output_layer.weight`, as in megatron-core. Those of the last rank that was asked for are kept.
        """
        if rank not in self._held:
            self._held = {rank: tuple(self.iter_local_shards(rank))}
        return list(self._held[rank])

    def iter_local_shards(self, rank: int) -> Iterator[Shard]:
        """`local_shards` as they are made; experts' are not kept."""
        coords = self.layout.coords(rank)
        for stage in self.placement.stages_of(coords.pp):
            for entry in self.entries:
                form = self.local_form(entry.name, coords.etp if entry.is_expert else coords.tp)
                experts = self.experts_of(entry, coords.ep)
                layers = self.layers_of(entry, stage)
                if entry.is_expert:
                    yield from shards_of(entry, form, stage, layers, experts)
                    continue
                # The same for all ranks that differ in data or expert coordinates only.
                key = (entry.name, coords.tp, stage.pp_rank, stage.vp_stage)
                if (found := self._dense.get(key)) is None:
                    found = self._dense[key] = list(shards_of(entry, form, stage, layers, experts))
                yield from found

    def layers_of(self, entry: Entry, stage: PipelineStage) -> Iterable[int]:
        """Global numbers of the layers for which a stage holds an entry; `(0,)` for one without layers."""
        if entry.block != DECODER_LAYERS:
            held = self.family.holds
            return (
                entry.layers if (held(entry.name, stage) if held else holds(entry.name, stage, tied=self._tied)) else ()
            )
        if len(entry.layers) == entry.depth:
            return stage.decoder_layers
        wanted = set(entry.layers)
        return [layer for layer in stage.decoder_layers if layer in wanted]

    def experts_of(self, entry: Entry, ep_rank: int) -> range:
        """Global numbers of the experts for which an expert-parallel rank holds an entry; `range(1)` without."""
        if not entry.is_expert:
            return range(1)
        return expert_range(entry.experts, ep=self.layout.ep, ep_rank=ep_rank)

    def copy_of(self, rank: int, shard: Shard) -> tuple[int, int]:
        """The number of a rank's copy of a shard among those on its pipeline stage, and how many there are."""
        coords = self.layout.coords(rank)
        entry = self.entry(shard.entry)
        if entry.is_expert:
            number, copies, axis, size = coords.expert_dp, self.layout.expert_dp, coords.etp, self.layout.etp
        else:
            number, copies = coords.cp + self.layout.cp * coords.dp, self.layout.cp * self.layout.dp
            axis, size = coords.tp, self.layout.tp
        if entry.split is None:  # every tensor-parallel rank holds all of it
            number, copies = number * size + axis, copies * size
        return number, copies

    def holders(self, shard: Shard) -> Hashable:
        """A key of the ranks that hold a shard: a rank's shards of the same key have their copies on the same ranks."""
        entry = self.entry(shard.entry)
        return entry.is_expert, entry.split is None

    def is_second_copy(self, rank: int, shard: Shard) -> bool:
        """Whether it is a later stage's copy of the embedding: for a tied output layer, or for MTP."""
        if shard.name != EMBEDDING:
            return False
        return not self.placement.stage(self.layout.coords(rank).pp, shard.chunk).pre_process

    @property
    def _tied(self) -> bool:
        return bool(self.fields["share_embeddings_and_output_weights"])

    def entry(self, name: str) -> Entry:
        """The entry with a given Megatron name pattern."""
        return self._by_name[name]

    def local_form(self, name: str, coordinate: int) -> LocalForm:
        """An entry cut for one coordinate of the axis that splits it (tp, or etp for experts); computed once."""
        found = self._forms.get((name, coordinate))
        if found is None:
            found = self._forms[name, coordinate] = self._cut(self.entry(name), coordinate)
        return found

    def _cut(self, entry: Entry, coordinate: int) -> LocalForm:
        size = self.layout.etp if entry.is_expert else self.layout.tp
        if entry.split is None or size == 1:
            blocks = ((whole(entry.shape), (0,) * len(entry.shape)),)
            shape = entry.shape
        else:
            blocks = entry.split.blocks(entry.shape, size, coordinate, name=entry.name)
            shape = tuple(n // size if d == entry.split.dim else n for d, n in enumerate(entry.shape))
        pieces = tuple(
            part
            for box, at in blocks
            for piece in entry.pieces
            for part in restrict(piece, "target", entry.shape, box, shape, at)
        )
        return LocalForm(shape, pieces, blocks, local_padding(entry, blocks))

    def cost(self, rank: int) -> RankCost:
        """Parameters and bytes of one rank, by arithmetic alone."""
        coords = self.layout.coords(rank)
        parts: dict[str, int] = {}
        tensors = 0
        layers: list[int] = []
        for stage in self.placement.stages_of(coords.pp):
            layers += stage.decoder_layers
            for entry in self.entries:
                count = len(list(self.layers_of(entry, stage))) * len(self.experts_of(entry, coords.ep))
                form = self.local_form(entry.name, coords.etp if entry.is_expert else coords.tp)
                part, itemsize = part_of(entry.name), dtype_of(entry.dtype or self.dtype).itemsize
                parts[part] = parts.get(part, 0) + count * prod(form.shape) * itemsize
                tensors += count
        return RankCost(rank, coords, tuple(layers), tensors, sum(parts.values()), parts)

    # --- The whole plan ------------------------------------------------------------------------

    def audit(self, inventory: Mapping[str, Shape] | None = None) -> Audit:
        """Prove that the plan covers every element of both sides exactly once.

        Args:
            inventory: shapes of the tensors that an HF checkpoint really has; compared with the plan.

        Raises:
            CoverageError: names the first tensors that are missing, unexpected, misshapen, or not
                covered exactly once, on either side.
        """
        return audit(self, inventory)

    def to_dict(self, rank: int | None = None) -> dict[str, Any]:
        """The plan as JSON values: entries with open holes, or the expanded pieces of one rank."""
        return to_dict(self, rank)

    def to_json(self, rank: int | None = None, *, indent: int | None = None) -> str:
        """`to_dict` as text; a refit manifest when a rank is given."""
        return json.dumps(self.to_dict(rank), indent=indent)

    def costs(self) -> list[RankCost]:
        """`cost` of every rank."""
        return [self.cost(rank) for rank in range(self.layout.world_size)]

    def __repr__(self) -> str:
        return f"Plan({self.family.name}, {len(self.entries)} entries, {self.layout})"

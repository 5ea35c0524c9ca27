"""What the ranks of a quantised model must agree on before one of them packs: formats, and shared ranges.

Every rank holds quantisers of its own. Those of one Megatron tensor are the same number on all ranks that hold a part
of it, as far as the number does not belong to that part; nobody but the ranks can tell whether that is so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bridge_core.errors import ConfigError
from bridge_core.patterns import fill
from bridge_core.plan import Entry, Shard
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.workers import TorchWorkers
from bridge_quant_export.errors import CalibrationError, FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.format import COLS, ROWS, Axes, Calibration, Format, cols
from bridge_quant_export.live.held import Held, Weight
from bridge_quant_export.live.packed import regions, rows_of
from bridge_quant_export.live.vectors import reduced
from bridge_quant_export.manifest import Instance

Ranges = Literal["equal", "maximum"]
RANGES: tuple[Ranges, ...] = ("equal", "maximum")

_UNQUANTISED = ""


def check_ranges(ranges: str) -> None:
    """Refuse a word that says nothing of ranges.

    Raises:
        ConfigError: says which there are.
    """
    if ranges not in RANGES:
        raise ConfigError("no such way to agree on ranges", where="ranges", expected=", ".join(RANGES), got=ranges)


# --- Formats -----------------------------------------------------------------------------------


def agreed_formats(held: Held, workers: TorchWorkers) -> tuple[dict[Instance, Format], list[Instance]]:
    """The format of every quantised Megatron tensor of the model, and whose KV cache is quantised. Collective.

    Raises:
        FormatError: on every rank, if ranks that hold parts of one tensor disagree.
    """
    mine = {"weights": _told(held.weights), "kv": sorted(held.kv)}
    formats: dict[Instance, str] = {}
    kv: set[Instance] = set()
    for rank, said in enumerate(workers.share(mine)):
        kv |= {Instance(*instance) for instance in said["kv"]}
        for name, instance in _heard(said["weights"]):
            if formats.setdefault(instance, name) != name:
                raise FormatError(
                    "ranks have quantised one tensor differently",
                    where=fill(*instance),
                    expected=formats[instance] or "unquantised, as on an earlier rank",
                    got=f"{name or 'unquantised'} on rank {rank}",
                    fix="quantise all ranks with one configuration",
                )
    _check_experts(formats)
    named = {name: _named(name) for name in {*formats.values()} - {_UNQUANTISED}}
    return {instance: named[name] for instance, name in formats.items() if name}, sorted(kv)


def block_of(entry: str) -> str:
    """The experts of a layer together, for an entry that is one of their weights; else the entry."""
    return entry.partition(".linear_fc")[0] if "{expert}" in entry else entry


def _check_experts(formats: Mapping[Instance, str]) -> None:
    """Engines give all routed experts of a layer one method: that of the first that they find."""
    first: dict[tuple[str, int], tuple[Instance, str]] = {}
    for instance, name in formats.items():
        if "{expert}" not in instance.entry:
            continue
        other, format = first.setdefault((block_of(instance.entry), instance.layer), (instance, name))
        if format != name:
            raise FormatError(
                "the experts of one layer are quantised differently",
                where=f"{fill(*other)} and {fill(*instance)}",
                expected="one format for all routed experts of a layer, in all their linears",
                got=f"{format or 'unquantised'} and {name or 'unquantised'}",
                fix="quantise them alike",
            )


def _told(weights: Sequence[Weight]) -> dict[str, dict[str, list[list[int]]]]:
    """Format by tensor as JSON, with experts in runs: entry, format, [layer, first expert, number of experts]."""
    told: dict[str, dict[str, list[list[int]]]] = {}
    for weight in weights:
        entry, layer, expert = weight.instance
        runs = told.setdefault(entry, {}).setdefault(_name(weight), [])
        if runs and runs[-1][0] == layer and sum(runs[-1][1:]) == expert:
            runs[-1][2] += 1
        else:
            runs.append([layer, expert, 1])
    return told


def _heard(told: Mapping[str, Mapping[str, list[list[int]]]]) -> Iterator[tuple[str, Instance]]:
    for entry, formats in told.items():
        for name, runs in formats.items():
            for layer, first, count in runs:
                yield from ((name, Instance(entry, layer, expert)) for expert in range(first, first + count))


def _name(weight: Weight) -> str:
    if weight.state is None:
        return _UNQUANTISED
    return f"{weight.state.format.name}/{weight.state.format.group_size or ''}"


def _named(name: str) -> Format:
    kind, _, size = name.partition("/")
    return format_of(kind, int(size) if size else None)


# --- Ranges ------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """One field of a calibration: where it stands, and which dims of the whole weight it follows."""

    instance: Instance
    field: str
    value: Tensor
    entry: Entry
    dims: frozenset[int] = frozenset()
    shared: bool = False
    is_kv: bool = False

    @property
    def where(self) -> str:
        """For messages."""
        what = f"KV cache, {self.field}" if self.is_kv else self.field
        return f"{fill(*self.instance)}, {what}"


def agreed_ranges(live: LiveModel, held: Held, groups: Any, workers: TorchWorkers, ranges: Ranges) -> Held:
    """The same, with ranges that all ranks of a tensor share; block and channel ranges stay those of the shard.

    Collective over the model's groups and over the workers. Shared means: over the tensor-parallel group (the experts'
    own, for experts), what does not follow the dim that is split; over replicas, everything; over the
    expert-parallel group, input ranges of grouped experts, which have one quantiser for all.

    Args:
        ranges: `equal`: refuse those that differ; `maximum`: take the largest.

    Raises:
        CalibrationError: on every rank: a range is missing, zero, negative or not finite, or ranks differ.
    """
    known: list[_Known] = []

    def collect() -> None:
        known.extend(_known(live, held))
        for found in known:
            _check_positive(found)

    workers.together(collect)
    differing: list[str] = []
    for name, chosen in _SHARED_OVER.items():
        at = [index for index, found in enumerate(known) if chosen(found)]
        for index, value in _reduce([known[index] for index in at], getattr(groups, name), differing, name):
            known[at[index]] = known[at[index]]._replace(value=value)

    def check() -> None:
        if differing and ranges == "equal":
            raise CalibrationError(
                "ranks that share a tensor have calibrated it differently",
                where=differing[0],
                expected="one range on all of them",
                got=f"{len(differing)} range(s) that differ",
                fix="synchronise the quantisers (mtq.quantize with all groups does), or pass ranges='maximum'",
            )

    workers.together(check)
    return _with_values(held, known)


_SHARED_OVER = {
    "tp": lambda found: not found.entry.is_expert and _is_whole(found),
    "dp_cp": lambda found: not found.entry.is_expert,
    "expt_tp": lambda found: found.entry.is_expert and _is_whole(found),
    "expt_dp": lambda found: found.entry.is_expert,
    "ep": lambda found: found.entry.is_expert and found.shared and found.field in ("input", "pre_quant_scale"),
}


def _is_whole(found: _Known) -> bool:
    """Whether it does not follow the dim along which the tensor is split."""
    split = found.entry.split
    return split is None or split.dim not in found.dims


def _known(live: LiveModel, held: Held) -> Iterator[_Known]:
    for weight in held.weights:
        if weight.state is None:
            continue
        format, shard = weight.state.format, weight.shard
        axes: dict[str, Axes] = dict.fromkeys(format.needs, ()) | (
            {"weight": format.amax} if format.amax is not None else {}
        )
        if "pre_quant_scale" in axes:
            axes["pre_quant_scale"] = (cols(),)
        for field, along in axes.items():
            value: Tensor | None = getattr(weight.state.calibration, field)
            shape = tuple(axis.length(shard.shape) for axis in along)
            if value is None or value.numel() != prod(shape):
                raise CalibrationError(
                    "a layer was not calibrated" if value is None else "a calibration has the wrong shape",
                    where=f"{shard.name}, {field}",
                    expected=f"a range of shape {list(shape)}",
                    got="none" if value is None else list(value.shape),
                    fix="calibrate the model in the layout in which it is exported",
                )
            dims = frozenset(axis.dim for axis in along if axis.dim is not None)
            flat = value.detach().float().cpu().reshape(shape)
            if field == "weight" and ROWS in dims:
                flat = _without_padding(flat, shard, live, along[0].per)
            yield _Known(weight.instance, field, flat, live.plan.entry(shard.entry), dims, weight.shared)
    for instance, ranges in sorted(held.kv.items()):
        for which in sorted(ranges):
            flat = ranges[which].detach().float().cpu().reshape(-1)
            yield _Known(instance, which, flat, live.plan.entry(instance.entry), is_kv=True)


def _without_padding(ranges: Tensor, shard: Shard, live: LiveModel, per: int) -> Tensor:
    """Ranges of rows (`per` to one), with a 1 for rows that only pad the vocabulary: they are zero, and not written."""
    if sum(piece.numel for piece in shard.pieces) == prod(shard.shape):
        return ranges
    used = torch.zeros(len(ranges), dtype=torch.bool)
    for region in regions(shard.pieces, live.plan.hf_tensors):
        used[rows_of(region, shard.shape[COLS]) // per] = True
    return torch.where(used.view(-1, *(1,) * (ranges.dim() - 1)), ranges, 1.0)


def _check_positive(found: _Known) -> None:
    if not bool((torch.isfinite(found.value) & (found.value > 0)).all()):
        raise CalibrationError(
            "a calibration is zero, negative or not finite",
            where=found.where,
            expected="positive numbers",
            got=f"{found.value.min().item():g} to {found.value.max().item():g}",
            fix="calibrate with inputs that reach this layer; an all-zero weight cannot be quantised by its range",
        )


def _reduce(known: Sequence[_Known], group: Any, differing: list[str], name: str) -> list[tuple[int, Tensor]]:
    """The largest of every range over a group; notes those that are not the same everywhere. Collective."""
    if group.size() == 1:
        return []
    # Expert-parallel ranks hold other experts: what these share is one range for each layer.
    keys = [(found.instance[:2] if name == "ep" else found.instance, found.field) for found in known]
    places: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        places.setdefault(key, []).append(index)
    values = [known[indices[0]].value for indices in places.values()]
    vector = torch.cat([value.reshape(-1) for value in values]) if values else torch.zeros(0)
    sizes = [value.numel() for value in values]
    smallest, largest = (-reduced(-vector, group)).split(sizes), reduced(vector, group).split(sizes)
    found = []
    for indices, low, high in zip(places.values(), smallest, largest, strict=True):
        if not torch.equal(low, high):
            first = known[indices[0]]
            differing.append(f"{first.where}: {low.min().item():g} to {high.max().item():g} over {name}")
        found += [(index, high.reshape(known[index].value.shape)) for index in indices]
    return found


def _with_values(held: Held, known: Sequence[_Known]) -> Held:
    """What is held, with the ranges of `known`."""
    values: dict[Instance, dict[str, Tensor]] = {}
    kv: dict[Instance, dict[str, Tensor]] = {}
    for found in known:
        (kv if found.is_kv else values).setdefault(found.instance, {})[found.field] = found.value
    weights = [
        weight._replace(state=replace(weight.state, calibration=Calibration(**values.get(weight.instance, {}))))
        if weight.state is not None
        else weight
        for weight in held.weights
    ]
    return Held(tuple(weights), kv)

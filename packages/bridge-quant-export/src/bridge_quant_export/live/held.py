"""What this rank's part of a quantised model says of itself: the state of every weight, and KV ranges."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from bridge_core.errors import preview
from bridge_core.plan import Shard
from bridge_core.runtime.live import LiveModel
from bridge_quant_export.errors import CalibrationError, FormatError
from bridge_quant_export.manifest import Instance, kv_projection, quantisable
from bridge_quant_export.state import LayerState, read_kv_ranges, read_layer

_WEIGHT = re.compile(r"weight(?P<index>\d*)")

Key = tuple[int, str]
"""Chunk and parameter name of the plan: what names a shard on a rank."""


class Weight(NamedTuple):
    """A shard of a linear layer's weight, and how it is quantised; None if it is not.

    Attributes:
        shared: the layer's input range is that of all its local experts (one module holds them).
    """

    shard: Shard
    state: LayerState | None
    shared: bool

    @property
    def key(self) -> Key:
        return self.shard.chunk, self.shard.param

    @property
    def instance(self) -> Instance:
        """Which Megatron tensor of the whole model it is a shard of."""
        return Instance(self.shard.entry, self.shard.layer, self.shard.expert)


@dataclass(frozen=True)
class Held:
    """What a rank holds.

    Attributes:
        weights: of linear layers, quantised or not, in the plan's order.
        kv: ranges of keys and values (`k`, `v`) by the weight that makes both.
    """

    weights: tuple[Weight, ...]
    kv: Mapping[Instance, Mapping[str, Tensor]]


def read_held(live: LiveModel, chunks: Sequence[nn.Module]) -> Held:
    """Read all quantisers of this rank. Communicates nothing.

    Raises:
        FormatError: quantised in a way that no format stores, or where nothing can be stored quantised.
        CalibrationError: ranges of another shape than the weight's; half a KV cache.
    """
    found, unread = [], {id(quantizer): name for name, quantizer in _quantizers(chunks)}
    owners = _owners(chunks)
    for shard in live.shards:
        owner = owners.get(id(live.tensor(shard)))
        match = None if owner is None else _WEIGHT.fullmatch(owner.attribute)
        if owner is None or match is None or live.tensor(shard).dim() < 2:
            continue
        index = int(match["index"]) if match["index"] else None
        state = read_layer(owner.module, weight=owner.attribute, index=index, where=shard.name)
        unread.pop(id(getattr(owner.module, "weight_quantizer", None)), None)
        if not quantisable(live.plan.entry(shard.entry)):
            if state is not None:
                raise FormatError(
                    "no format stores this tensor quantised",
                    where=shard.name,
                    expected="the weight of a linear layer that Hugging Face has as a matrix",
                    got=state.format.title,
                    fix="disable its weight_quantizer, and export the layer unquantised",
                )
            continue
        found.append(Weight(shard, state, match["index"] != ""))
    if unread:
        raise FormatError(
            "quantised weights are of no tensor that the bridge knows",
            where=preview(sorted(unread.values())),
            expected="weights that are parameters of the model",
            fix="disable these quantisers",
        )
    return Held(tuple(found), _kv(live, chunks))


class _Owner(NamedTuple):
    module: nn.Module
    attribute: str


def _owners(chunks: Sequence[nn.Module]) -> dict[int, _Owner]:
    """By the identity of a parameter, the module that has it."""
    owners: dict[int, _Owner] = {}
    for chunk in chunks:
        for module in chunk.modules():
            for name, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), _Owner(module, name))
    return owners


def _quantizers(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Quantisers of weights that are switched on, by the name of their module."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            quantizer: Any = getattr(module, "weight_quantizer", None)
            if quantizer is not None and any(getattr(part, "is_enabled", False) for part in quantizer.modules()):
                yield name, quantizer


def _kv(live: LiveModel, chunks: Sequence[nn.Module]) -> dict[Instance, Mapping[str, Tensor]]:
    """Ranges of the KV cache by the weight that fills it."""
    made = {e.name for e in live.plan.entries if {kv_projection(tensor.name) for tensor in e.hf} >= {"k", "v"}}
    shards = {id(live.tensor(shard)): shard for shard in live.shards if shard.entry in made}
    ranges: dict[Instance, Mapping[str, Tensor]] = {}
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if (found := read_kv_ranges(module, where=name)) is None:
                continue
            attention = chunk.get_submodule(name.rpartition(".")[0])
            owned = [shards[id(p)] for p in attention.parameters() if id(p) in shards]
            if len(owned) != 1:
                raise CalibrationError(
                    "a quantised KV cache belongs to no keys and values that Hugging Face has",
                    where=name,
                    expected="attention with k_proj and v_proj",
                    fix="disable its bmm quantisers",
                )
            ranges[Instance(owned[0].entry, owned[0].layer, owned[0].expert)] = found
    return ranges

"""Adapters in mcore's distributed checkpoints.

Keys are those of the layer with `adapter.<name>.<factor>` behind, and global shapes those of `placement`:
per-expert factors are one tensor [E, ...] for a layer, whether its experts are stacked in one module or
modules of their own. Where mcore stacks equal layers in one tensor, a factor has the number of its layer in
its key instead (`...linear_qkv.adapter.default.layers.3.lora_A`): layers may have adapters of other ranks,
or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bridge_peft.layers.adapter import LoraAdapter
    from bridge_peft.placement import Factor

Offsets = tuple[tuple[int, int, int], ...]


def sharded_state_dict(
    module: nn.Module, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The layer's own sharded state, and that of its adapters. Stands in for the method of an adapted layer."""
    state = type(module).sharded_state_dict(module, prefix, sharded_offsets, metadata)  # type: ignore[operator]
    # mcore takes every tensor of a layer that it knows nothing about for one that all ranks hold.
    state = {key: entry for key, entry in state.items() if not key.startswith(f"{prefix}adapter.")}
    for name, adapter in module._modules["adapter"].items():  # type: ignore[union-attr]
        single = bool((metadata or {}).get("singleton_local_shards", False))
        for factor in adapter.factors:
            entry = _entry(adapter, factor, prefix, name, tuple(sharded_offsets), single)
            state[f"{prefix}adapter.{name}.{factor}"] = entry
    return state


def adapter_entries(sharded: dict[str, Any], *, name: str | None = None) -> dict[str, Any]:
    """The entries of a model's sharded state that are adapters', of one name or of all: an adapter checkpoint."""
    word = ".adapter." if name is None else f".adapter.{name}."
    return {key: entry for key, entry in sharded.items() if word in key}


def owns(adapter: LoraAdapter, key: str) -> bool:
    """Whether this rank's share of a factor is the one that counts, of all the equal copies that ranks hold."""
    return _replica(adapter, adapter.factors[key], single=False) == (0, 0, 0)


def _entry(adapter: LoraAdapter, key: str, prefix: str, name: str, offsets: Offsets, single: bool) -> Any:
    from megatron.core.dist_checkpointing import mapping

    made: Any = mapping.ShardedTensorFactory  # its annotations are of other factories
    site, factor, value = adapter.site, adapter.factors[key], adapter.get_parameter(key)
    sequential = bool(site.linear.experts) and not site.grouped
    # The last offset of a sequential expert is its number in the layer; one before it is the layer's.
    layers = offsets[:-1] if sequential and not single else offsets
    number = f"layers.{layers[0][1]}." if layers else ""
    sharded_key = f"{prefix}adapter.{name}.{number}{key}"
    replica = _replica(adapter, factor, single)
    if factor.by_expert and site.grouped and single:
        each = _PerExpert(adapter, factor)
        return made(sharded_key, value, each, each.merge, replica)
    shards = _Shards(adapter, factor, own_key=single)
    if factor.cut is None or factor.blocks == 1:
        return shards(sharded_key, value, replica)[0]
    return made(sharded_key, value, shards, shards.merge, replica)


class _Shards:
    """A factor's local tensor -> its sharded tensors, one for each block of the cut dim.

    Args:
        own_key: whether each expert has a key of its own (`singleton_local_shards`), and so no expert dim.
    """

    def __init__(self, adapter: LoraAdapter, factor: Factor, *, own_key: bool) -> None:
        site = adapter.site
        self.blocks, self.rank, self.size = factor.blocks, site.rank, site.size
        stacked = factor.by_expert and site.grouped and not own_key
        self.prepended = int(factor.by_expert and not site.grouped and not own_key)
        self.experts: list[tuple[int, int, int]] = []
        if stacked:
            self.experts = [(0, site.first_expert // site.local_experts, site.linear.experts // site.local_experts)]
        elif self.prepended:
            self.experts = [(0, site.first_expert, site.linear.experts)]
        self.axis = None if factor.cut is None else factor.cut - (factor.by_expert and own_key)

    def __call__(self, key: str, tensor: Tensor, replica_id: Any, flattened_range: Any = None) -> list[Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        if self.axis is None:
            chunks, cuts = [tensor], [()]
        else:
            chunks = list(tensor.chunk(self.blocks, self.axis - self.prepended))
            count = self.blocks * self.size
            cuts = [((self.axis, block * self.size + self.rank, count),) for block in range(self.blocks)]
        return [
            ShardedTensor.from_rank_offsets(
                key, chunk, *self.experts, *cut, replica_id=replica_id, prepend_axis_num=self.prepended
            )
            for chunk, cut in zip(chunks, cuts, strict=True)
        ]

    def merge(self, chunks: list[Tensor]) -> Tensor:
        return torch.cat(chunks, (self.axis or 0) - self.prepended)


class _PerExpert:
    """A stacked factor -> sharded tensors under one key per expert: those that a sequence of modules would have."""

    def __init__(self, adapter: LoraAdapter, factor: Factor) -> None:
        self.first = adapter.site.first_expert
        self.leaf = adapter.site.name.rpartition(".")[2]
        self.shards = _Shards(adapter, factor, own_key=True)

    def __call__(self, key: str, tensor: Tensor, replica_id: Any, flattened_range: Any = None) -> list[Any]:
        head, _, tail = key.rpartition(f"{self.leaf}.adapter.")
        return [
            self.shards(f"{head}{self.first + index}.{self.leaf}.adapter.{tail}", part, replica_id)
            for index, part in enumerate(tensor)
        ]

    def merge(self, experts: list[list[Tensor]]) -> Tensor:
        return torch.stack([self.shards.merge(chunks) for chunks in experts])


def _replica(adapter: LoraAdapter, factor: Factor, single: bool) -> tuple[int, int, int]:
    """Which copy of a share this rank holds, in mcore's form (pipeline, tensor, data); all zeros for the one saved.

    `SequentialMLP` writes the rank among the experts' data-parallel ranks into the last place (mcore 0.19.2,
    transformer/moe/experts.py). What all experts share has copies beyond those, so they are told apart before
    it; but where every expert has a key of its own, each key has only that expert's copies.
    """
    site = adapter.site
    groups = site.groups
    if factor.shared and (site.grouped or not single):
        here = site.linear.experts // groups.ep.size()
        expert = 0 if site.grouped else site.first_expert % here
        return (expert, groups.tp.rank() + groups.tp.size() * groups.dp_cp.rank(), 0)
    group, copies = (site.group, groups.expt_dp) if site.linear.experts else (groups.tp, groups.dp_cp)
    return (0, group.rank() if factor.cut is None else 0, copies.rank())

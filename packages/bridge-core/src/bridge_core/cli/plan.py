"""`bridge-core plan`: which rank holds what, from a config.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bridge_core.cli.tables import facts, in_bytes, in_count, table
from bridge_core.dtypes import dtype_of

if TYPE_CHECKING:
    from bridge_core import plan as plans


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show what every rank of a parallel layout holds. Needs a config.json, no weights."""

    config: Annotated[Path, "config.json, or the folder that it is in."]
    tp: Annotated[int, "Tensor-parallel ranks."] = 1
    pp: Annotated[int, "Pipeline-parallel ranks."] = 1
    vpp: Annotated[int, "Model chunks per pipeline rank (virtual pipeline)."] = 1
    ep: Annotated[int, "Expert-parallel ranks."] = 1
    etp: Annotated[int | None, "Tensor-parallel ranks of experts; as many as --tp if not given."] = None
    cp: Annotated[int, "Context-parallel ranks."] = 1
    dp: Annotated[int | None, "Data-parallel ranks; the smallest number that fits if not given."] = None
    order: Annotated[str, "Mesh axes from fastest to slowest, as Megatron orders ranks."] = "tp-cp-ep-dp-pp"
    num_layers_in_first_pipeline_stage: Annotated[int | None, "Decoder layers of the first pipeline rank."] = None
    num_layers_in_last_pipeline_stage: Annotated[int | None, "Decoder layers of the last pipeline rank."] = None
    account_for_embedding_in_pipeline_split: Annotated[
        bool, "Count the embedding as a layer when layers are shared out."
    ] = False
    account_for_loss_in_pipeline_split: Annotated[
        bool, "Count the output layer as a layer when layers are shared out."
    ] = False
    pipeline_model_parallel_layout: Annotated[
        str | None, "Megatron's layout string, for example 'Et*3|(tt|)*29,m|L'."
    ] = None
    make_vocab_size_divisible_by: Annotated[int, "The vocabulary is padded to a multiple of this times --tp."] = 1
    ignore: Annotated[
        tuple[str, ...], "HF names to leave out of the plan, as patterns of a shell (mtp.*, model.visual.*)."
    ] = ()
    ignore_option: Annotated[
        tuple[str, ...], "Options of config.json to leave out of account although the family does not know them."
    ] = ()
    all_ranks: Annotated[bool, "One line for each rank, also where ranks hold the same amounts."] = False
    rank: Annotated[
        int | None, "Show what this one rank holds, parameter by parameter; with --json, its manifest of pieces."
    ] = None
    tensors: Annotated[bool, "Show name, dtype, shape and bytes of every HF tensor instead."] = False
    json: Annotated[bool, "Print the plan as JSON."] = False

    def run(self) -> int:
        """Plan, audit, print."""
        plan = self.plan()
        audit = plan.audit()
        if self.rank is not None:
            print(plan.to_json(self.rank) if self.json else _one_rank(plan, self.rank))
        elif self.tensors:
            print(_tensors(plan, as_json=self.json))
        elif self.json:
            print(plan.to_json())
        else:
            print(_summary(plan, audit), _all_ranks(plan, fold=not self.all_ranks), sep="\n\n")
        return 0

    def plan(self) -> plans.Plan:
        """The plan that the options ask for.

        Raises:
            BridgeError: the configuration is not understood, or the layout does not fit it.
        """
        from bridge_core.bridge import AutoBridge
        from bridge_core.checkpoint.hf_folder import read_config
        from bridge_core.topology import ParallelLayout

        config = read_config(self.config)
        bridge = AutoBridge.from_hf_config(config, ignore=self.ignore, ignore_options=self.ignore_option)
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _LAYOUT}
        return bridge.plan(ParallelLayout(**sizes), make_vocab_size_divisible_by=self.make_vocab_size_divisible_by)


_LAYOUT = {
    *("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "order", "pipeline_model_parallel_layout"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
}

_AXES = ("tp", "cp", "dp", "pp", "etp", "ep", "expert_dp")


def _summary(plan: plans.Plan, audit: plans.Audit) -> str:
    layout, vocabulary = plan.layout, plan.fields["vocab_size"]
    sizes = " ".join(f"{axis}={getattr(layout, axis)}" for axis in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp"))
    pad = plan.padded_vocab - vocabulary
    padding = f", vocabulary {vocabulary} + {pad} padding" if pad else ""
    nbytes = audit.elements * dtype_of(plan.dtype).itemsize
    return facts([
        ("family", plan.family.name),
        ("HF", f"{audit.hf_tensors} tensors, {in_count(audit.elements)} parameters, {in_bytes(nbytes)} ({plan.dtype})"),
        ("Megatron", f"{audit.megatron_tensors} tensors{padding}"),
        ("layout", f"{sizes} on {layout.world_size} ranks, order {layout.order}"),
        ("audit", "every element of both sides is covered exactly once"),
    ])  # fmt: skip


def _all_ranks(plan: plans.Plan, *, fold: bool) -> str:
    """A line per rank, or per group of ranks that hold the same layers and amounts."""
    groups: dict[object, list[plans.RankCost]] = {}
    for cost in plan.costs():
        alike = (cost.coords.pp, cost.layers, cost.tensors, *sorted(cost.parts.items()))
        groups.setdefault(alike if fold else cost.rank, []).append(cost)
    shown = [
        axis
        for axis in _AXES
        if axis != "expert_dp" and any(getattr(c.coords, axis) for g in groups.values() for c in g)
    ]
    rows = []
    for costs in groups.values():
        first = costs[0]
        coords = [f"{axis}={rank_ranges(getattr(cost.coords, axis) for cost in costs)}" for axis in shown]
        parts = [f"{part} {in_bytes(nbytes)}" for part, nbytes in first.parts.items() if nbytes]
        rows.append([
            rank_ranges(cost.rank for cost in costs), " ".join(coords), rank_ranges(first.layers),
            first.tensors, in_bytes(first.nbytes), ", ".join(parts),
        ])  # fmt: skip
    head = ["ranks" if fold else "rank", "coordinates", "layers", "tensors", "bytes", "what"]
    text = table(head, rows, right=("tensors", "bytes"))
    return text + ("\n\nNumbers are per rank." if fold and len(rows) < plan.layout.world_size else "")


def rank_ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges, `0-3, 8`; `none` if there are none."""
    from bridge_core.checkpoint.inspect import ranges

    return ranges(numbers) or "none"


def _one_rank(plan: plans.Plan, rank: int) -> str:
    cost = plan.cost(rank)
    coords = " ".join(f"{axis}={getattr(cost.coords, axis)}" for axis in _AXES)
    layers, nbytes = rank_ranges(cost.layers), in_bytes(cost.nbytes)
    head = facts([("rank", rank), ("at", coords), ("layers", layers), ("bytes", nbytes)])
    return f"{head}\n\n{rank_table(plan, rank)}"


def rank_table(plan: plans.Plan, rank: int) -> str:
    """The parameters of a rank and the HF tensors that they are made of; what differs in numbers only is one line."""
    from bridge_core.checkpoint.inspect import common_name, template

    groups: dict[tuple[str, tuple[int, ...]], list[plans.Shard]] = {}
    for shard in plan.iter_local_shards(rank):
        groups.setdefault((template(shard.param), shard.shape), []).append(shard)
    rows = []
    for (_, shape), shards in groups.items():
        sources: dict[str, list[str]] = {}
        for name in dict.fromkeys(piece.source.tensor for shard in shards for piece in shard.pieces):
            sources.setdefault(template(name), []).append(name)
        origin = ", ".join(common_name(names) for names in sources.values())
        rows.append([common_name([shard.param for shard in shards]), len(shards), list(shape), origin])
    return table(["parameter", "tensors", "shape", "made of"], rows, right=("tensors",))


def _tensors(plan: plans.Plan, *, as_json: bool) -> str:
    rows: Sequence[Any] = plan.metadata()
    if as_json:
        return json.dumps([tensor._asdict() for tensor in rows])
    head = ["name", "dtype", "shape", "bytes"]
    return table(head, [(t.name, t.dtype, list(t.shape), in_bytes(t.nbytes)) for t in rows], right=("bytes",))

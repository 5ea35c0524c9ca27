"""A plan as JSON values: what other programs read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridge_core.geometry import Piece
from bridge_core.plan.entries import Entry
from bridge_core.plan.shards import Shard
from bridge_core.topology import RankCoords

if TYPE_CHECKING:
    from bridge_core.plan.plan import Plan


def to_dict(plan: Plan, rank: int | None = None) -> dict[str, Any]:
    """Entries with open holes and what every rank holds, or the expanded pieces of one rank."""
    head = {"family": plan.family.name, "layout": plan.layout.to_dict(), "dtype": plan.dtype}
    if rank is not None:
        return head | {"rank": rank, "shards": [_shard_dict(s) for s in plan.iter_local_shards(rank)]}
    ranks = [cost._asdict() | {"coords": _coords_dict(cost.coords)} for cost in plan.costs()]
    return head | {"megatron": plan.fields, "entries": [_entry_dict(e) for e in plan.entries], "ranks": ranks}


def _piece_dict(piece: Piece) -> dict[str, Any]:
    return {"shape": piece.shape, "source": piece.source._asdict(), "target": piece.target._asdict()}


def _shard_dict(shard: Shard) -> dict[str, Any]:
    return shard._asdict() | {"pieces": [_piece_dict(p) for p in shard.pieces], "pad": list(shard.pad)}


def _coords_dict(coords: RankCoords) -> dict[str, int]:
    return {name: getattr(coords, name) for name in ("tp", "cp", "dp", "pp", "etp", "ep", "expert_dp")}


def _entry_dict(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "shape": entry.shape,
        "hf": [tensor._asdict() for tensor in entry.hf],
        "pieces": [_piece_dict(piece) for piece in entry.pieces],
        "split": entry.split._asdict() if entry.split else None,
        "layers": entry.layers,
        "experts": entry.experts,
    }

"""Plans: from a family's table and a layout to the pieces of every rank, with proof and price."""

from bridge_core.plan.audit import Audit
from bridge_core.plan.entries import Entry, compile_entries
from bridge_core.plan.ignored import check_ignored
from bridge_core.plan.plan import Plan, RankCost
from bridge_core.plan.scopes import scoped
from bridge_core.plan.shards import Shard
from bridge_core.plan.stored import TensorMeta, subsets

__all__ = [
    "Audit",
    "Entry",
    "Plan",
    "RankCost",
    "Shard",
    "TensorMeta",
    "check_ignored",
    "compile_entries",
    "scoped",
    "subsets",
]

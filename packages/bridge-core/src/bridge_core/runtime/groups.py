"""Process groups of a parallel layout, as megatron-core's collection, without its global state.

`group_ranks` is the arithmetic: which ranks make up which group. `pg_collection` makes the groups and
puts them in a `ProcessGroupCollection`. Neither reads or changes `megatron.core.parallel_state`.

Ranks run tensor parallel fastest, then context (or expert) parallel, then data parallel, pipeline
slowest: mcore's order "tp-cp-ep-dp-pp" (`parallel_state.RankGenerator`, 0.16.1 and 0.19.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bridge_core.errors import LayoutError
from bridge_core.extras import require
from bridge_core.topology import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# Group name -> mesh axes that vary inside one group, in the dense and in the expert grid (where "tp" is
# etp and "dp" is expert_dp). Source: parallel_state.initialize_model_parallel, 0.16.1 and 0.19.2, at
# gtp_remat = 1.
_DENSE_AXES = {
    "tp": "tp",
    "cp": "cp",
    "tp_cp": "tp-cp",
    "dp": "dp",
    "dp_cp": "dp-cp",
    "tp_dp_cp": "tp-dp-cp",
    "pp": "pp",
    "mp": "tp-pp",
}
_EXPERT_AXES = {
    "expt_tp": "tp",
    "ep": "ep",
    "tp_ep": "tp-ep",
    "tp_ep_pp": "tp-ep-pp",
    "expt_dp": "dp",
}
# Fields that are another group under the only settings made here: one distributed-optimizer instance and
# no GTP weight rematerialisation (0.19 only; its groups are single ranks then).
_ALIASES = {
    "intra_dp_cp": "dp_cp",
    "dp_cp_gtp_remat": "dp_cp",
    "intra_expt_dp": "expt_dp",
    "expt_dp_gtp_remat": "expt_dp",
    "tp_ep_pp_with_egtp_remat": "tp_ep_pp",
    "intra_dist_opt": "world",
    "gtp_remat": "self",
    "expt_gtp_remat": "self",
}
_ABSENT = ("hcp", "inter_dist_opt", "dp_cp_ag", "expt_dp_ag")


def group_ranks(layout: ParallelLayout) -> dict[str, list[tuple[int, ...]]]:
    """Which ranks make up which group of a layout; pure arithmetic.

    Returns:
        Group name (a field of mcore's `ProcessGroupCollection`, and `world` and `self`) -> every group of
        that kind, each ascending, together covering all ranks. `embd` and `pos_embd` cover only the
        ranks of the first and last, or the first, pipeline stage.
    """
    groups = {name: layout.groups(axes) for name, axes in _DENSE_AXES.items()}
    groups |= {name: layout.groups(axes, is_expert=True) for name, axes in _EXPERT_AXES.items()}
    # Word embeddings live on the first and the last stage, position embeddings on the first.
    groups["embd"] = [stages if layout.pp == 1 else [stages[0], stages[-1]] for stages in groups["pp"]]
    groups["pos_embd"] = [stages[:1] for stages in groups["pp"]]
    groups["world"] = [list(range(layout.world_size))]
    groups["self"] = [[rank] for rank in range(layout.world_size)]
    return {name: [tuple(sorted(ranks)) for ranks in kind] for name, kind in groups.items()}


def pg_collection(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
    dp: int | None = None,
    ranks: Sequence[int] | None = None,
    timeout_s: float = 600.0,
) -> ProcessGroupCollection:
    """Make mcore's `ProcessGroupCollection` for a layout over some ranks of the default process group.

    Collective: every rank of the default group must call this, also those outside of `ranks`, with the same
    arguments and in the same order relative to other group creations. (Creation among members only,
    `use_local_synchronization`, is no way out: torch 2.13 names such a group by how many groups a rank
    already has, and members that differ in that wait for each other for ever.) No global `parallel_state` is
    read or changed. Making groups is slow (sockets or communicators), so keep the result.

    Groups of the same ranks are one process group: `dp` and `dp_cp` are the same object at `cp=1`.

    Args:
        tp, pp, cp, dp: sizes of the dense grid. `dp` left out means what is left of `ranks`, and without
            `ranks` the smallest that fits `ep` and `etp`.
        vpp: virtual pipeline stages per rank; has no groups of its own, only checked against `pp`.
        ep, etp: expert grid over the same ranks; `etp` left out means `tp`.
        ranks: ascending ranks of the default group; left out, the first `tp * cp * pp * dp` ones.
        timeout_s: how long a collective in these groups may wait for its peers.

    Returns:
        All groups that `GPTModel`, the MoE layers, DDP, the optimizer and `dist_checkpointing` ask for, in
        the installed mcore (checked with 0.16.1 and 0.19.2). `embd` and `pos_embd` are None on ranks
        outside of them, `hcp` and `inter_dist_opt` are None everywhere. On a rank outside of `ranks`
        every group is None.

    Raises:
        LayoutError: sizes and ranks do not fit, or `ranks` is not ascending; on all ranks alike.
    """
    require("megatron.core", extra="mcore")
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection

    if ranks is not None and dp is None and tp * cp * pp > 0:
        dp = max(1, len(ranks) // (tp * cp * pp))
    layout = ParallelLayout(tp=tp, pp=pp, vpp=vpp or 1, ep=ep, etp=etp, cp=cp, dp=dp)
    members = _members(ranks, layout, world=dist.get_world_size())
    found = _make_groups(group_ranks(layout), members, timeout_s=timeout_s)
    found |= {name: found[other] for name, other in _ALIASES.items()}
    known = {field.name for field in fields(ProcessGroupCollection)}
    return ProcessGroupCollection(**{name: group for name, group in found.items() if name in known})


def _make_groups(
    table: dict[str, list[tuple[int, ...]]], members: tuple[int, ...], *, timeout_s: float
) -> dict[str, Any]:
    """The group of each kind that this rank is in, or None; one object for equal ranks. Collective."""
    import torch.distributed as dist

    me = dist.get_rank()
    made: dict[tuple[int, ...], Any] = {}
    found: dict[str, Any] = dict.fromkeys((*table, *_ABSENT))
    for name, groups in table.items():
        for group in groups:
            global_ranks = tuple(members[index] for index in group)
            if global_ranks not in made:
                made[global_ranks] = dist.new_group(
                    list(global_ranks), timeout=timedelta(seconds=timeout_s), group_desc=name
                )
            if me in global_ranks:
                found[name] = made[global_ranks]
    return found


def _members(ranks: Sequence[int] | None, layout: ParallelLayout, *, world: int) -> tuple[int, ...]:
    """The ranks of the layout, checked against its size and the world."""
    members = tuple(range(layout.world_size)) if ranks is None else tuple(ranks)
    if len(members) != layout.world_size:
        raise LayoutError(
            "the number of ranks does not fit the layout",
            where=str(layout),
            expected=f"tp * cp * pp * dp = {layout.world_size} ranks",
            got=f"{len(members)} ranks: {members}",
        )
    if any(after <= before for before, after in pairwise(members)):
        # torch.distributed.new_group sorts its ranks: another order would silently become this one.
        raise LayoutError("ranks must be ascending", where="ranks", expected=tuple(sorted(set(members))), got=members)
    if members[0] < 0 or members[-1] >= world:
        raise LayoutError("a rank is outside the world", expected=f"0 to {world - 1}", got=members)
    return members

"""Which experts an expert-parallel rank holds."""

from __future__ import annotations

from bridge_core.errors import LayoutError


def expert_range(num_experts: int, *, ep: int, ep_rank: int) -> range:
    """The global numbers of the experts that `ep_rank` holds: equal, contiguous, in rank order.

    Formula: megatron-core 0.19.2, `transformer/moe/moe_layer.py`, `BaseMoELayer.__init__`.

    Raises:
        LayoutError: `ep` does not divide `num_experts`, or `ep_rank` is not in the group.
    """
    if ep < 1 or num_experts < 1 or num_experts % ep:
        raise LayoutError(
            f"{num_experts} experts do not divide over ep={ep}",
            expected="a positive number of experts that is a multiple of ep",
            got=f"num_experts={num_experts}, ep={ep}",
            fix="choose an ep that divides the number of experts",
        )
    if not 0 <= ep_rank < ep:
        raise LayoutError(
            f"expert-parallel rank {ep_rank} does not exist",
            expected=f"0 <= ep_rank < {ep}",
            got=f"ep_rank={ep_rank}",
        )
    per_rank = num_experts // ep
    return range(ep_rank * per_rank, (ep_rank + 1) * per_rank)

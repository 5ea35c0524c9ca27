"""mcore's `MimoModel` on groups that are arguments, also where these are not NCCL's.

Imported lazily: it subclasses mcore's classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core.models.mimo.comm.colocated_communicator import (  # noqa: TID253 - base class
    BridgeDirection,
    ColocatedBridgeCommunicator,
)

from bridge_core.errors import LayoutError
from bridge_mimo.layout import LANGUAGE
from bridge_mimo.towers.deepstack import DeepstackMimoModel

if TYPE_CHECKING:
    from bridge_mimo.runtime.groups import MimoGroups


class BridgedMimoModel(DeepstackMimoModel):
    """`MimoModel`, with deepstack where a tower has it, that knows the groups of its components.

    Attributes:
        mimo_groups: groups of all components; set by whoever built the model.
    """

    mimo_groups: MimoGroups

    def _build_colocated_communicators(self) -> None:
        grids: Any = self.mimo_config.module_to_grid_map
        for name in self.mimo_config.modality_submodules_spec:
            self.colocated_comms[name, LANGUAGE] = ColocatedCommunicator(grids[name], grids[LANGUAGE], name)


class ColocatedCommunicator(ColocatedBridgeCommunicator):
    """mcore's exchange between components on the same ranks at different data-parallel sizes, on any backend.

    mcore's own asks for NCCL by name (0.19.2, models/mimo/comm/colocated_communicator.py). Making one is collective
    over the default group.

    Args:
        source, target: grids of the component that embeds, and of the language model.
        name: of the former.

    Raises:
        LayoutError: one data-parallel size does not divide the other, or one of them has pipeline stages or context
            parallelism.
    """

    def __init__(self, source: Any, target: Any, name: str) -> None:
        self.src_grid, self.dest_grid = source, target
        self.src_module_name, self.dest_module_name = name, LANGUAGE
        self.dim_mapping = {"b": 0, "h": 1}  # embeddings are flat: [tokens of all samples, width]
        self.current_rank = dist.get_rank()
        try:
            self._validate_grids()
        except ValueError as error:
            raise LayoutError(
                "megatron-core cannot pass embeddings between these colocated components",
                where=f"{name} to {LANGUAGE}",
                got=error,
                fix="choose pp=1 and cp=1 for both, and dp sizes one of which divides the other",
            ) from error
        self._extract_parallelism_info()
        self._build_rank_mappings()
        small, large = sorted((self.src_dp_size, self.dest_dp_size))
        self.scale = large // small
        self.gather_group_ranks: list[list[int]] = []
        self.gather_pg = None
        self.direction = BridgeDirection.EQUAL
        if self.scale > 1:
            fan_in = self.src_dp_size == large
            self.direction = BridgeDirection.FAN_IN if fan_in else BridgeDirection.FAN_OUT
            self.gather_group_ranks = self._build_gather_groups(
                iter_size=small,
                sibling_tp_size=self.src_tp_size if fan_in else self.dest_tp_size,
                scale=self.scale,
                rank_to_pos=self.rank_to_src_pos if fan_in else self.rank_to_dest_pos,
            )
            own, _ = dist.new_subgroups_by_enumeration(self.gather_group_ranks)
            self.gather_pg: Any = own

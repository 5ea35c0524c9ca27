"""Who holds what: ranks, pipeline stages and experts of a parallel layout, as plain integers.

Nothing here knows torch, Megatron or a running process. A `ParallelLayout` is given, never looked up,
and every answer is the one that Megatron-Core computes from its global state (0.16.1 and 0.19.2).
"""

from bridge_core.topology.experts import expert_range
from bridge_core.topology.layout import ParallelLayout, RankCoords
from bridge_core.topology.layout_string import parse_layout_string
from bridge_core.topology.pipeline import PipelinePlacement, PipelineStage, place_layers
from bridge_core.topology.ranks import RankGrid

__all__ = [
    "ParallelLayout",
    "PipelinePlacement",
    "PipelineStage",
    "RankCoords",
    "RankGrid",
    "expert_range",
    "parse_layout_string",
    "place_layers",
]

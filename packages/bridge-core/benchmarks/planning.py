"""How long it takes to plan a large model for one rank and for every rank of a layout. Run as a program: prints JSON.

`python planning.py CONFIG_JSON '{"tp": 4, "pp": 4, ...}'`. A process of its own, so that nothing is cached.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

from measure import memory_of

from bridge_core.families import family_for
from bridge_core.plan import Plan
from bridge_core.topology import ParallelLayout


def plan_all(config: dict, sizes: dict) -> dict[str, float]:
    """Plan, describe, list the shards of a rank, audit, list those of all ranks: seconds of each, and what came out."""
    memory = memory_of("self").anonymous
    times = [time.perf_counter()]
    family = family_for(config)
    plan = Plan(family, family.to_megatron(config), ParallelLayout(**sizes))
    times.append(time.perf_counter())
    plan.metadata()
    plan.local_shards(plan.layout.world_size // 2)
    times.append(time.perf_counter())
    audit = plan.audit()
    times.append(time.perf_counter())
    shards = pieces = 0
    for rank in range(plan.layout.world_size):
        for shard in plan.iter_local_shards(rank):
            shards += 1
            pieces += len(shard.pieces)
    times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times)]
    return {
        "plan": steps[0],
        "one_rank": steps[0] + steps[1],
        "audit": steps[2],
        "local_shards": steps[3],
        "seconds": times[-1] - times[0],
        "hf_tensors": audit.hf_tensors,
        "megatron_tensors": audit.megatron_tensors,
        "ranks": plan.layout.world_size,
        "shards": shards,
        "pieces": pieces,
        "anonymous": memory_of("self").anonymous - memory,
    }


if __name__ == "__main__":
    print(json.dumps(plan_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), json.loads(sys.argv[2]))))

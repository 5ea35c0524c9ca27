"""Who saves what of the shards that several ranks hold: by arithmetic alone, on published models."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

import pytest

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.runtime.file_owners import saved_by

PUBLISHED = Path(__file__).parent / "published"
CASES = [
    ("qwen3-0.6b", {"dp": 2}),  # tied: a third of the model is its embedding
    ("llama-3.1-8b", {"dp": 2}),
    ("llama-3.1-8b", {"tp": 2, "dp": 4}),
    ("llama-3.1-8b", {"tp": 4, "cp": 2, "dp": 2}),
    ("qwen3-30b-a3b", {"ep": 4, "dp": 8}),
    ("qwen3-30b-a3b", {"tp": 2, "ep": 2, "etp": 1, "dp": 4}),
    ("nemotron-3-nano-30b-a3b", {"tp": 2, "ep": 2, "etp": 2, "dp": 4}),
]


def shares(name, layout):
    """What every rank holds, and what it saves; numbers of elements by canonical name."""
    plan = AutoBridge.from_hf_config(json.loads((PUBLISHED / f"{name}.json").read_text())).plan(
        ParallelLayout(**layout)
    )
    for rank in range(plan.layout.world_size):
        shards = plan.local_shards(rank)
        yield plan, rank, shards, saved_by(plan, rank, shards)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_holders_of_a_shard_agree_on_one_of_them(name, layout):
    saved = Counter()
    for _, _, shards, mine in shares(name, layout):
        chosen = set(map(id, mine))
        assert [shard for shard in shards if id(shard) in chosen] == mine, "not in the plan's order"
        for shard in mine:
            saved.update((piece.source, piece.shape) for piece in shard.pieces)
    assert set(saved.values()) == {1}
    elements = sum(prod(shape) for _, shape in saved)
    plan = AutoBridge.from_hf_config(json.loads((PUBLISHED / f"{name}.json").read_text())).plan()
    assert elements == plan.audit().elements


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_shares_are_equal_as_far_as_whole_shards_allow(name, layout):
    """Of ranks that hold the same: without its smallest shard, the one that saves most saves no more than any other."""
    shared = {}
    for plan, rank, shards, mine in shares(name, layout):
        first = {}
        for shard in shards:
            first.setdefault(plan.holders(shard), shard.pieces)
        for kind, pieces in first.items():
            sizes = [prod(shard.shape) for shard in mine if plan.holders(shard) == kind]
            shared.setdefault((kind, pieces), {})[rank] = sizes
    assert any(len(found) > 1 for found in shared.values())
    for found in shared.values():
        most = max(found.values(), key=sum)
        assert sum(most) - min(most, default=0) <= min(map(sum, found.values())), found

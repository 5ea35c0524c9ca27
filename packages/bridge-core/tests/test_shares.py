"""Who saves what of the shards that several ranks hold: by arithmetic alone, on published models."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.geometry import tiling_error
from bridge_core.runtime.shares import LEAST, saved_by

PUBLISHED = Path(__file__).parent / "published"
CASES = [
    ("qwen3-0.6b", {"dp": 2}),  # tied: a quarter of the model is its embedding
    ("qwen3-0.6b", {"dp": 16}),
    ("llama-3.1-8b", {"dp": 64}),
    ("llama-3.1-8b", {"tp": 2, "dp": 4}),
    ("llama-3.1-8b", {"tp": 4, "cp": 2, "dp": 2}),
    ("qwen3-30b-a3b", {"ep": 4, "dp": 8}),
    ("qwen3-30b-a3b", {"tp": 2, "ep": 2, "etp": 1, "dp": 4}),
    ("nemotron-3-nano-30b-a3b", {"tp": 2, "ep": 2, "etp": 2, "dp": 4}),
]


def planned(name, layout):
    config = json.loads((PUBLISHED / f"{name}.json").read_text())
    return AutoBridge.from_hf_config(config).plan(ParallelLayout(**layout))


def shares(plan, may_cut=lambda shard: True):
    """What every rank holds, and what it saves."""
    for rank in range(plan.layout.world_size):
        shards = plan.local_shards(rank)
        yield rank, shards, saved_by(plan, rank, shards, may_cut)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_element_is_saved_by_one_rank(name, layout):
    plan = planned(name, layout)
    saved = {}
    for _, shards, mine in shares(plan):
        numbers = {(shard.chunk, shard.param): number for number, shard in enumerate(shards)}
        order = [numbers[shard.chunk, shard.param] for shard in mine]
        assert order == sorted(order), "not in the plan's order"
        for shard in mine:
            for piece in shard.pieces:
                saved.setdefault(piece.source.tensor, []).append((piece.shape, piece.source))
    expected = {name: shape for name, shape in plan.hf_tensors.items() if name not in plan.copies}
    assert saved.keys() == expected.keys()
    for tensor, shape in expected.items():
        assert tiling_error(shape, saved[tensor]) is None, tensor


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_nobody_saves_much_more_than_a_share(name, layout):
    """A share is what a rank would save of what it holds if all holders saved the same; no part exceeds a quarter.

    What is small anyway is not cut: norms, of ranks that each hold all of them.
    """
    plan = planned(name, layout)
    for rank, shards, mine in shares(plan):
        share = sum(
            prod(shard.shape) / plan.copy_of(rank, shard)[1] for shard in shards if not plan.is_second_copy(rank, shard)
        )
        assert sum(piece.numel for shard in mine for piece in shard.pieces) <= 1.25 * share + LEAST


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_cuts_are_few_and_never_short(name, layout):
    plan = planned(name, layout)
    for rank, shards, mine in shares(plan):
        whole = {(shard.chunk, shard.param): prod(shard.shape) for shard in shards}
        bands = [
            shard for shard in mine if sum(piece.numel for piece in shard.pieces) < whole[shard.chunk, shard.param]
        ]
        assert all(whole[shard.chunk, shard.param] > LEAST for shard in bands)
        turns = {plan.copy_of(rank, shard)[1] for shard in shards}
        assert len(bands) <= 8 * len(turns) + 8, rank


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_may_not_be_cut_is_saved_whole(name, layout):
    plan = planned(name, layout)
    for _, shards, mine in shares(plan, lambda shard: len(shard.shape) < 2):
        by_name = {(shard.chunk, shard.param): shard for shard in shards}
        assert all(by_name[shard.chunk, shard.param] == shard for shard in mine if len(shard.shape) > 1)

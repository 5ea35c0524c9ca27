"""Vectors that ranks reduce together: of any length, also shorter than there are ranks."""

from __future__ import annotations

import pytest
import torch


def reduce(lengths: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The largest and the sum over all ranks of vectors that each rank draws for itself."""
    import torch.distributed as dist

    from bridge_quant_export.live.vectors import reduced, summed

    group = dist.group.WORLD
    mine = [drawn(dist.get_rank(), length) for length in lengths]
    return [(reduced(vector, group), summed((1000 * vector).long(), group)) for vector in mine]


def drawn(rank: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(100 * rank + length))


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_every_rank_has_what_all_have_together(rank_pool, ranks):
    lengths = [0, 1, 2, 4, 7, 1001]
    for found in rank_pool.run(reduce, lengths, ranks=range(ranks)):
        for length, (largest, total) in zip(lengths, found, strict=True):
            vectors = torch.stack([drawn(rank, length) for rank in range(ranks)])
            assert torch.equal(largest, vectors.amax(0))
            assert torch.equal(total, (1000 * vectors).long().sum(0))

"""Attention over packed frames in plain PyTorch, for where Transformer Engine is not.

mcore's own `DotProductAttention` refuses packed sequences (0.16.1 and 0.19.2,
transformer/dot_product_attention.py), and a mask over all frames would need memory for every pair of
patches. Here each frame attends to itself.

Imported lazily, by `specs`: it subclasses mcore's class.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import (  # noqa: TID253 - base class, see above
    DotProductAttention,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention(DotProductAttention):
    """mcore's attention, and attention inside each of several packed sequences; without a mask there."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: [T, heads / tp, D] where sequences are packed, all with the same number of heads.
            attention_mask: for sequences that are not packed, as mcore takes it.
            packed_seq_params: `cu_seqlens_q` are the boundaries of the sequences, of queries and keys alike.
            args, kwargs: mcore's, for sequences that are not packed.

        Returns:
            [T, heads / tp * D].
        """
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        boundaries = packed_seq_params.cu_seqlens_q
        lengths = (boundaries[1:] - boundaries[:-1]).tolist()
        dropout = self.attention_dropout.p if self.training else 0.0
        parts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        frames = [scaled_dot_product_attention(*part, dropout_p=dropout, scale=self.softmax_scale) for part in parts]
        return torch.cat(frames, dim=1).transpose(0, 1).flatten(1)

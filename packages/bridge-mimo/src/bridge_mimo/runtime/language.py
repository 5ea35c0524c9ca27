"""The language model as a component: `GPTModel` with the positions of images, time, height and width, interleaved.

Imported lazily: it subclasses mcore's classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.embeddings.rope_utils import (  # noqa: TID253 - as below
    get_pos_emb_on_this_cp_rank,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import (  # noqa: TID253 - base class
    MultimodalRotaryEmbedding,
)
from megatron.core.models.gpt import GPTModel  # noqa: TID253 - base class
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


class InterleavedRotaryEmbedding(MultimodalRotaryEmbedding):
    """A rotary embedding over three positions whose channels take turns: time, height, width, time, ...

    mcore's own gives each position consecutive channels (0.16.1 and 0.19.2, models/common/embeddings/
    rotary_pos_embedding.py). The rule is that of transformers 5.23, models/qwen3_vl/modeling_qwen3_vl.py,
    `Qwen3VLTextRotaryEmbedding`.
    """

    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group: Any = None) -> Tensor:
        """Angles [S, B, 1, rotary channels], cut for this context-parallel rank.

        Args:
            position_ids: [3, B, S]: time, height and width; or [B, S], where all three are one, as in text.
            mrope_section: channels of each position; time has what the others leave.
            cp_group: context-parallel ranks, where they are not those that this was made with.
        """
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, *position_ids.shape)
        frequencies = self.inv_freq.to(position_ids.device)
        scale = 1.0 if self.seq_len_interpolation_factor is None else 1.0 / self.seq_len_interpolation_factor
        angles = (position_ids.float() * scale)[..., None] * frequencies  # [3, B, S, channels]
        axis = self._axis_of(len(frequencies), mrope_section).to(angles.device)
        turned = angles.gather(0, axis.expand(1, *angles.shape[1:]))[0]
        both = torch.cat((turned, turned), dim=-1).transpose(0, 1)[:, :, None].contiguous()
        group: Any = cp_group or self.cp_group
        return get_pos_emb_on_this_cp_rank(both, 0, group) if group is not None and group.size() > 1 else both

    @staticmethod
    def _axis_of(channels: int, section: list[int]) -> Tensor:
        """Which position turns each channel."""
        axis = torch.zeros(channels, dtype=torch.int64)
        for position in (1, 2):
            axis[position : 3 * section[position] : 3] = position
        return axis


class MropeGPTModel(GPTModel):
    """`GPTModel` with an `InterleavedRotaryEmbedding`; takes positions [3, B, S], or [B, S] of a text.

    Args:
        config: its `mrope_section` says how many channels each position has.
        pg_collection: groups of the component. Nothing global is read.
        options: further arguments of `GPTModel`.
    """

    def __init__(self, config: Any, *, pg_collection: ProcessGroupCollection, **options: Any) -> None:
        # A plain rotary embedding first: mcore makes the one over three positions of a global group.
        plain: dict[str, Any] = options | {"position_embedding_type": "rope"}
        super().__init__(config, pg_collection=pg_collection, **plain)
        self.position_embedding_type = "mrope"
        self.mrope_section = config.mrope_section
        self.rotary_pos_emb = InterleavedRotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=options.get("rotary_percent", 1.0),
            rotary_interleaved=config.rotary_interleaved,
            seq_len_interpolation_factor=options.get("seq_len_interpolation_factor"),
            rotary_base=options.get("rotary_base", 10000),
            cp_group=pg_collection.cp,
        )

"""The HF vision tower as it is, whole on every rank of its component.

Imported lazily: it subclasses mcore's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.vision_module.vision_module import VisionModule  # noqa: TID253 - base class
from torch import Tensor

from bridge_core.errors import LayoutError
from bridge_core.extras import require
from bridge_mimo.towers.config import check_groups

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class ReplicatedTower(VisionModule):
    """transformers' own vision tower. Build it from `bridge_mimo.towers.replicated_tower_spec`.

    Its parameters are `hf.<name>`, where HF's are `<prefix><name>` (`model.visual.` in Qwen3-VL), and every
    tensor-parallel rank holds and computes all of it.

    Args:
        config: says dtype and device.
        hf_config: config.json of the whole model.
        pg_collection: groups of the images component.
        feature_layer: which hidden state is the output, counted as transformers does (-2 in LLaVA); left out,
            what the tower itself pools: merged patches, and what deepstack mergers made beside them.
        class_token: keep the class token of a hidden state.

    Raises:
        LayoutError: the component has pipeline stages.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Mapping[str, Any],
        pg_collection: ProcessGroupCollection | None,
        *,
        feature_layer: int | None = None,
        class_token: bool = False,
    ) -> None:
        super().__init__(config)
        self.pg_collection = check_groups(config, pg_collection)
        if self.pg_collection.pp.size() > 1:
            raise LayoutError(
                "the HF tower is not cut into pipeline stages",
                where="images component",
                expected="pp=1",
                got=f"pp={self.pg_collection.pp.size()}",
                fix="use the tower of megatron-core's layers (tower_spec)",
            )
        self.tp_group = self.pg_collection.tp
        self.feature_layer, self.class_token = feature_layer, class_token
        self.hf = _hf_tower(hf_config, config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor | None = None) -> Tensor:
        """Embed images: [tokens, width] of packed patches and their grids, [images, tokens, width] of whole images."""
        first = next(self.hf.parameters())
        pixels = pixel_values.to(first.device, first.dtype)
        if self.feature_layer is None:
            output = self.hf(pixels, grid_thw=grid_thw)
            return torch.cat((output.pooler_output, *(getattr(output, "deepstack_features", None) or ())), dim=-1)
        states = self.hf(pixels, output_hidden_states=True).hidden_states[self.feature_layer]
        return states if self.class_token else states[:, 1:]

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Ignored: there is one stage."""


def _hf_tower(hf_config: Mapping[str, Any], config: TransformerConfig) -> torch.nn.Module:
    require("transformers", extra="hf")
    from transformers import AutoConfig, AutoModel

    options = {name: value for name, value in hf_config.items() if name != "model_type"}
    vision = AutoConfig.for_model(hf_config["model_type"], **options).vision_config
    device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
    with device:
        return AutoModel.from_config(vision, dtype=config.params_dtype)

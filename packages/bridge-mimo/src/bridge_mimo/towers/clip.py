"""A CLIP or SigLIP tower of mcore's `CLIPViTModel`, as LLaVA uses it: one of its last hidden states is the output.

| HF, after `vision_model.` | here |
|---|---|
| `embeddings.class_embedding` (CLIP) | `class_token`, of HF's shape [hidden] |
| `embeddings.patch_embedding` | `conv1` |
| `embeddings.position_embedding` | `position_embeddings` |
| `pre_layrnorm` (CLIP) | `ln_pre` |
| `encoder.layers.N` | `decoder.layers.N` |
| `post_layernorm` | `ln_post` |

Imported lazily: it subclasses mcore's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel  # noqa: TID253 - base class
from torch import Tensor

from bridge_core.errors import ConfigError, LayoutError
from bridge_core.runtime.layer_specs import Spec
from bridge_mimo.towers.config import check_groups
from bridge_mimo.towers.specs import layer_spec, spec_provider

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class ClipTower(CLIPViTModel):
    """mcore's CLIP tower with a choice of hidden state. Build it from `bridge_mimo.towers.clip_tower_spec`.

    Layers after the chosen state, and the last norm, are held for the way back and not trained.

    Args:
        config: of the tower's layers.
        image: "image_size" and "patch_size", and whether there is a "class_token".
        spec: which modules it is made of.
        pg_collection: groups of the images component. Nothing global is read.
        feature_layer: which hidden state is the output, counted as transformers does: 0 is what goes into the
            first layer, -1 what comes out of the last, before its norm.

    Raises:
        LayoutError: the component has pipeline stages, which mcore's tower has not.
        ConfigError: there is no such hidden state.
    """

    def __init__(
        self,
        config: TransformerConfig,
        image: Mapping[str, Any],
        spec: Spec,
        pg_collection: ProcessGroupCollection | None,
        feature_layer: int = -2,
    ) -> None:
        groups = check_groups(config, pg_collection)
        norm = spec_provider(spec).layer_norm()
        super().__init__(
            config,
            layer_spec(spec),
            ln_pre_impl=norm,
            ln_post_impl=norm,
            add_class_token=image["class_token"],
            class_token_len=int(image["class_token"]),
            patch_dim=image["patch_size"],
            img_h=image["image_size"],
            img_w=image["image_size"],
            model_subtype="clip" if image["class_token"] else "siglip",
            pg_collection=groups,
        )
        self.tp_group = groups.tp
        if self.ln_post is None:
            self.ln_post = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        if self.add_class_token:
            self.class_token = torch.nn.Parameter(self.class_token.detach().flatten())
        self.to(config.params_dtype)  # mcore leaves the convolution in float32
        self.last = _last_layer(config.num_layers, feature_layer, groups.pp.size())
        for unused in (*list(self.decoder.layers)[self.last + 1 :], self.ln_post):
            unused.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override] - no mask to be given
        """Embed images. Collective over the tensor-parallel ranks.

        Args:
            pixel_values: [images, 3, rows, columns].

        Returns:
            [images, patches, hidden], without the class token.
        """
        weight = self.conv1.weight
        hidden = self.conv1(pixel_values.to(weight.device, weight.dtype)).flatten(2).transpose(1, 2)
        if self.add_class_token:
            hidden = torch.cat((self.class_token.expand(len(hidden), 1, -1), hidden), dim=1)
        hidden = hidden + self.position_embeddings.weight
        if self.ln_pre is not None:
            hidden = self.ln_pre(hidden)
        hidden = hidden.transpose(0, 1).contiguous()
        if self.last >= 0:
            _, (hidden,) = self.decoder(hidden, None, extract_layer_indices={self.last})
        return hidden.transpose(0, 1)[:, int(self.add_class_token) :].contiguous()


def _last_layer(layers: int, feature_layer: int, stages: int) -> int:
    """The layer, from 0, that gives the chosen hidden state; -1 for what goes into the first."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    if stages > 1:
        raise LayoutError(
            "megatron-core's CLIP tower is not cut into pipeline stages",
            where="images component",
            expected="pp=1",
            got=f"pp={stages}",
        )
    if not -layers - 1 <= feature_layer <= layers:
        raise ConfigError(
            "the tower has no such hidden state",
            where="feature_layer",
            expected=f"{-layers - 1} to {layers}",
            got=feature_layer,
        )
    if "extract_layer_indices" not in signature(TransformerBlock.forward).parameters:
        raise ConfigError(
            "the installed megatron-core cannot give hidden states from inside a block",
            where="feature_layer",
            expected="megatron-core 0.17 or newer",
            fix="install a newer megatron-core, or use the HF tower (replicated_tower_spec)",
        )
    return (feature_layer if feature_layer >= 0 else layers + 1 + feature_layer) - 1

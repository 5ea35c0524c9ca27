"""The vision tower of Qwen3-VL and Qwen3.5 of mcore's `TransformerBlock`, with its own tensor and pipeline parallelism.

Parameters have the names that core's families plan under `vision_model.` (`bridge_core.families._vision`):

| here | on which stage | cut over tp |
|---|---|---|
| `patch_embed.proj`, `pos_embed` | the first | no |
| `decoder.layers.N` | as mcore places layers | yes |
| `deepstack_merger_list.K`, after layer `deepstack[K]` | the one of that layer | yes |
| `merger` | the last | yes |

What it computes is transformers 5.23's `Qwen3VLVisionModel` and `Qwen3_5VisionModel`
(models/qwen3_vl/modeling_qwen3_vl.py, models/qwen3_5/modeling_qwen3_5.py).

Imported lazily: it subclasses mcore's classes.
"""

from __future__ import annotations

from copy import copy
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.vision_module.vision_module import VisionModule  # noqa: TID253 - base class
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: TID253 - as above
from megatron.core.transformer.mlp import MLP  # noqa: TID253 - base class
from megatron.core.transformer.transformer_block import TransformerBlock  # noqa: TID253 - as above
from megatron.core.transformer.utils import sharded_state_dict_default  # noqa: TID253 - as above
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from bridge_core.errors import ConfigError, LayoutError
from bridge_core.runtime.layer_specs import Spec, placed_by
from bridge_mimo.towers.config import TowerSizes, check_groups
from bridge_mimo.towers.grids import Patches, interpolation, place_patches, rotary_angles
from bridge_mimo.towers.specs import layer_spec, mlp_submodules, spec_provider

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class PatchEmbedding(torch.nn.Module):
    """Pixels to hidden states: a convolution whose stride is its kernel, so a product with its flattened weight."""

    def __init__(self, config: TransformerConfig, sizes: TowerSizes) -> None:
        super().__init__()
        kernel = (sizes.frames, sizes.patch, sizes.patch)
        self.proj = torch.nn.Conv3d(
            sizes.channels, config.hidden_size, kernel, kernel, device=_device(config), dtype=config.params_dtype
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """[patches, channels * frames * patch * patch] -> [patches, hidden], in the dtype of the weight."""
        return F.linear(pixels.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class PatchMerger(MLP):
    """One embedding of the language model from each block of patches.

    Args:
        config: of the tower.
        sizes: of the tower.
        spec: which modules it is made of.
        tp_group: tensor-parallel ranks.
        norm_of_blocks: normalise whole blocks (deepstack) instead of patches.
    """

    def __init__(
        self, config: TransformerConfig, sizes: TowerSizes, spec: Spec, tp_group: Any, *, norm_of_blocks: bool = False
    ) -> None:
        block = config.hidden_size * sizes.merge**2
        own = copy(config)  # not `replace`, which would derive the initialisation of other sizes again
        own.hidden_size, own.ffn_hidden_size, own.activation_func = sizes.out, block, F.gelu
        super().__init__(own, mlp_submodules(spec), input_size=block, ffn_hidden_size=block, tp_group=tp_group)
        norm = spec_provider(spec).layer_norm()
        self.norm_size = block if norm_of_blocks else config.hidden_size
        self.norm = norm(config=config, hidden_size=self.norm_size, eps=config.layernorm_epsilon)

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:  # type: ignore[override]
        """[patches, 1, hidden] -> [patches / block, out]."""
        blocks = self.norm(hidden.reshape(-1, self.norm_size)).view(-1, self.input_size)
        output, bias = super().forward(blocks)
        return output if bias is None else output + bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """mcore's; its own asks the global state for the tensor-parallel group of the norm."""
        state: dict[str, Any] = {}
        group: Any = self.tp_group
        for name, child in self.named_children():
            state |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=group)
        return state


class QwenVisionTower(VisionModule):
    """One stage of the tower; on one stage, the whole. Build it from `bridge_mimo.towers.tower_spec`.

    Args:
        config: from `tower_config`.
        sizes: from `tower_sizes`.
        spec: which modules it is made of.
        pg_collection: groups of the images component. Nothing global is read.

    Raises:
        LayoutError: the groups differ from the configuration, or what deepstack mergers make does not fit
            beside the hidden states that go from stage to stage.
        ConfigError: the installed mcore cannot give hidden states from inside a block (before 0.17), which
            deepstack needs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        sizes: TowerSizes,
        spec: Spec,
        pg_collection: ProcessGroupCollection | None,
    ) -> None:
        super().__init__(config)
        self.pg_collection = check_groups(config, pg_collection)
        self.tp_group = self.pg_collection.tp
        self.sizes = sizes
        stage = self.pg_collection.pp.rank()
        self.pre_process, self.post_process = stage == 0, stage == self.pg_collection.pp.size() - 1
        _check_deepstack(sizes, alone=self.pre_process and self.post_process)
        if self.pre_process:
            options = {"device": _device(config), "dtype": config.params_dtype}
            self.patch_embed = PatchEmbedding(config, sizes)
            self.pos_embed = torch.nn.Embedding(sizes.positions, config.hidden_size, **options)
        with placed_by(config, self.pg_collection, vpp=1):
            self.decoder = TransformerBlock(
                config=config,
                spec=layer_spec(spec),
                post_layer_norm=False,
                pre_process=self.pre_process,
                post_process=self.post_process,
                pg_collection=self.pg_collection,
            )
        layers: Any = self.decoder.layers
        held = [layer.layer_number - 1 for layer in layers]
        self.earlier = sum(layer < (held[0] if held else config.num_layers) for layer in sizes.deepstack)
        self.deepstack = {layer: str(sizes.deepstack.index(layer)) for layer in held if layer in sizes.deepstack}
        self.deepstack_merger_list = torch.nn.ModuleDict(
            {
                number: PatchMerger(config, sizes, spec, self.tp_group, norm_of_blocks=True)
                for number in self.deepstack.values()
            }
        )
        if self.post_process:
            self.merger = PatchMerger(config, sizes, spec, self.tp_group)
        self.input_tensor: Tensor | None = None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """What the stage before gave: [patches, 1, width]."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, pixel_values: Tensor | None, grid_thw: Tensor) -> Tensor:
        """Embed images and videos. Collective over the tensor-parallel ranks.

        Args:
            pixel_values: [patches, channels * frames * patch * patch] of all images, as HF's processor packs
                them; read on the first stage only.
            grid_thw: [images, 3] integers: frames, rows and columns of patches. The same on every stage.

        Returns:
            On the last stage [patches / merge**2, out * (1 + K)]: the embedding of each block, then what each of the
            K deepstack mergers made of it. On others what the next stage takes: [patches, 1, width].

        Raises:
            ConfigError: pixels, grids or hidden states do not fit each other.
        """
        patches = place_patches(grid_thw, self.sizes.merge)
        hidden, earlier = self._received(pixel_values, patches)
        channels = self.config.kv_channels
        assert channels is not None  # mcore's configuration has filled it in
        rotary = rotary_angles(patches.coordinates, channels)
        extra: dict[str, Any] = {"extract_layer_indices": set(self.deepstack)} if self.deepstack else {}
        self.decoder.set_input_tensor(hidden)
        output = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=rotary.to(hidden.device),
            packed_seq_params=_packed(patches, hidden.device),
            **extra,
        )
        hidden, inside = output if extra else (output, [])
        made = [
            self.deepstack_merger_list[number](states)
            for number, states in zip(self.deepstack.values(), inside, strict=True)
        ]
        if self.post_process:
            return _beside(self.merger(hidden), *earlier, *made)
        return _beside(hidden, *(feature.view(len(hidden), 1, -1) for feature in (*earlier, *made)))

    def _received(self, pixels: Tensor | None, patches: Patches) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [patches, 1, hidden], and what earlier deepstack mergers made [blocks, out]."""
        count, hidden = len(patches.coordinates), self.config.hidden_size
        given = pixels if self.pre_process else self.input_tensor
        feature = self.sizes.out // self.sizes.merge**2
        width = self.sizes.pixels if self.pre_process else hidden + self.earlier * feature
        if given is None or len(given) != count or given.shape[-1] != width:
            raise ConfigError(
                "pixels do not fit the grids" if self.pre_process else "hidden states do not fit the grids",
                where="pixel_values" if self.pre_process else "the tensor from the stage before",
                expected=f"{count} patches of {width} numbers",
                got="nothing" if given is None else tuple(given.shape),
            )
        if self.pre_process:
            rows, weights = interpolation(patches, self.sizes.side)
            table = self.pos_embed.weight
            positions = (F.embedding(rows.to(table.device), table) * weights.to(table.device)[:, :, None]).sum(1)
            embedded = self.patch_embed(given.to(table.device))
            return (embedded + positions.to(embedded.dtype)).unsqueeze(1), []
        if not self.earlier:
            return given, []
        beside = given[..., hidden:].split(feature, dim=-1)
        return given[..., :hidden].contiguous(), [part.reshape(-1, self.sizes.out) for part in beside]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """mcore's, with deepstack mergers one by one: it would take a dictionary of modules for replicated."""
        lists = {name: child for name, child in self.named_children() if isinstance(child, torch.nn.ModuleDict)}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, mergers in lists.items():
            state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}{name}.")}
            for number, merger in mergers.items():
                state |= sharded_state_dict_default(
                    merger, f"{prefix}{name}.{number}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
        return state


def _device(config: TransformerConfig) -> Any:
    return torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()


def _packed(patches: Patches, device: Any) -> PackedSeqParams:
    ends = patches.boundaries.to(device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=patches.longest,
        max_seqlen_kv=patches.longest,
    )


def _beside(first: Tensor, *others: Tensor) -> Tensor:
    return torch.cat((first, *others), dim=-1) if others else first


def _check_deepstack(sizes: TowerSizes, *, alone: bool) -> None:
    if sizes.deepstack and "extract_layer_indices" not in signature(TransformerBlock.forward).parameters:
        raise ConfigError(
            "the installed megatron-core cannot give hidden states from inside a block, which deepstack needs",
            where="vision_deepstack_layers",
            expected="megatron-core 0.17 or newer",
            fix="install a newer megatron-core, or use the HF tower (replicated_tower_spec)",
        )
    if sizes.deepstack and not alone and sizes.out % sizes.merge**2:
        raise LayoutError(
            "what deepstack mergers make does not divide over the patches that go from stage to stage",
            where="vision_out_hidden_size",
            expected=f"a multiple of {sizes.merge**2}",
            got=sizes.out,
            fix="give the images component pp=1",
        )

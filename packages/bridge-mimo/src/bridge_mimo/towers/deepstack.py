"""A `MimoModel` whose encoder also feeds early layers of the language model (deepstack).

mcore's own takes one embedding per token from an encoder and aligns it with the text (0.19.2,
models/mimo/model/base.py). Here an encoder's output is wider: its embeddings, then one more set for each of
the language model's first layers. As one tensor it goes through mcore's bridges between components like any other;
before the language model it is taken apart, and each set is added after its layer where the images are, as
transformers 5.23 does (models/qwen3_vl/modeling_qwen3_vl.py, `Qwen3VLTextModel._deepstack_process`).

Imported lazily: it subclasses mcore's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron.core.models.mimo.model.base import MimoModel  # noqa: TID253 - base class
from torch import Tensor

from bridge_core.errors import ConfigError, LayoutError


class DeepstackMimoModel(MimoModel):
    """mcore's `MimoModel` with deepstack.

    Args:
        mimo_config, cp_group, tp_group: mcore's.
        deepstack: modality -> how many of the language model's first layers it feeds. Its encoder's output is
            [tokens, hidden * (1 + layers)].

    Raises:
        LayoutError: the language model's first stage has fewer layers than are fed.
        ConfigError: the language model recomputes whole layers: what is added inside them would be lost to backward.
    """

    def __init__(
        self, mimo_config: Any, cp_group: Any = None, tp_group: Any = None, *, deepstack: Mapping[str, int]
    ) -> None:
        super().__init__(mimo_config, cp_group=cp_group, tp_group=tp_group)
        self.deepstack = dict(deepstack)
        self._sets: list[Tensor] = []  # [S, B, H] each, zero where the text is
        settings = mimo_config.language_model_spec.params["config"]
        if any(self.deepstack.values()) and settings.recompute_granularity == "full":
            raise ConfigError(
                "a language model that is fed by deepstack cannot recompute whole layers",
                where="recompute_granularity",
                expected="None or selective",
                got="full",
                fix="recompute selectively: core_attn, mlp, layernorm",
            )
        language: Any = self.language_model
        if language is not None and self.role.is_first_stage("language"):
            self._feed(language.decoder.layers)

    def _feed(self, layers: Any) -> None:
        fed = max(self.deepstack.values(), default=0)
        if len(layers) < fed:
            raise LayoutError(
                "the language model's first stage has fewer layers than images feed",
                where="language component",
                expected=f"{fed} layers or more on the first stage",
                got=f"{len(layers)} layers",
                fix="use fewer stages, or more layers on the first (num_layers_in_first_pipeline_stage)",
            )
        for number in range(fed):
            layers[number].register_forward_hook(partial(self._add, number))

    def _add(self, number: int, layer: Any, inputs: object, output: Any) -> Any:
        """After layer `number`: what it gives, and the set that belongs there."""
        if number >= len(self._sets):
            return output
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden = hidden + self._sets[number].to(hidden.dtype)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As mcore's."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._sets = []

    def align_embeddings_by_token_positions(
        self, modality_embeddings: dict[str, Tensor], input_ids: Tensor, special_token_ids: dict[str, int]
    ) -> Tensor:
        """As mcore's, for encoders' outputs that may be wider than the language model.

        Args:
            modality_embeddings: modality -> [tokens, H * (1 + layers)], [tokens, H] of those without deepstack.
            input_ids: [B, S].
            special_token_ids: modality -> the token that stands for it.

        Returns:
            [S, B, H].
        """
        width = self.config.hidden_size
        narrow = dict(modality_embeddings)
        self._sets = []
        for name, layers in self.deepstack.items():
            wide = modality_embeddings.get(name)
            if wide is None or not len(wide):
                narrow.pop(name, None)
                continue
            if wide.shape[-1] != width * (1 + layers):
                raise ConfigError(
                    "an encoder's output is not as wide as its deepstack says",
                    where=f"modality {name}",
                    expected=f"[tokens, {width * (1 + layers)}]: {1 + layers} sets of {width}",
                    got=tuple(wide.shape),
                    fix="build the tower and the language model from the same fields",
                )
            narrow[name], *sets = wide.split(width, dim=-1)
            mask = (input_ids == special_token_ids[name])[:, :, None]
            for number, values in enumerate(sets):
                self._keep(number, _spread(values, mask))
        return super().align_embeddings_by_token_positions(narrow, input_ids, special_token_ids)

    def _keep(self, number: int, values: Tensor) -> None:
        if number == len(self._sets):
            self._sets.append(values)
        else:
            self._sets[number] = self._sets[number] + values

    def _shard_language_inputs(
        self, embeddings: Tensor | None, labels: Tensor | None, loss_mask: Tensor | None, packed_seq_params: Any = None
    ) -> Any:
        """As mcore's: what is added later is cut over sequence- and context-parallel ranks like the embeddings."""
        if embeddings is not None and self.partition_adapter is not None:
            cut: Any = self.partition_adapter.shard
            self._sets = [
                cut(embeddings=values, labels=None, loss_mask=None, packed_seq_params=packed_seq_params)[0]
                for values in self._sets
            ]
        return super()._shard_language_inputs(embeddings, labels, loss_mask, packed_seq_params)

    def _empty_encoder_output(self, encoder_name: str) -> Tensor:
        """What goes to the language model from a batch without images, as wide as with some."""
        empty = super()._empty_encoder_output(encoder_name)
        return empty.new_empty(0, empty.shape[-1] * (1 + self.deepstack.get(encoder_name, 0)), requires_grad=True)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[tokens, H] -> [S, B, H], where `mask` [B, S, 1] says, and zero elsewhere."""
    zeros = values.new_zeros(*mask.shape[:2], values.shape[-1])
    return zeros.masked_scatter(mask, values).transpose(0, 1).contiguous()

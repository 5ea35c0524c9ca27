"""Latent attention as models without a low-rank query have it, where megatron-core builds something else."""

from __future__ import annotations

from functools import cache
from typing import Any


def without_query_norm(layer: Any, config: Any) -> None:
    """Let a layer's queries come straight from the layer's input, in place.

    With `qk_layernorm` and without `q_lora_rank`, megatron-core 0.19.2 fuses a norm into `linear_q_proj`
    (transformer/mla_qk_norm_config.py, `_resolve_mla_qk_layernorm`), a second one after the layer's own
    `input_layernorm`. Neither Moonlight nor DeepSeek-V2-Lite have it, and 0.16.1 does not build it; without
    `qk_layernorm` the norm of keys and values would be gone as well. This projection is also the only one that is
    not told its tensor-parallel group (transformer/multi_latent_attention.py, `MLASelfAttention.__init__`), and would
    ask the global state for one.

    Args:
        layer: spec of a transformer layer.
        config: mcore's configuration.
    """
    attention = layer.submodules.self_attention
    if config.multi_latent_attention and config.q_lora_rank is None:
        attention.module = _plain_query(attention.module)


@cache
def _plain_query(attention: type) -> type:
    class PlainQueryAttention(attention):
        """The attention given, with the query projection that its spec names."""

        def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
            from megatron.core.transformer.spec_utils import ModuleSpec

            query = ModuleSpec(module=submodules.linear_q_proj, params={"tp_group": self.pg_collection.tp})
            return super()._resolve_qk_norm_config(submodules) | {"linear_q_proj": query}

    return PlainQueryAttention

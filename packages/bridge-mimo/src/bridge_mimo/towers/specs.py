"""Which modules a vision tower is made of: Transformer Engine's, mcore's own, or those of the CPU host backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridge_core.extras import require
from bridge_core.runtime.layer_specs import Spec

if TYPE_CHECKING:
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec


def spec_provider(spec: Spec) -> Any:
    """mcore's `BackendSpecProvider` of a kind of modules."""
    require("megatron.core", extra="mcore")
    if spec == "te":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    if spec == "host":
        from bridge_core.runtime.host.specs import host_spec_provider

        return host_spec_provider()()
    from megatron.core.models.backends import LocalSpecProvider

    return LocalSpecProvider()


def layer_spec(spec: Spec) -> ModuleSpec:
    """A layer in which every patch of a frame attends to every other.

    Norms are in the linears that follow them, except mcore's own modules, which have them beside and under
    these names in a checkpoint.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    provider = spec_provider(spec)
    fused = provider.fuse_layernorm_and_linear()
    norms = {} if fused else {name: provider.layer_norm() for name in ("input_layernorm", "pre_mlp_layernorm")}
    linear = provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    attention = provider.core_attention()
    add: Any = get_bias_dropout_add
    if spec != "te":
        from bridge_mimo.towers.attention import PackedAttention as attention  # noqa: N813
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear,
                    core_attention=attention,
                    linear_proj=provider.row_parallel_linear(),
                ),
            ),
            self_attn_bda=add,
            mlp=get_mlp_module_spec_for_backend(provider),
            mlp_bda=add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            }
            if not fused
            else {},
            **norms,
        ),
    )


def mlp_submodules(spec: Spec) -> MLPSubmodules:
    """Two linears, the first cut along its outputs and the second along its inputs; no norm."""
    from megatron.core.transformer.mlp import MLPSubmodules

    provider = spec_provider(spec)
    return MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())

"""Layer specs of mcore's production layout, built by mcore's own builders with CPU modules in them.

mcore's spec builders for Transformer Engine take their modules from one `BackendSpecProvider`. Here that
provider is exchanged for one of CPU modules while the builder runs, so a spec has whatever structure the
installed mcore gives it: dense, mixture of experts, mixed, latent attention, multi-token prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from importlib import import_module
from inspect import signature
from threading import Lock
from typing import TYPE_CHECKING, Any

from bridge_core.extras import require
from bridge_core.runtime.latent import without_query_norm

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

_lock = Lock()
VARIANTS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"


@cache
def host_spec_provider() -> type:
    """The `BackendSpecProvider` of the CPU modules (a class, without arguments).

    Grouped experts (`moe_grouped_gemm=True`) are mcore's `TEGroupedMLP` on grouped CPU linears; otherwise
    mcore's `SequentialMLP`, whose parameters are per-expert modules.
    """
    require("megatron.core", extra="mcore")
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import experts

    from bridge_core.runtime.host import linears

    # 0.16.1 asks for (module, submodules), later versions for a builder with its own submodules class.
    as_pair = "moe_use_legacy_grouped_gemm" in signature(LocalSpecProvider.grouped_mlp_modules).parameters

    class HostSpecProvider(LocalSpecProvider):
        def linear(self) -> type:
            return linears.HostDuplicatedLinear

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return linears.HostLayerNormColumnParallelLinear

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
            return linears.HostNorm

        def core_attention(self) -> type:
            return linears.HostDotProductAttention

        def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool = False) -> Any:
            if moe_use_grouped_gemm:
                module = experts.TEGroupedMLP
                submodules = getattr(experts, "GroupedMLPSubmodules", MLPSubmodules)(
                    linear_fc1=linears.HostColumnParallelGroupedLinear,
                    linear_fc2=linears.HostRowParallelGroupedLinear,
                )
            else:
                module = experts.SequentialMLP
                submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            return (module, submodules) if as_pair else partial(module, submodules=submodules)

        def activation_func(self) -> None:
            return None

    return HostSpecProvider


@contextmanager
def _host_modules() -> Iterator[Any]:
    """mcore's module of GPT spec builders, with the CPU provider in the place of Transformer Engine's."""
    require("megatron.core", extra="mcore")
    from megatron.core.models.gpt import gpt_layer_specs

    from bridge_core.runtime.host import linears

    replaced = {"TESpecProvider": host_spec_provider(), "TENorm": linears.HostNorm}
    with _lock, ExitStack() as stack:
        for module in (gpt_layer_specs, _variants()):
            if module is not None:
                stack.enter_context(_with_names(vars(module), replaced))
        yield gpt_layer_specs


def _variants() -> Any:
    """mcore's module of specs with gated delta nets, or None where a version has none."""
    try:
        return import_module(VARIANTS)
    except ModuleNotFoundError as error:
        if error.name != VARIANTS:
            raise
        return None


@contextmanager
def _with_names(names: dict[str, Any], replaced: dict[str, Any]) -> Iterator[None]:
    before = {name: names[name] for name in replaced if name in names}
    names.update(replaced)
    try:
        yield
    finally:
        for name in replaced:  # without Transformer Engine some versions have no such names
            del names[name]
        names.update(before)


def host_layer_spec(config: Any, *, moe: bool | None = None, qk_l2_norm: bool = False) -> ModuleSpec:
    """The spec of one transformer layer.

    Args:
        config: mcore's `TransformerConfig`.
        moe: a mixture-of-experts layer or a dense one; left out, whichever `config.num_moe_experts` says.
        qk_l2_norm: normalise queries and keys by their length, without parameters (Llama 4).

    Returns:
        A `ModuleSpec` for `TransformerBlockSubmodules(layer_specs=...)`. Give a model `host_block_spec`
        instead: for a bare layer spec mcore picks the final norm itself, and not the host's.
    """
    moe = config.num_moe_experts is not None if moe is None else moe
    with _host_modules() as builders:
        spec = builders.get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts if moe else None,
            moe_grouped_gemm=config.moe_grouped_gemm if moe else False,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            qk_l2_norm=qk_l2_norm,
        )
    _finished(spec)
    without_query_norm(spec, config)
    return spec


def host_block_spec(
    config: Any, *, pp_rank: int = 0, vp_stage: int | None = None, qk_l2_norm: bool = False
) -> TransformerBlockSubmodules:
    """The layer specs and the final norm of one pipeline stage, for `GPTModel(transformer_layer_spec=...)`.

    Args:
        config: mcore's `TransformerConfig`; `moe_layer_freq` decides which layers are mixtures of experts, and
            `linear_attention_freq` which are gated delta nets, where `experimental_attention_variant` names these.
        pp_rank: the stage, `pg_collection.pp.rank()`; an argument because the global state is not read.
        vp_stage: the virtual stage, for interleaved pipelines.
        qk_l2_norm: normalise queries and keys by their length, without parameters (Llama 4).
    """
    with _host_modules() as builders:
        if getattr(config, "experimental_attention_variant", None) == "gated_delta_net":
            build = import_module(VARIANTS).get_transformer_block_with_experimental_attention_variant_spec
            return build(config, vp_stage=vp_stage, pp_rank=pp_rank)
        block = builders.get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, qk_l2_norm=qk_l2_norm, vp_stage=vp_stage, pp_rank=pp_rank
        )
    for spec in block.layer_specs:
        _finished(spec)
        without_query_norm(spec, config)
    return block


def host_mtp_block_spec(
    config: Any,
    block: TransformerBlockSubmodules | ModuleSpec,
    *,
    pp_rank: int = 0,
    vp_stage: int | None = None,
) -> Any:
    """The multi-token-prediction layers on this stage, for `GPTModel(mtp_block_spec=...)`; None where there are none.

    Args:
        config: mcore's `TransformerConfig` with `mtp_num_layers`.
        block: what `host_block_spec` or `host_layer_spec` gave; its last layer is the prediction layer.
        pp_rank, vp_stage: as in `host_block_spec`.

    mcore asks its global `parallel_state` where these layers go, here and in `GPTModel`, in spite of these
    arguments: it must be initialised (0.16.1 and 0.19.2, transformer/multi_token_prediction.py).
    """
    with _host_modules() as builders:
        return builders.get_gpt_mtp_block_spec_for_backend(
            config=config, spec=block, backend=host_spec_provider()(), vp_stage=vp_stage, pp_rank=pp_rank
        )


def _finished(spec: Any) -> Any:
    """Latent attention in its host form; every other layer as mcore built it."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from bridge_core.runtime.host import linears

    if spec.submodules.self_attention.module is MLASelfAttention:
        spec.submodules.self_attention.module = linears.HostMLASelfAttention
    return spec


def host_hybrid_stack_spec() -> ModuleSpec:
    """The layers and the final norm of a hybrid model, for `HybridModel(hybrid_stack_spec=...)` (mcore 0.17 and later).

    mcore's own spec (models/hybrid/hybrid_layer_specs.py) names Transformer Engine's modules one by one; here
    every one of them is exchanged for the CPU module of the same parameters. Mamba layers are mcore's own.
    """
    require("megatron.core", extra="mcore")
    from megatron.core.models.gpt import moe_module_specs
    from megatron.core.models.hybrid import hybrid_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from bridge_core.runtime.host import linears

    modules = {
        "TELayerNormColumnParallelLinear": linears.HostLayerNormColumnParallelLinear,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TELinear": linears.HostDuplicatedLinear,
        "TENorm": linears.HostNorm,
        "TEDotProductAttention": linears.HostDotProductAttention,
    }
    named = vars(hybrid_layer_specs)
    spec = _exchanged(hybrid_layer_specs.hybrid_stack_spec, [(named[name], modules[name]) for name in modules])
    experts = moe_module_specs.get_moe_module_spec_for_backend(
        backend=host_spec_provider()(), num_experts=1, moe_grouped_gemm=True
    )
    spec.submodules.moe_layer.submodules.mlp = partial(linears.HostMoELayer, **experts.keywords)
    return spec


def _exchanged(spec: Any, modules: list[tuple[Any, Any]]) -> Any:
    """A copy of a spec, or of a part of one, with other modules in it."""
    for theirs, ours in modules:
        if spec is theirs:
            return ours
    if isinstance(spec, partial):
        return partial(
            spec.func, *spec.args, **{name: _exchanged(part, modules) for name, part in spec.keywords.items()}
        )
    if isinstance(spec, list):
        return [_exchanged(part, modules) for part in spec]
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{item.name: _exchanged(getattr(spec, item.name), modules) for item in fields(spec)})
    return spec

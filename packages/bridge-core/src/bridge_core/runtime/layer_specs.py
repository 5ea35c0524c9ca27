"""Which modules the layers of a model are made of: megatron-core's spec builders, and what they need to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from bridge_core.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

Spec = Literal["te", "local", "host"]


def block_spec(spec: Spec, config: TransformerConfig, *, pp_rank: int, vp_stage: int | None) -> Any:
    """The layer specs of one chunk, from the builder that fits."""
    if spec == "host":
        from bridge_core.runtime.host import host_block_spec

        return host_block_spec(config, pp_rank=pp_rank, vp_stage=vp_stage)
    if getattr(config, "experimental_attention_variant", None) is not None:
        return _variant_spec(spec, config, pp_rank=pp_rank, vp_stage=vp_stage)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from bridge_core.runtime.latent import without_query_norm

    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=spec == "te",
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if spec == "te":  # the local spec has standalone norms
        for layer in block.layer_specs or ():
            without_query_norm(layer, config)
    return block


def _variant_spec(spec: Spec, config: TransformerConfig, *, pp_rank: int, vp_stage: int | None) -> Any:
    """The layer specs of a chunk some of whose layers are gated delta nets."""
    if spec != "te":
        raise ConfigError(
            "megatron-core builds gated delta nets of Transformer Engine's modules only",
            where="spec",
            expected="te, or host on a CPU",
            got=spec,
            fix="install Transformer Engine, or take spec='host' on a CPU",
        )
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec,
    )

    return get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)


def mtp_spec(spec: Spec, config: TransformerConfig, block: Any, *, pp_rank: int, vp_stage: int | None) -> Any:
    """The prediction layers of one chunk; None where there are none. Call inside `placed_by`."""
    if not config.mtp_num_layers:
        return None
    if spec == "host":
        from bridge_core.runtime.host import host_mtp_block_spec

        return host_mtp_block_spec(config, block, pp_rank=pp_rank, vp_stage=vp_stage)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    return get_gpt_mtp_block_spec(
        config, block, use_transformer_engine=spec == "te", vp_stage=vp_stage, pp_rank=pp_rank
    )


@contextmanager
def placed_by(config: TransformerConfig | None, groups: ProcessGroupCollection, vpp: int) -> Iterator[None]:
    """Answer by `groups` what mcore asks its global state of the pipeline, while a chunk is built or described.

    Where a model has prediction layers or a layout string, mcore asks for this stage and the number of virtual ones in
    spite of the groups that it was given (0.16.1 and 0.19.2, transformer/multi_token_prediction.py, `mtp_on_this_rank`,
    and transformer/pipeline_parallel_layer_layout.py, `get_num_layers_to_build` and `get_layer_offset`). For these
    models three functions of `parallel_state` are exchanged in the meantime; its state is neither read nor changed.
    For others, nothing is done.
    """
    if not getattr(config, "mtp_num_layers", None) and getattr(config, "pipeline_model_parallel_layout", None) is None:
        yield
        return
    from megatron.core import parallel_state

    last = groups.pp.rank() == groups.pp.size() - 1

    def is_last(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
        return last and (ignore_virtual or vpp == 1 or vp_stage == vpp - 1)

    answers = {
        "get_pipeline_model_parallel_rank": groups.pp.rank,
        "get_virtual_pipeline_model_parallel_world_size": lambda: vpp if vpp > 1 else None,
        "is_pipeline_last_stage": is_last,
    }
    before = {name: getattr(parallel_state, name) for name in answers}
    for name, answer in answers.items():
        setattr(parallel_state, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(parallel_state, name, function)

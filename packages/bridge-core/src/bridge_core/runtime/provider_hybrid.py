"""The live `HybridModel` of a provider: layers by pattern, pipelines spelled out in it."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError
from bridge_core.topology import ParallelLayout, place_layers
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern, with_chunks

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

# What a pattern with pipeline chunks stands for; mcore refuses or ignores these options beside it.
PIPELINE_OPTIONS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def pattern_with_pipeline(text: str, layout: ParallelLayout, mtp_num_layers: int | None) -> str:
    """The pattern that `HybridModel` is given: as many depths of prediction as asked for, a chunk per pipeline stage.

    mcore recommends to spell pipelines out, and has no virtual stages otherwise (0.19.2,
    models/hybrid/hybrid_layer_allocation.py, `select_pipeline_segment`).

    Args:
        text: the model's layers.
        layout: says how they are spread.
        mtp_num_layers: depths of prediction layers.

    Raises:
        LayoutError: the layers do not divide as the layout asks.
        ConfigError: the layout has prediction layers elsewhere than on the last stage.
    """
    pattern = parse_hybrid_pattern(text)._replace(depths=mtp_num_layers or 0)
    placement = place_layers(layout, num_layers=len(pattern.decoder), mtp_num_layers=mtp_num_layers, hybrid=True)
    if pattern.depths and not placement.stages[-1].mtp_layers:
        raise ConfigError(
            "a hybrid model predicts on its last pipeline stage only",
            where="pipeline_model_parallel_layout",
            expected="'m' in the last chunk",
            got=layout.pipeline_model_parallel_layout,
            fix="put every 'm' into the last chunk, or set mtp_num_layers to None to build without prediction",
        )
    return str(with_chunks(pattern, placement) if layout.pp > 1 else pattern._replace(chunks=(pattern.decoder,)))


def hybrid_chunk(
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    spec: str,
    pattern: str,
    stage: int,
    vpp: int,
    chunk_size: int | None = None,
    **arguments: Any,
) -> HybridModel:
    """One chunk of a `HybridModel`.

    Args:
        config: mcore's configuration, without its pipeline options.
        groups: of the layout.
        spec: `"te"` or `"host"`.
        pattern: of `pattern_with_pipeline`.
        stage, vpp: this virtual stage, and how many there are.
        chunk_size: positions that the scan of a Mamba mixer takes at once; mcore's default if None.
        arguments: more of `HybridModel`'s own.
    """
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    pp, rank = groups.pp.size(), groups.pp.rank()
    return HybridModel(
        config,
        stack_spec(spec, chunk_size),
        hybrid_layer_pattern=pattern,
        pre_process=rank == 0 and stage == 0,
        post_process=rank == pp - 1 and stage == vpp - 1,
        parallel_output=True,
        pg_collection=groups,
        vp_stage=stage if vpp > 1 else None,
        **arguments,
    )


def stack_spec(spec: str, chunk_size: int | None) -> Any:
    """The modules that a hybrid model is made of, with the chunk size of their scans if one is given.

    Raises:
        ConfigError: there are no such modules in megatron-core.
    """
    if spec == "host":
        from bridge_core.runtime.host import host_hybrid_stack_spec

        stack = host_hybrid_stack_spec()
    elif spec == "te":
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        stack = deepcopy(hybrid_stack_spec)
    else:
        raise ConfigError(
            "megatron-core has hybrid models of Transformer Engine's modules alone",
            where="spec",
            expected="te or host",
            got=spec,
            fix="install Transformer Engine, or take spec='host' on a CPU",
        )
    if chunk_size is not None:
        submodules: Any = stack.submodules
        mixer = submodules.mamba_layer.submodules.mixer
        mixer.params = {**(mixer.params or {}), "chunk_size": chunk_size}
    return stack

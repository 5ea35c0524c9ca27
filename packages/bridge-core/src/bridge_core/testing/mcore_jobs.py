"""Jobs for the pool of ranks: load an imported checkpoint into real mcore models, and look at them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from bridge_core.runtime.provider import Provider, Spec


def build(
    fields: dict[str, Any], layout: dict[str, Any], *, spec: Spec | None = None, vocab_divisible_by: int = 1
) -> tuple[Provider, Any, list[Any]]:
    """Provider, groups and model chunks of this rank, on its GPU if it has one; call inside `host_backend`. Collective.

    Args:
        fields: Megatron fields of the model.
        layout: parallel sizes, and options of the pipeline.
        spec: what layers are made of. On a GPU production's modules take the place of the host backend's.
        vocab_divisible_by: the vocabulary is padded to a multiple of this times `tp`.
    """
    from bridge_core.runtime.provider import Provider
    from bridge_core.testing.rank_worker import groups

    logging.getLogger("megatron").setLevel(logging.ERROR)  # deprecation notes that say nothing about the job
    provider = Provider(fields, spec=on_this_device(spec))
    provider.apply_overrides(settings(layout) | {"make_vocab_size_divisible_by": vocab_divisible_by})
    names = ("tp", "pp", "ep", "etp", "cp", "dp")
    pg = groups(**{name: layout[name] for name in names if name in layout})
    seed_gpu(pg)
    return provider, pg, provider.provide_distributed_model(pg)


def on_this_device(spec: Spec | None) -> Spec | None:
    """A spec, but for the host backend's with Transformer Engine: there it is the one that production would take.

    Without it the host backend's modules stay, on a GPU too: they have the names and dtypes of Transformer Engine's.
    """
    return None if spec == "host" and find_spec("transformer_engine") else spec


def seed_gpu(pg: Any) -> None:
    """Give mcore the random states of a GPU, which it asks for when it fills weights and drops out; none on a CPU."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(1234, tp_rank=pg.tp.rank(), ep_rank=pg.ep.rank(), etp_rank=pg.expt_tp.rank())


def settings(layout: dict[str, Any]) -> dict[str, Any]:
    """Provider settings of a layout."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "cp": "context_parallel_size",
    }
    rest = {name: value for name, value in layout.items() if name not in names and name != "dp"}
    return {names[name]: value for name, value in layout.items() if name in names} | rest


@contextmanager
def context_parallel_without_te() -> Iterator[None]:
    """mcore's own attention can be built with context parallelism, although it cannot compute so.

    Context parallelism is Transformer Engine's alone (0.16.1 and 0.19.2, transformer/dot_product_attention.py,
    `DotProductAttention.__init__`); what a rank holds does not depend on whose attention it is.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    build = DotProductAttention.__init__

    def built(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        size, config.context_parallel_size = config.context_parallel_size, 1
        try:
            build(self, config, *args, **kwargs)
        finally:
            config.context_parallel_size = size

    DotProductAttention.__init__ = built
    try:
        yield
    finally:
        DotProductAttention.__init__ = build


@contextmanager
def global_state_where_mcore_needs_it(chunks: list[Any], pg: Any) -> Iterator[None]:
    """mcore asks its global state for a data-parallel rank when an embedding is on two stages, tied or for MTP.

    0.16.1 and 0.19.2, models/common/language_module/language_module.py,
    `tie_embeddings_and_output_weights_state_dict`, and transformer/multi_token_prediction.py,
    `tie_word_embeddings_state_dict`: whoever saves such a model has initialised it.
    """
    from megatron.core import parallel_state

    twice = any(chunk.share_embeddings_and_output_weights or chunk.config.mtp_num_layers for chunk in chunks)
    if not twice or pg.pp.size() == 1 or parallel_state.model_parallel_is_initialized():
        yield
        return
    parallel_state.initialize_model_parallel(pg.tp.size(), pg.pp.size())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextmanager
def global_state(layout: dict[str, Any]) -> Iterator[None]:
    """mcore's global state of a layout, for what of mcore cannot do without. Collective."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        layout.get("tp", 1),
        layout.get("pp", 1),
        layout.get("vpp"),
        expert_model_parallel_size=layout.get("ep", 1),
        expert_tensor_parallel_size=layout.get("etp"),
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def sharded(chunks: list[Any], pg: Any) -> dict[str, Any]:
    """The sharded state of all chunks, as Megatron-LM names them."""
    metadata = {"dp_cp_group": pg.dp_cp}
    with global_state_where_mcore_needs_it(chunks, pg):
        states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return {"model": states[0]} if len(states) == 1 else {f"model{n}": state for n, state in enumerate(states)}


def load(chunks: list[Any], pg: Any, folder: str) -> None:
    """mcore's own loading, at its default strictness."""
    from megatron.core import dist_checkpointing

    loaded: Any = dist_checkpointing.load(sharded(chunks, pg), folder)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{number}"], strict=True)


def load_and_run(
    fields: dict[str, Any],
    layout: dict[str, Any],
    folder: str,
    tokens: Tensor,
    *,
    spec: Spec | None = None,
    save_to: str | None = None,
) -> tuple[dict[tuple[int, str], Tensor], Tensor | None, int]:
    """Load a checkpoint into a real model and run it; save it again if asked to. Collective.

    Returns:
        Parameters by chunk and name, this rank's logits [1, S, V / tp] (None but on the last stage), its tp rank.
    """
    import torch
    from megatron.core import dist_checkpointing

    from bridge_core.runtime.host import host_backend

    with host_backend():
        _, pg, chunks = build(fields, layout, spec=spec)
        load(chunks, pg, folder)
        params = {
            (number, name): value.detach().clone()
            for number, chunk in enumerate(chunks)
            for name, value in chunk.named_parameters()
        }
        with torch.no_grad():
            logits = forward([chunk.eval() for chunk in chunks], pg, tokens)
        if save_to is not None:
            dist_checkpointing.save(sharded(chunks, pg), save_to)
    return params, logits, pg.tp.rank()


@contextmanager
def global_memory_buffer() -> Iterator[None]:
    """The scratch memory that mcore's forward takes from its global state, on a GPU, if nobody has made it.

    0.19.2, transformer/dot_product_attention.py, transformer/moe/token_dispatcher.py, tensor_parallel/layers.py.
    """
    import torch
    from megatron.core import parallel_state

    if not torch.cuda.is_available() or parallel_state._GLOBAL_MEMORY_BUFFER is not None:
        yield
        return
    parallel_state._set_global_memory_buffer()
    try:
        yield
    finally:
        parallel_state.destroy_global_memory_buffer()


def forward(chunks: list[Any], pg: Any, tokens: Tensor) -> Tensor | None:
    """Logits [1, S, V / tp] on the last stage, through all stages and chunks, wrapped or not, by plain sends."""
    with global_memory_buffer():
        return _forward(chunks, pg, tokens)


def _forward(chunks: list[Any], pg: Any, tokens: Tensor) -> Tensor | None:
    import torch
    import torch.distributed as dist

    from bridge_core.runtime.homes import unwrap

    size = tokens.shape[1]
    device = next(chunks[0].parameters()).device
    tokens, positions = tokens.to(device), torch.arange(size, device=device).view(1, size)
    if unwrap(chunks)[0].position_embedding_type == "mrope":
        positions = positions.expand(3, 1, size)  # of a text, time, height and width are one
    mask = torch.ones(size, size, device=device).triu(1).bool().view(1, 1, size, size)
    pp, rank = pg.pp.size(), pg.pp.rank()
    config = chunks[0].config
    output = None
    for number in range(pp * len(chunks)):
        if number % pp != rank:
            continue
        chunk = chunks[number // pp]
        if number:
            share = size // config.tensor_model_parallel_size if config.sequence_parallel else size
            hidden = torch.empty(share, 1, config.hidden_size, device=device)
            dist.recv(hidden, dist.get_global_rank(pg.pp, (rank - 1) % pp), group=pg.pp)
            chunk.set_input_tensor(hidden)
        output = chunk(tokens, positions, mask)
        if number < pp * len(chunks) - 1:
            dist.send(output.contiguous(), dist.get_global_rank(pg.pp, (rank + 1) % pp), group=pg.pp)
            output = None
    return output

"""Jobs for the pool: real hybrid models with Mamba layers, loaded, saved, streamed, and run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def hybrid_host() -> Iterator[None]:
    """The CPU backend with Mamba layers. mcore has no global state."""
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mamba import mamba_layers

    with host_backend(), mamba_layers():
        yield


@contextmanager
def plain_mixers() -> Iterator[None]:
    """Mamba mixers compute as `mamba_reference` says, with the parameters and projections that mcore gave them."""
    import torch
    from mamba_reference import mixer
    from megatron.core.ssm.mamba_mixer import MambaMixer

    def forward(self, hidden_states, *args, **kwargs):
        projected, _ = self.in_proj(hidden_states)
        tensors = self.conv1d_weight, self.conv1d_bias, self.A_log, self.D, self.dt_bias, self.norm.weight
        sizes = {"head_dim": self.headdim, "state": self.d_state, "eps": self.norm.eps}
        outputs = [mixer(projected[:, n], *tensors, **sizes) for n in range(projected.shape[1])]
        return self.out_proj(torch.stack(outputs, dim=1))

    theirs = MambaMixer.forward
    MambaMixer.forward = forward
    try:
        yield
    finally:
        MambaMixer.forward = theirs


def make(bridge, layout: dict[str, Any], **changes: Any):
    """Groups and chunks of a model whose weights are not loaded."""
    from bridge_core.testing.mcore_jobs import build

    _, pg, chunks = build(bridge.fields | changes, layout, spec="host", vocab_divisible_by=16)
    for tensor in weights(chunks).values():
        tensor.data.fill_(float("nan"))
    return pg, chunks


def weights(chunks) -> dict[tuple[int, str], Any]:
    """Parameters, and the expert biases, which are buffers."""
    return {
        (number, name): tensor
        for number, chunk in enumerate(chunks)
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
        if "local_tokens_per_expert" not in name
    }


def logits_of(chunks, pg, tokens):
    """Logits of the main model; prediction layers do not take part in them."""
    import torch

    from bridge_core.testing.mcore_jobs import forward

    for chunk in chunks:
        chunk.mtp_process = False
    with torch.no_grad(), plain_mixers():
        return forward([chunk.eval() for chunk in chunks], pg, tokens)


def round_trip(path: str, layout: dict[str, Any], out: str, tokens) -> dict[str, Any]:
    """Load, save, stream, run: what each step said on this rank."""
    from runtime.helpers import poisoned_parallel_state

    from bridge_core import AutoBridge

    with ExitStack() as stack:
        stack.enter_context(hybrid_host())
        bridge = AutoBridge.from_hf_pretrained(path)
        pg, chunks = make(bridge, layout)
        with poisoned_parallel_state(frozenset()) as reads:
            loaded = bridge.load_hf_weights(chunks)
            saved = bridge.save_hf_pretrained(chunks, out)
            tensors = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks, bucket_bytes=60_000)}
        assert not reads, reads
        assert not any(tensor.isnan().any() for tensor in weights(chunks).values())
        return {
            "loaded": loaded.bytes_read,
            "held": sum(tensor.numel() * tensor.element_size() for tensor in weights(chunks).values()),
            "saved": saved.bytes_written,
            "stream": tensors,
            "order": list(tensors),
            "logits": logits_of(chunks, pg, tokens),
            "tp": pg.tp.rank(),
            "patterns": [chunk.hybrid_layer_pattern for chunk in chunks],
        }


def load_by_mcore(path: str, folder: str, layout: dict[str, Any], tokens, save_to: str | None = None):
    """Load an imported checkpoint by mcore's own code: weights, logits, tp rank. Save it again if asked to."""
    from megatron.core import dist_checkpointing

    from bridge_core import AutoBridge
    from bridge_core.testing.mcore_jobs import load, sharded

    bridge = AutoBridge.from_hf_pretrained(path)
    with hybrid_host():
        pg, chunks = make(bridge, layout)
        load(chunks, pg, folder)
        found = {key: tensor.detach().clone() for key, tensor in weights(chunks).items()}
        if save_to is not None:
            dist_checkpointing.save(sharded(chunks, pg), save_to)
        return found, logits_of(chunks, pg, tokens), pg.tp.rank()


def keys_of(path: str, layout: dict[str, Any]) -> dict[str, Any]:
    """mcore's own checkpoint keys of this rank's part: global shape and dtype of tensors, None of objects."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    from bridge_core import AutoBridge
    from bridge_core.testing.mcore_jobs import sharded

    with hybrid_host():
        pg, chunks = make(AutoBridge.from_hf_pretrained(path), layout)
        state = sharded(chunks, pg)
        apply_factories(state)
        found: dict[str, Any] = {}

        def walk(value):
            if isinstance(value, dict | list):
                for item in value.values() if isinstance(value, dict) else value:
                    walk(item)
            elif isinstance(value, ShardedTensor):
                found[value.key] = tuple(value.global_shape)
            elif isinstance(value, ShardedObject):
                found[value.unique_key] = None

        walk(state)
        return found


def bfloat16_round_trip(path: str, layout: dict[str, Any], out: str) -> dict[str, str]:
    """Load a bfloat16 checkpoint into a bfloat16 model and save it: dtypes of the live tensors by name."""
    import torch

    from bridge_core import AutoBridge

    with hybrid_host():
        bridge = AutoBridge.from_hf_pretrained(path)
        _, chunks = make(bridge, layout, params_dtype=torch.bfloat16, bf16=True)
        bridge.load_hf_weights(chunks)
        bridge.save_hf_pretrained(chunks, out)
        return {name: str(tensor.dtype) for (_, name), tensor in weights(chunks).items()}

"""Jobs for the pool of ranks: tiny real Megatron models with adapters, trained, saved and looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SEQUENCE = 16
VOCAB = 96
DENSE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "qk_layernorm": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "vocab_size": VOCAB,
    "seq_length": SEQUENCE,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "rope",
}
MOE = DENSE | {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32,
    "moe_router_load_balancing_type": "none",
    "moe_grouped_gemm": True,
}
BIASED = DENSE | {"add_bias_linear": True, "add_qkv_bias": True, "normalization": "LayerNorm", "qk_layernorm": False}
LATENT = {name: value for name, value in DENSE.items() if name not in ("kv_channels", "num_query_groups")} | {
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "rope_type": "rope",
}


@dataclass(frozen=True)
class Case:
    """A model, a layout, adapters, and where weights come from and go to."""

    fields: dict[str, Any]
    layout: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = field(default_factory=dict)
    spec: str = "host"
    load: str | None = None
    save: str | None = None


def make(case: Case, *, seed: int = 1234):
    """Groups and the model of this rank, with distinct values in every parameter of the base."""
    import torch

    from bridge_core.testing.mcore_jobs import build

    torch.manual_seed(seed)
    if case.fields.get("multi_latent_attention"):
        pg, chunks = latent(case)
    else:
        _, pg, chunks = build(case.fields, case.layout, spec=case.spec)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return pg, chunks


def latent(case: Case):
    """A model with latent attention, which has a configuration class of its own."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from bridge_core.runtime.host import cpu_friendly, host_block_spec
    from bridge_core.testing.rank_worker import groups

    beside = ("vocab_size", "seq_length", "share_embeddings_and_output_weights", "position_embedding_type")
    fields = {name: value for name, value in case.fields.items() if name not in beside}
    fields |= {"activation_func": torch.nn.functional.silu}
    config = MLATransformerConfig(**fields | cpu_friendly(fields))
    pg = groups(**case.layout)
    model = GPTModel(
        config,
        host_block_spec(config),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=pg,
    )
    return pg, [model]


def adapted(case: Case):
    """`make` with adapters, loaded if the case says so."""
    from bridge_core.testing.mcore_jobs import load
    from bridge_peft import LoraConfig, apply_lora

    pg, chunks = make(case)
    report = apply_lora(chunks, LoraConfig(**case.lora), pg) if case.lora is not None else None
    if case.load is not None:
        load(chunks, pg, case.load)
    return pg, chunks, report


def stir(chunks) -> None:
    """Distinct values in every factor, B too."""
    import torch

    torch.manual_seed(99)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if ".adapter." in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)


def batch(number: int):
    """Tokens and labels of one sequence."""
    import torch

    tokens = ((torch.arange(SEQUENCE + 1) * (7 + 4 * number) + 3 * number) % VOCAB).view(1, -1)
    return tokens[:, :-1], tokens[:, 1:]


def logits_of(model, number: int = 0):
    """Logits [1, S, V / tp] of one sequence."""
    import torch

    tokens, _ = batch(number)
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().view(1, 1, SEQUENCE, SEQUENCE)
    return model(tokens, torch.arange(SEQUENCE).view(1, SEQUENCE), mask)


def whole(logits, pg):
    """Logits of the whole vocabulary, outside of any graph."""
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(logits) for _ in range(pg.tp.size())]
    dist.all_gather(parts, logits.detach().contiguous(), group=pg.tp)
    return torch.cat(parts, dim=-1)


def shards(chunks, pg, values) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """(key, global shape, offset, chunk) of every adapter parameter, with other values in their places.

    Args:
        values: parameter -> tensor of its shape.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from bridge_core.testing.mcore_jobs import sharded
    from bridge_peft import adapter_entries

    found = []
    own = {parameter.data_ptr(): values(parameter) for chunk in chunks for parameter in chunk.parameters()}
    for state in sharded(chunks, pg).values():
        for entry in adapter_entries(state).values():
            value = own[entry.data.data_ptr()]
            if value is None:
                continue
            if isinstance(entry, ShardedTensorFactory):
                parts = entry.build_fn(entry.key, value, entry.replica_id, None)
            else:
                entry.data = value
                parts = [entry]
            for part in parts:
                data = part.data.detach().clone().reshape([1] * part.prepend_axis_num + list(part.data.shape))
                found.append((part.key, tuple(part.global_shape), tuple(part.global_offset), data))
    return found


def assemble(answers) -> dict[str, Any]:
    """Whole tensors from the shards of all ranks; copies must be equal."""
    import torch

    made: dict[str, Any] = {}
    for key, shape, offset, data in [shard for answer in answers for shard in answer]:
        tensor = made.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        place = tensor[tuple(slice(o, o + s) for o, s in zip(offset, data.shape, strict=True))]
        if not place.isnan().all():
            torch.testing.assert_close(data, place, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
        place.copy_(data)
    assert not any(tensor.isnan().any() for tensor in made.values())
    return made


def train(
    case: Case,
    *,
    sequences: int = 2,
    steps: int = 1,
    stirred: bool = False,
    learning_rate: float = 0.5,
    clip: float = 0.05,
) -> dict[str, Any]:
    """Logits, gradients after `finalize_model_grads`, gradient norm, and factors after optimiser steps."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import sharded

    with host_backend():
        pg, chunks, _ = adapted(case)
        if stirred:
            stir(chunks)
        if case.save is not None:
            dist_checkpointing.save(sharded(chunks, pg), case.save)
            dist.barrier()
        (chunk,) = chunks
        model = DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False),
            chunk,
            pg_collection=pg,
        )
        trained = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
        result: dict[str, Any] = {"losses": []}
        share = sequences // pg.dp.size()
        for step in range(steps):
            model.zero_grad_buffer()
            total = torch.zeros(())
            for number in range(pg.dp.rank() * share, (pg.dp.rank() + 1) * share):
                logits = logits_of(model, number)
                loss = cross_entropy(logits, batch(number)[1], pg) / share
                loss.backward()
                total = total + loss.detach()
            finalize_model_grads([model], pg_collection=pg)
            if step == 0:
                result["logits"] = whole(logits, pg)
                result["grads"] = shards(chunks, pg, lambda p: getattr(p, "main_grad", None))
            norm = gradient_norm(trained, pg)
            with torch.no_grad():  # clipping makes every factor's step depend on the norm over all ranks
                for parameter in trained:
                    parameter -= learning_rate * min(1.0, clip / norm) * parameter.main_grad
            dist.all_reduce(total, group=pg.dp)
            result["losses"].append(total.item() / pg.dp.size())
            result.setdefault("norm", norm)
        result["after"] = shards(chunks, pg, lambda p: p.data if p.requires_grad else None)
    return result


def gradient_norm(parameters, pg) -> float:
    """The norm over the whole model, with each element counted as mcore's optimizer counts it.

    Expert parameters (`allreduce` false) over the ranks of the experts' grid, others over the model-parallel
    ones (mcore 0.19.2, optimizer/optimizer.py, `get_main_grads_for_grad_norm`; its optimizer needs CUDA).
    """
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    total = 0.0
    for dense, group in ((True, pg.mp), (False, pg.tp_ep_pp)):
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in parameters:
            counted = param_is_not_tensor_parallel_duplicate(parameter, pg.tp, pg.expt_tp)
            if counted and getattr(parameter, "allreduce", True) == dense:
                squares += parameter.main_grad.double().square().sum()
        dist.all_reduce(squares, group=group)
        total += squares.item()
    return total**0.5


def cross_entropy(logits, labels, pg):
    """Mean loss of vocabulary-parallel logits."""
    import inspect

    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    options = {"tp_group": pg.tp} if "tp_group" in inspect.signature(vocab_parallel_cross_entropy).parameters else {}
    return vocab_parallel_cross_entropy(logits.float().contiguous(), labels, **options).mean()

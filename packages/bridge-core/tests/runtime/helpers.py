"""Real, tiny megatron-core models for tests, and jobs that run them on the ranks of a pool.

Job functions are top-level, take a `Case`, and return plain tensors and dicts.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

VOCAB_SIZE = 96
SEQUENCE = 16

DENSE = {
    "num_layers": 4,
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
}
MOE = DENSE | {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_router_load_balancing_type": "none",
    "moe_grouped_gemm": True,
}
MIXED = MOE | {"moe_layer_freq": [0, 1, 1, 0], "moe_shared_expert_intermediate_size": 32}
BIASED = DENSE | {"add_bias_linear": True, "add_qkv_bias": True, "normalization": "LayerNorm", "qk_layernorm": False}
BIASED_MOE = MOE | {"add_bias_linear": True}
LATENT = {name: value for name, value in DENSE.items() if name not in ("kv_channels", "num_query_groups")} | {
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "rope_type": "rope",
}


def make_config(kwargs: dict[str, Any], *, tp=1, pp=1, vpp=None, ep=1, etp=None, **unused: Any):
    """A `TransformerConfig` for a CPU and a layout; SwiGLU unless `activation_func` is given."""
    import torch
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from bridge_core.runtime.host import cpu_friendly

    layout = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": tp if etp is None else etp,
        "pipeline_dtype": torch.float32,
    }
    if vpp is not None:
        layout["virtual_pipeline_model_parallel_size"] = vpp
    fields = {"activation_func": torch.nn.functional.silu} | kwargs | layout
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    return kind(**fields | cpu_friendly(fields))


def build_gpt(
    config,
    *,
    spec: str,
    pg_collection,
    vocab_size: int = VOCAB_SIZE,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
):
    """A `GPTModel` stage with the "host" or mcore's "local" spec, in float32 on the CPU."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from bridge_core.runtime.host import host_block_spec, host_mtp_block_spec

    pp_rank = pg_collection.pp.rank()
    prediction = None
    if spec == "host":
        block = host_block_spec(config, pp_rank=pp_rank, vp_stage=vp_stage)
        if config.mtp_num_layers:
            prediction = host_mtp_block_spec(config, block, pp_rank=pp_rank, vp_stage=vp_stage)
    else:
        config.moe_grouped_gemm = False  # the local spec has no grouped experts
        block = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization=config.normalization,
            vp_stage=vp_stage,
            pp_rank=pp_rank,
        )
    return GPTModel(
        config,
        block,
        vocab_size=vocab_size,
        max_sequence_length=SEQUENCE,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=prediction,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


@dataclass(frozen=True)
class Case:
    """One job: a model, a layout, where its weights come from and go to."""

    kwargs: dict[str, Any]
    layout: dict[str, Any] = field(default_factory=dict)
    spec: str = "host"
    load: str | None = None
    save: str | None = None
    backward: bool = False
    mask: bool = False  # pass an explicit attention mask
    global_state: bool = False  # initialise parallel_state too, for what mcore builds from nothing else


def build_stages(case: Case, pg_collection) -> list[Any]:
    """The model chunks of this rank, one per virtual stage, with distinct values in every parameter."""
    import torch

    config = make_config(case.kwargs, **case.layout)
    stages = case.layout.get("vpp") or 1
    pp, rank = pg_collection.pp.size(), pg_collection.pp.rank()
    torch.manual_seed(1234)
    models = [
        build_gpt(
            config,
            spec=case.spec,
            pg_collection=pg_collection,
            pre_process=rank == 0 and stage == 0,
            post_process=rank == pp - 1 and stage == stages - 1,
            vp_stage=stage if stages > 1 else None,
        )
        for stage in range(stages)
    ]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases too: not ones and zeros
    return models


def run_gpt(case: Case):
    """Build, load, save, run forward (and backward): logits [1, S, V] on the last stage, and more, as a dict."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups

    with host_backend(), _global_state(case):
        pg = groups(**case.layout)
        models = build_stages(case, pg)
        if case.load is not None:
            states = dist_checkpointing.load(_sharded(models, pg), case.load)
            for index, model in enumerate(models):
                model.load_state_dict(states[f"model{index}"], strict=True)
        if case.save is not None:
            dist_checkpointing.save(_sharded(models, pg), case.save)
            dist.barrier()
        logits = _forward(models, pg, mask=case.mask)
        result = {
            "logits": None if logits is None else logits.detach(),
            "names": [name for model in models for name, _ in model.named_parameters()],
        }
        if case.backward:
            logits.square().mean().backward()
            result["squares"] = _gradient_squares(models[0], pg)
            result["without_gradient"] = [name for name, value in models[0].named_parameters() if value.grad is None]
        return result


@contextmanager
def _global_state(case: Case):
    """mcore's own groups for the time of a job, if the case asks for them."""
    from megatron.core import parallel_state

    if case.global_state:
        parallel_state.initialize_model_parallel(case.layout.get("tp", 1), case.layout.get("pp", 1))
    try:
        yield
    finally:
        if case.global_state:
            parallel_state.destroy_model_parallel()


# Transformer Engine's name -> mcore's local name, where they differ (megatron/core/models/gpt/gpt_layer_specs.py).
LOCAL_NAMES = (
    (r"self_attention\.linear_qkv\.layer_norm_", "input_layernorm."),
    (r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_", r"self_attention.\1_layernorm."),
    (r"mlp\.linear_fc1\.layer_norm_", "pre_mlp_layernorm."),
    (r"experts\.linear_(fc[12])\.(weight|bias)(\d+)$", r"experts.local_experts.\3.linear_\1.\2"),
)


def run_twins(case: Case):
    """The same weights in the host and in the local spec, on the same ranks: both logits."""
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups

    with host_backend():
        pg = groups(**case.layout)
        hosts = build_stages(case, pg)
        twins = build_stages(replace(case, spec="local"), pg)
        for host, twin in zip(hosts, twins, strict=True):
            parameters = dict(twin.named_parameters())
            with torch.no_grad():
                for name, value in host.named_parameters():
                    for pattern, local in LOCAL_NAMES:
                        name = re.sub(pattern, local, name)
                    parameters.pop(name).copy_(value)
            assert not parameters, f"the host model lacks {sorted(parameters)}"
        logits = [_forward(models, pg, mask=case.mask) for models in (hosts, twins)]
        return [None if value is None else value.detach() for value in logits]


def _sharded(models, pg):
    metadata = {"dp_cp_group": pg.dp_cp}
    return {f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(models)}


def _forward(models, pg, *, mask: bool):
    """The batch through all stages, by plain sends; logits where the last stage is."""
    import torch
    import torch.distributed as dist

    tokens = (torch.arange(SEQUENCE) * 7 % VOCAB_SIZE).view(1, SEQUENCE)
    positions = torch.arange(SEQUENCE).view(1, SEQUENCE)
    attention_mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().view(1, 1, SEQUENCE, SEQUENCE) if mask else None
    pp, rank = pg.pp.size(), pg.pp.rank()
    config = models[0].config
    share = SEQUENCE // config.tensor_model_parallel_size if config.sequence_parallel else SEQUENCE
    output = None
    for number, model in ((n, m) for n in range(pp * len(models)) for m in [models[n // pp]] if n % pp == rank):
        if number > 0:
            hidden = torch.empty(share, 1, config.hidden_size)
            dist.recv(hidden, dist.get_global_rank(pg.pp, (rank - 1) % pp), group=pg.pp)
            model.set_input_tensor(hidden)
        output = model(tokens, positions, attention_mask)
        if number < pp * len(models) - 1:
            dist.send(output.detach().contiguous(), dist.get_global_rank(pg.pp, (rank + 1) % pp), group=pg.pp)
            output = None
    return output


def _gradient_squares(model, pg) -> dict[str, float]:
    """Sum of squares of each tensor-parallel parameter's gradient, over all its shards."""
    import torch.distributed as dist

    squares = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and getattr(parameter, "tensor_model_parallel", False):
            total = parameter.grad.double().square().sum()
            dist.all_reduce(total, group=pg.expt_tp if ".experts." in name and "shared" not in name else pg.tp)
            squares[name] = total.item()
    return squares


def shard_table(case: Case) -> dict[str, tuple[Any, ...]]:
    """What the model would save: local name -> (kind, key, global shape, offset, replica id), factories built."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups

    with host_backend(), _global_state(case):
        pg = groups(**case.layout)
        (model,) = build_stages(case, pg)
        table = {}
        for name, entry in model.sharded_state_dict(metadata={"dp_cp_group": pg.dp_cp}).items():
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            for index, part in enumerate(parts if isinstance(parts, list) else [parts]):
                kind = "object" if isinstance(part, ShardedObject) else "tensor"
                offset = part.global_offset
                table[f"{name}#{index}"] = (kind, part.key, tuple(part.global_shape), tuple(offset), part.replica_id)
        return table


class GlobalStateReadError(AssertionError):
    """mcore read its global parallel state although it was given groups."""


@contextmanager
def poisoned_parallel_state(allowed: frozenset[str]):
    """Make every `parallel_state.get_*` raise, wherever it was imported to; those in `allowed` are only noted.

    Yields:
        The set of "reader module: function" that was called in spite of it.
    """
    from megatron.core import parallel_state

    reads: set[str] = set()
    own = {
        value: name
        for name, value in vars(parallel_state).items()
        if name.startswith("get_") and callable(value) and value.__module__ == parallel_state.__name__
    }

    def poison(function, name):
        def read(*args, **kwargs):
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].endswith(("process_groups_config", "helpers")):
                frame = frame.f_back
            reads.add(f"{frame.f_globals['__name__'].removeprefix('megatron.core.')}: {name}")
            if name not in allowed:
                raise GlobalStateReadError(f"{name} read by {frame.f_code.co_filename}:{frame.f_lineno}")
            return function(*args, **kwargs)

        return read

    poisoned = {function: poison(function, name) for function, name in own.items()}
    undo = []
    for module in [value for name, value in sys.modules.items() if name.startswith("megatron.core")]:
        for attribute, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in poisoned:
                undo.append((module, attribute, value))
                setattr(module, attribute, poisoned[value])
    try:
        yield reads
    finally:
        for module, attribute, value in undo:
            setattr(module, attribute, value)


def run_poisoned(case: Case, allowed: frozenset[str]) -> list[str]:
    """`run_gpt` with the global parallel state poisoned; which reads were noted."""
    import megatron.core.models.gpt
    import megatron.core.transformer.multi_latent_attention  # noqa: F401 - poison reaches imported modules only

    from bridge_core.runtime.host import host_backend

    with poisoned_parallel_state(allowed) as reads, host_backend():
        run_gpt(case)
    return sorted(reads)


@contextmanager
def small_bands():
    """Shards of these tiny models are cut among replicas as large ones are."""
    from bridge_core.runtime import shares

    before, shares.LEAST = shares.LEAST, 64
    try:
        yield
    finally:
        shares.LEAST = before


def errors_of(*calls) -> list[str]:
    """What each call says that is refused; "no error" of one that is not."""
    from bridge_core import BridgeError

    told = []
    for call in calls:
        try:
            call()
            told.append("no error")
        except BridgeError as error:
            told.append(str(error))
    return told


def stored(folder: Path) -> dict[str, tuple[str, int, int, tuple[int, ...]]]:
    """Of every tensor of a folder: its file, its first byte there, its bytes, and its shape, as the headers say."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                first, end = tensor["data_offsets"]
                found[name] = file.name, 8 + size + first, end - first, tuple(tensor["shape"])
    return found

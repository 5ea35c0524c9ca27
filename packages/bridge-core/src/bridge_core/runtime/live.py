"""A live Megatron model, seen as the plan sees it: its layout, this rank, and its tensors by canonical name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.keys import is_adapter
from bridge_core.checkpoint.matching import check_wanted
from bridge_core.codecs import Codec
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CoverageError, LayoutError, preview
from bridge_core.families import Family, Fields
from bridge_core.geometry import Shape
from bridge_core.plan import Plan, Shard
from bridge_core.plan.placement import OUTPUT
from bridge_core.runtime.tensors import default_device, dtype_name
from bridge_core.topology import ParallelLayout
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern, pipeline_of

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch import Tensor

# megatron-core's local specs (0.16.1 and 0.19.2, models/gpt/gpt_layer_specs.py, transformer/moe/experts.py)
# against the canonical names, which are those of Transformer Engine's specs.
_LOCAL_NAMES = (
    (re.compile(r"^(mtp\.layers\.\d+\.)mtp_model_layer\.(?!layers\.)"), r"\1transformer_layer."),
    (re.compile(r"\.mixer\.conv1d_(weight|bias)$"), r".mixer.conv1d.\1"),
    (re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$"), r".experts.\2.weight\1"),
)
# Where a norm is fused into the linear after it in one spec, and a module of its own in another.
_FUSED_NORMS = (
    (re.compile(r"\.pre_mlp_layernorm\."), ".mlp.linear_fc1.layer_norm_"),
    (re.compile(r"\.input_layernorm\."), ".self_attention.linear_qkv.layer_norm_"),
    (re.compile(r"\.input_layernorm\."), ".self_attention.in_proj.layer_norm_"),
    (re.compile(r"\.q_layernorm\."), ".linear_q_up_proj.layer_norm_"),
    (re.compile(r"\.kv_layernorm\."), ".linear_kv_up_proj.layer_norm_"),
)

_PIPELINE_OPTIONS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True)
class LiveModel:
    """This rank's part of a model, matched against a plan: every parameter has its shard.

    Attributes:
        plan: the plan of the model's layout.
        rank: this rank's number in the layout.
        shards: what this rank holds, in the plan's order.
        tensors: the parameter of each shard, by (chunk, parameter name of the plan).
        excepted: names of parameters that the caller has excepted from the match; no shard is theirs.
    """

    plan: Plan
    rank: int
    shards: tuple[Shard, ...]
    tensors: Mapping[tuple[int, str], Tensor]
    excepted: tuple[str, ...] = ()

    @property
    def device(self) -> Any:
        """Where the parameters are; where this process computes if it holds none."""
        first = next(iter(self.tensors.values()), None)
        return default_device() if first is None else first.device

    def tensor(self, shard: Shard) -> Tensor:
        """The live parameter of a shard."""
        return self.tensors[shard.chunk, shard.param]


def unwrap(model: Any) -> list[Any]:
    """The bare model chunks of a model or list of them, without `DDP`, `Float16Module` and other wrappers."""
    chunks = list(model) if isinstance(model, Sequence | list) or _is_module_list(model) else [model]
    bare = []
    for chunk in chunks:
        while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
            chunk = chunk.module
        bare.append(chunk)
    return bare


def _is_module_list(model: Any) -> bool:
    import torch

    return isinstance(model, torch.nn.ModuleList)


def open_live(
    model: Any,
    family: Family,
    fields: Fields,
    *,
    groups: ProcessGroupCollection | None = None,
    excepted: Collection[str] = (),
    inventory: Mapping[str, Shape] | None = None,
    ignore: Sequence[str] = (),
    codec: Codec | None = None,
    quantised: Collection[str] | None = None,
) -> LiveModel:
    """Match a live model against the plan of its layout, before any byte is copied.

    Adapters on its layers (`<layer>.adapter.<...>`) are left alone: what is matched is the base model.

    Args:
        model: a `GPTModel` or `HybridModel`, or the list of its chunks under virtual pipelining, wrapped or not.
        family, fields: of the HF model.
        groups: the model's process groups; by default those it was built with (`model.pg_collection`).
        excepted: patterns (as in a shell) of parameter names that need not match: a changed head.
        inventory, ignore, codec, quantised: as for a `Plan`.

    Raises:
        CoverageError: the model has other parameters, or of other shapes, than the plan; names the first
            on either side. Parameters on the meta device have no memory to copy into, and are refused.
        LayoutError: the groups do not form the grids of a layout.
    """
    chunks = unwrap(model)
    layout, rank = layout_of(chunks, chunks[0].pg_collection if groups is None else groups)
    named = {(number, name): tensor for number, chunk in enumerate(chunks) for name, tensor in stored(chunk)}
    left = {key for key in named if matches(key[1], excepted)}
    named = {key: tensor for key, tensor in named.items() if key not in left}
    padded = padded_vocab(chunks[0], named, layout.tp, fields["vocab_size"])
    plan = Plan(
        family,
        fields,
        layout,
        padded_vocab=padded,
        inventory=inventory,
        ignore=ignore,
        codec=codec,
        quantised=quantised,
    )
    live = matched(plan, rank, named, excepted)
    return replace(live, excepted=tuple(name for _, name in sorted(left)))


def matched(
    plan: Plan, rank: int, named: Mapping[tuple[int, str], Tensor], excepted: Collection[str] = ()
) -> LiveModel:
    """The live tensors of a rank, each with its shard of a plan.

    Args:
        plan: of the layout that the tensors are in.
        rank: the number of this rank in it.
        named: the rank's tensors by chunk, and by name in the chunk.
        excepted: patterns (as in a shell) of parameter names of the plan that no tensor is needed for.

    Raises:
        CoverageError: as for `open_live`.
    """
    shards = tuple(shard for shard in plan.local_shards(rank) if not matches(shard.param, excepted))
    wanted = {(shard.chunk, shard.param): shard for shard in shards}
    tensors = {(number, _canonical(name, number, wanted)): tensor for (number, name), tensor in named.items()}
    _check(wanted, tensors, rank)
    return LiveModel(plan, rank, shards, tensors)


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a name fits one of the patterns, which are those of a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# Persistent buffers that are weights (megatron-core 0.19, transformer/moe/router.py, `TopKRouter.__init__`).
_WEIGHT_BUFFERS = (".router.expert_bias",)


def stored(chunk: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a chunk, without those of adapters on it, and the buffers that are weights as well."""
    # A tied output layer beside prediction layers: megatron-core 0.19 makes a weight for it that it never uses, as the
    # embedding is there too (models/common/language_module/language_module.py, `shared_embedding_or_output_weight`).
    unused = getattr(chunk, "mtp_process", False) and chunk.share_embeddings_and_output_weights
    for name, parameter in chunk.named_parameters():
        if not (is_adapter(name) or (unused and name == OUTPUT)):
            yield name, parameter
    for name, buffer in chunk.named_buffers():
        if name.endswith(_WEIGHT_BUFFERS):
            yield name, buffer


def agreed_dtypes(live: LiveModel, wanted: str | None, group: Any) -> dict[str, str]:
    """The dtype of every HF tensor made from a live model, by name. Collective over `group`.

    Tensors whose dtype is not the model's (`Entry.dtype`) keep the one their parameter has; all others get
    `wanted`, or the dtype that all their parameters share.

    Raises:
        CoverageError: on every rank, if parameters differ in dtype and none is wanted. Nothing is cast unasked.
    """
    import torch.distributed as dist

    mine: dict[str, list[str]] = {}
    for shard in live.shards:
        found = mine.setdefault(shard.entry, [])
        if (name := dtype_name(live.tensor(shard))) not in found:
            found.append(name)
    held: list[Any] = [None] * group.size()
    dist.all_gather_object(held, mine, group=group)
    by_entry: dict[str, set[str]] = {}
    for said in held:
        for entry, names in said.items():
            by_entry.setdefault(entry, set()).update(names)
    check_wanted(wanted)
    main = dtype_of(wanted).name if wanted else None
    entries = live.plan.entries
    if main is None:
        main = _one(
            set().union(*(by_entry.get(e.name, set()) for e in entries if e.dtype is None)), "the parameters", held
        )
    dtypes: dict[str, str] = {}
    for entry in entries:
        dtype = main if entry.dtype is None else _one(by_entry[entry.name], entry.name, held)
        dtypes |= {name: dtype for name, _ in entry.hf_names()}
    return dtypes | {name: dtypes[copy.of] for name, copy in live.plan.copies.items()}


def _one(found: set[str], what: str, held: list[dict[str, list[str]]]) -> str:
    if len(found) == 1:
        return next(iter(found))
    said = (sorted({name for names in by_entry.values() for name in names}) for by_entry in held)
    raise CoverageError(
        f"{what} differ in dtype",
        expected="one dtype on all ranks, or `dtype` to say which to write",
        got="; ".join(f"rank {rank}: {', '.join(names) or 'none'}" for rank, names in enumerate(said)),
        fix="pass dtype=..., or give the parameters one dtype where that has no effect",
    )


def replica_of(live: LiveModel, shard: Shard) -> int:
    """How many copies of a shard other ranks hold that come before this rank's; 0 for the first.

    A later stage's copy of the embedding comes after all those of the first stage.
    """
    number, copies = live.plan.copy_of(live.rank, shard)
    return number + (copies if live.plan.is_second_copy(live.rank, shard) else 0)


def layout_of(chunks: Sequence[Any], groups: ProcessGroupCollection) -> tuple[ParallelLayout, int]:
    """The layout that a model's process groups form, and this rank's number in it.

    A hybrid model's pattern may name its pipeline; the options that count embedding and loss as layers, and the
    layout string, mean nothing to it (0.19.2, models/hybrid/hybrid_layer_allocation.py, `select_pipeline_segment`).
    """
    config = chunks[0].config
    pattern = getattr(chunks[0], "hybrid_layer_pattern", None)
    options: dict[str, Any] = {name: getattr(config, name, None) or None for name in _PIPELINE_OPTIONS[:2]}
    if pattern:
        string = pipeline_of(parse_hybrid_pattern(pattern))
    else:
        string = getattr(config, "pipeline_model_parallel_layout", None)
        options |= {name: bool(getattr(config, name, False)) for name in _PIPELINE_OPTIONS[2:]}
    layout = ParallelLayout(
        tp=groups.tp.size(),
        pp=groups.pp.size(),
        vpp=len(chunks),
        cp=groups.cp.size(),
        dp=groups.dp.size(),
        ep=groups.ep.size(),
        etp=groups.expt_tp.size(),
        pipeline_model_parallel_layout=getattr(string, "input_data", string),
        **options,
    )
    rank = layout.rank_of(tp=groups.tp.rank(), cp=groups.cp.rank(), dp=groups.dp.rank(), pp=groups.pp.rank())
    coords = layout.coords(rank)
    found = (groups.expt_tp.rank(), groups.ep.rank())
    if (coords.etp, coords.ep) != found:
        raise LayoutError(
            "the expert groups are ordered otherwise than the dense ones",
            where=f"rank {rank} of {layout}",
            expected=f"etp, ep = {(coords.etp, coords.ep)}",
            got=found,
            fix="make all groups in megatron-core's order tp-cp-ep-dp-pp",
        )
    return layout, rank


def padded_vocab(model: Any, named: Mapping[tuple[int, str], Tensor], tp: int, vocab_size: int) -> int | None:
    """Rows of the whole embedding: of this rank's part of it or of the output layer, or as the model was told.

    A rank that has neither has to know as well: it may write what those that have them hold. A table with fewer rows
    than tokens is no vocabulary; its shape is refused later, by its name.

    Args:
        model: a bare chunk. megatron-core's models keep the rows that they were built with (`vocab_size`).
        named: the rank's tensors.
        tp: tensor-parallel size.
        vocab_size: tokens.
    """
    rows = getattr(model, "vocab_size", None)
    for (_, name), tensor in named.items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows = tensor.shape[0] * tp
            break
    return rows if rows is not None and rows >= vocab_size else None


def _canonical(name: str, chunk: int, wanted: Mapping[tuple[int, str], Shard]) -> str:
    for pattern, replacement in _LOCAL_NAMES:
        name = pattern.sub(replacement, name)
    if (chunk, name) not in wanted:
        for pattern, fused in _FUSED_NORMS:
            if (chunk, other := pattern.sub(fused, name)) in wanted:
                return other
    return name


def _check(wanted: Mapping[tuple[int, str], Shard], tensors: Mapping[tuple[int, str], Tensor], rank: int) -> None:
    missing = [f"{name} (chunk {chunk})" for chunk, name in wanted if (chunk, name) not in tensors]
    extra = [f"{name} (chunk {chunk})" for chunk, name in tensors if (chunk, name) not in wanted]
    if missing or extra:
        raise CoverageError(
            "the live model does not hold the parameters that the configuration says",
            where=f"rank {rank}: {preview([*missing, *extra])}",
            expected=f"{len(wanted)} parameters; the model lacks {len(missing)}: {preview(missing) or 'none'}",
            got=f"{len(tensors)} parameters; the plan lacks {len(extra)}: {preview(extra) or 'none'}",
            fix="build the model from the same configuration (AutoBridge.to_megatron_provider)",
        )
    for key, shard in wanted.items():
        if tensors[key].is_meta:
            raise CoverageError(
                "a parameter is on the meta device and has no memory",
                where=f"rank {rank}: {shard.param}",
                expected="a parameter on a CPU or GPU",
                fix="materialise the model first, for example with model.to_empty(device=...)",
            )
        if tuple(tensors[key].shape) != tuple(shard.shape):
            raise CoverageError(
                "a parameter of the live model has another shape than the configuration says",
                where=f"rank {rank}: {shard.param}",
                expected=shard.shape,
                got=tuple(tensors[key].shape),
                fix="build the model from the same configuration, at the same parallel sizes",
            )

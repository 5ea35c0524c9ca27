"""A live Megatron model, seen as the plan sees it: its layout, this rank, and its tensors by canonical name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from bridge_core.codecs import Codec
from bridge_core.errors import ConfigError, CoverageError, LayoutError, preview
from bridge_core.families import Family, Fields
from bridge_core.families.meaning import check_meaning
from bridge_core.geometry import Shape
from bridge_core.plan import Plan, Shard
from bridge_core.runtime.homes import Home, gather_late, stored, unwrap
from bridge_core.runtime.tensors import default_device
from bridge_core.topology import ParallelLayout
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern, pipeline_of

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch import Tensor

PlanT = TypeVar("PlanT", bound=Plan)

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
        homes: where the parameter of each shard is, by (chunk, parameter name of the plan).
        excepted: names of parameters that the caller has excepted from the match; no shard is theirs.
        renew: makes the parameters current, for who is about to read them. Collective over data-parallel groups.
        place: the device on which all ranks keep their parameters, once they have agreed (`agreement.agreed_device`).
    """

    plan: Plan
    rank: int
    shards: tuple[Shard, ...]
    homes: Mapping[tuple[int, str], Home]
    excepted: tuple[str, ...] = ()
    renew: Callable[[], None] = lambda: None
    place: Any = None

    @property
    def tensors(self) -> dict[tuple[int, str], Tensor]:
        """The parameter of each shard as it is now, by (chunk, parameter name of the plan)."""
        return {key: home.tensor for key, home in self.homes.items()}

    @property
    def device(self) -> Any:
        """Where the parameters are; where this process computes if it holds none."""
        if self.place is not None:
            return self.place
        first = next(iter(self.homes.values()), None)
        return default_device() if first is None else first.tensor.device

    def tensor(self, shard: Shard) -> Tensor:
        """The live parameter of a shard, which still has to be plain memory of its shape.

        Raises:
            CoverageError: it was replaced by one that is not.
        """
        found = self.homes[shard.chunk, shard.param].tensor
        _check_memory(found, shard, self.rank)
        return found


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
    known: dict[Any, Plan] | None = None,
) -> LiveModel:
    """Match a live model against the plan of its layout, before any byte is copied.

    Adapters on its layers (`<layer>.adapter.<...>`) are left alone: what is matched is the base model.

    Args:
        model: a `GPTModel` or `HybridModel`, or the list of its chunks under virtual pipelining, wrapped or not.
        family, fields: of the HF model.
        groups: the model's process groups; by default those it was built with (`model.pg_collection`).
        excepted: patterns (as in a shell) of parameter names that need not match: a changed head.
        inventory, ignore, codec, quantised: as for a `Plan`.
        known: plans made before of the same family and options, by layout; the plan is taken from there, or put there.

    Raises:
        CoverageError: the model has other parameters, or of other shapes, than the plan; names the first
            on either side. Parameters that are no plain memory (on the meta device, quantised or distributed
            tensors, with gaps) cannot be copied into, and are refused.
        ConfigError: the model was built with settings under which the same shapes mean other weights; or it is no
            model of megatron-core, or does not know its groups.
        LayoutError: the groups do not form the grids of a layout.
    """
    chunks = unwrap(model)
    layout, rank = layout_of(chunks, _groups_of(chunks, groups))
    named = {(number, name): home for number, chunk in enumerate(chunks) for name, home in stored(chunk)}
    left = {key for key in named if matches(key[1], excepted)}
    named = {key: home for key, home in named.items() if key not in left}
    padded = padded_vocab(chunks[0], named, layout.tp, fields["vocab_size"])

    def make() -> Plan:
        options: dict[str, Any] = {"inventory": inventory, "ignore": ignore, "codec": codec, "quantised": quantised}
        return Plan(family, fields, layout, padded_vocab=padded, **options)

    plan = remembered(known, (layout, padded), fields, make)
    live = matched(plan, rank, named, excepted)
    check_settings(chunks[0].config, fields, f"rank {rank}")
    excepted = tuple(name for _, name in sorted(left))
    return replace(live, excepted=excepted, renew=partial(gather_late, model))


def _groups_of(chunks: Sequence[Any], groups: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """The process groups given, or those that the model was built with."""
    if not chunks or not all(hasattr(chunk, "decoder") for chunk in chunks):
        raise ConfigError(
            "this is no model of megatron-core",
            where="model",
            expected="a GPTModel or HybridModel, or the list of its chunks, wrapped or not",
            got=", ".join(type(chunk).__name__ for chunk in chunks[:4]) or "an empty list",
            fix="pass what provide_distributed_model gave",
        )
    found = groups if groups is not None else getattr(chunks[0], "pg_collection", None)
    if found is None:
        raise ConfigError(
            "the model does not know its process groups",
            where=type(chunks[0]).__name__,
            expected="a model that was built with pg_collection, or `groups`",
            got="neither",
            fix="pass groups=..., the ProcessGroupCollection of the model",
        )
    return found


def remembered(known: dict[Any, PlanT] | None, key: Hashable, fields: Fields, make: Callable[[], PlanT]) -> PlanT:
    """A plan made before under this key, of a model of the same fields; otherwise a new one, which is put there.

    Args:
        known: plans by key; None keeps nothing.
        key: all that a plan depends on, but for the fields and what all of `known` share.
        fields: Megatron fields of the model.
        make: makes the plan.
    """
    found = None if known is None else known.get(key)
    if found is None or found.fields != fields:
        found = make()
    if known is not None:
        known[key] = found
    return found


def matched(plan: Plan, rank: int, named: Mapping[tuple[int, str], Home], excepted: Collection[str] = ()) -> LiveModel:
    """The live tensors of a rank, each with its shard of a plan.

    Args:
        plan: of the layout that the tensors are in.
        rank: the number of this rank in it.
        named: where the rank's tensors are, by chunk, and by name in the chunk.
        excepted: patterns (as in a shell) of parameter names of the plan that no tensor is needed for.

    Raises:
        CoverageError: as for `open_live`.
    """
    shards = tuple(shard for shard in plan.local_shards(rank) if not matches(shard.param, excepted))
    wanted = {(shard.chunk, shard.param): shard for shard in shards}
    homes = {(number, _canonical(name, number, wanted)): home for (number, name), home in named.items()}
    live = LiveModel(plan, rank, shards, homes)
    _check(wanted, live.tensors, rank)
    return live


def check_settings(config: Any, fields: Fields, where: str) -> None:
    """Raise unless a model was built with settings under which its weights mean what the fields say.

    Args:
        config: the `TransformerConfig` that it was built with.
        fields: Megatron fields of the HF model.
        where: what the error says of the place.

    Raises:
        ConfigError: names the settings that differ.
    """
    check_meaning(
        fields,
        vars(config),
        what="the live model was built with other settings than the configuration says",
        where=where,
        fix="leave these settings of the provider as they are, or make the bridge from this model's config.json",
    )


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a name fits one of the patterns, which are those of a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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


def padded_vocab(model: Any, named: Mapping[tuple[int, str], Home], tp: int, vocab_size: int) -> int | None:
    """Rows of the whole embedding: of this rank's part of it or of the output layer, or as the model was told.

    A rank that has neither has to know as well: it may write what those that have them hold. A table with fewer rows
    than tokens is no vocabulary; its shape is refused later, by its name.

    Args:
        model: a bare chunk. megatron-core's models keep the rows that they were built with (`vocab_size`).
        named: where the rank's tensors are.
        tp: tensor-parallel size.
        vocab_size: tokens.
    """
    rows = getattr(model, "vocab_size", None)
    for (_, name), home in named.items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows = home.tensor.shape[0] * tp
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
        _check_memory(tensors[key], shard, rank)


def _check_memory(tensor: Tensor, shard: Shard, rank: int) -> None:
    """Raise unless a tensor is plain memory of a shard's shape."""
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_contiguous()
    if plain and not tensor.is_meta and tensor.shape == shard.shape:
        return
    where = f"rank {rank}: {shard.param}"
    if tensor.is_meta:
        raise CoverageError(
            "a parameter is on the meta device and has no memory",
            where=where,
            expected="a parameter on a CPU or GPU",
            got="meta",
            fix="materialise the model first, for example with model.to_empty(device=...)",
        )
    if not plain:
        raise CoverageError(
            "a parameter of the live model is no plain memory",
            where=where,
            expected="a contiguous torch.Tensor or Parameter",
            got=f"a {type(tensor).__name__} of strides {tuple(tensor.stride())}",
            fix="build the model without fp8 or 4-bit parameters (`fp8_param`), and not of distributed tensors",
        )
    raise CoverageError(
        "a parameter of the live model has another shape than the configuration says",
        where=where,
        expected=shard.shape,
        got=tuple(tensor.shape),
        fix="build the model from the same configuration, at the same parallel sizes",
    )

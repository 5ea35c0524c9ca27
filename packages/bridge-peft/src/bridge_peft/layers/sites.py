"""The linear layers of a live model that can carry an adapter, told by their classes' names.

A class is recognised by the first class among its ancestors that stands in `_KINDS`. So nothing needs to be
imported to recognise Transformer Engine's layers, and ModelOpt's quantised layers, which are subclasses
made at run time, are what they were before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError
from bridge_peft.placement import Linear, Mode, check_cut, fused_parts

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

# Class -> (mode, one parameter per expert). Sources: megatron/core/tensor_parallel/layers.py and
# megatron/core/extensions/transformer_engine.py, 0.16.1 and 0.19.2; bridge_core/runtime/host/linears.py.
_KINDS: dict[str, tuple[Mode, bool]] = {
    "ColumnParallelLinear": ("column", False),
    "RowParallelLinear": ("row", False),
    "TEColumnParallelLinear": ("column", False),
    "TELayerNormColumnParallelLinear": ("column", False),
    "TERowParallelLinear": ("row", False),
    "TEColumnParallelGroupedLinear": ("column", True),
    "TERowParallelGroupedLinear": ("row", True),
    "TELinear": ("replicated", False),
    "HostColumnParallelGroupedLinear": ("column", True),
    "HostRowParallelGroupedLinear": ("row", True),
    "HostDuplicatedLinear": ("replicated", False),
}
_EXPERT = re.compile(r"(?:^|\.)experts\.(?:local_experts\.(\d+)\.)?linear_fc[12]$")
# megatron-core 0.19 calls the layer inside of a prediction layer otherwise than its checkpoints, and 0.16.1, do.
_PREDICTION = re.compile(r"^(mtp\.layers\.\d+\.)mtp_model_layer\.(?!layers\.)")
_LOCAL_EXPERT = re.compile(r"(\.experts)\.local_experts\.\d+(?=\.)")


@dataclass(frozen=True)
class Site:
    """A linear layer of a live model, and this rank's share of it.

    Attributes:
        name: in the whole model: layers have their global number, experts of a layer have one name together.
        path: in this rank's model chunk.
        module: the layer itself.
        linear: the whole layer.
        grouped: whether the weights of several experts are parameters `weight0`, `weight1`, ... of one module.
        first_expert, local_experts: which experts this module holds; 0, 0 if it is not an expert layer.
        group: ranks among which W is cut: tensor-parallel, or expert-tensor-parallel ones.
        communicates: whether the layer itself gathers its input and reduces its output over `group`.
        sequence_parallel: whether activations outside of the layer are cut along the sequence.
        own_data_parallel: whether the gradients of its weight are reduced over the experts' data-parallel
            group instead of the model's.
        groups: all groups of the model.
    """

    name: str
    path: str
    module: nn.Module
    linear: Linear
    grouped: bool
    first_expert: int
    local_experts: int
    group: ProcessGroup
    communicates: bool
    sequence_parallel: bool
    own_data_parallel: bool
    groups: Any

    @property
    def rank(self) -> int:
        """This rank's place in `group`."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """Ranks of `group`."""
        return self.group.size()

    @property
    def normed(self) -> bool:
        """Whether the layer normalises its input itself."""
        return getattr(self.module, "layer_norm_weight", None) is not None

    @property
    def stacked(self) -> int | None:
        """How many experts' factors a module stacks; None where factors are matrices."""
        return self.local_experts if self.grouped else None

    def weight_names(self) -> list[str]:
        """Names of the weights in the module, one for each of its experts, or the one of a plain layer."""
        if not self.grouped:
            return ["weight"]
        return [f"weight{index}" for index in range(self.local_experts)]

    def weights(self) -> list[Tensor]:
        """The weights [out, in] of this rank, one for each expert of the module, or the one of a plain layer.

        Raises:
            ConfigError: the layer has none, because it is given another's when it is called (tied embeddings),
                or because all its experts' are one parameter.
        """
        found = [self.module._parameters.get(name) for name in self.weight_names()]
        if any(weight is None for weight in found):
            raise ConfigError(
                "a layer has no weight of its own",
                where=self.name,
                expected=f"parameters {', '.join(self.weight_names()[:2])}",
                got="another layer's, given to it when it is called; or one parameter for all its experts",
                fix="untie the embeddings, or do without merging, DoRA and decompositions for this layer",
            )
        return [weight for weight in found if weight is not None]


def sites(chunk: nn.Module, groups: Any) -> Iterator[Site]:
    """Every linear layer of a model chunk that can carry an adapter, in the order of its modules.

    Args:
        chunk: a bare `GPTModel` or the like; its layers know their global number (`layer_number`).
        groups: `tp`, `ep`, `expt_tp` of mcore's `ProcessGroupCollection` are used.
    """
    numbers = _layer_numbers(chunk)
    containers = {path: module for path, module in chunk.named_modules() if hasattr(module, "num_local_experts")}
    for path, module in chunk.named_modules():
        kind = _kind(module)
        if kind is None or ".adapter." in path:
            continue
        name = _global_name(path, numbers)
        mode, grouped = kind
        expert = _EXPERT.search(path)
        local = first = count = 0
        if expert:
            container = containers.get(path.rpartition(".local_experts.")[0] or path.rpartition(".")[0])
            count = int(getattr(container, "num_local_experts", 0) or getattr(module, "num_gemms", 0))
            first = groups.ep.rank() * count + int(expert[1] or 0)
            local = count if grouped else 1
        yield _site(name, path, module, mode, grouped, first, local, count, groups)


def _site(
    name: str, path: str, module: Any, mode: Mode, grouped: bool, first: int, local: int, count: int, groups: Any
) -> Site:
    config = module.config if hasattr(module, "config") else None
    group = groups.expt_tp if count else groups.tp
    size = 1 if mode == "replicated" else group.size()
    weight = _stored_weight(module, grouped)
    if weight is None:  # the output layer of tied embeddings
        out_local, in_local = module.output_size_per_partition, module.input_size
    else:
        out_local, in_local = weight
    leaf = path.rpartition(".")[2]
    gated = bool(getattr(config, "gated_linear_unit", False))
    out = out_local * (size if mode == "column" else 1)
    linear = Linear(
        mode,
        in_local * (size if mode == "row" else 1),
        out,
        experts=count * groups.ep.size(),
        blocks=2 if leaf == "linear_fc1" and gated else 1,
        parts=fused_parts(
            leaf,
            out,
            gated=gated,
            query_groups=getattr(config, "num_query_groups", None) or getattr(config, "num_attention_heads", None),
            heads=getattr(config, "num_attention_heads", None),
            head_size=getattr(config, "kv_channels", None),
        ),
    )
    check_cut(name, linear, size)
    return Site(
        name,
        path,
        module,
        linear,
        grouped,
        first,
        local,
        group,
        communicates=not count and _communicates(module),
        sequence_parallel=bool(getattr(config, "sequence_parallel", False)) and groups.tp.size() > 1,
        own_data_parallel=bool(count) and (groups.ep.size() > 1 or groups.expt_tp.size() != groups.tp.size()),
        groups=groups,
    )


def _kind(module: nn.Module) -> tuple[Mode, bool] | None:
    """The kind of a layer; unlike mere containers it has a weight or is a layer without one of its own."""
    return next((_KINDS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _KINDS), None)


def _communicates(module: Any) -> bool:
    """Whether a dense layer gathers and reduces by itself.

    Where shared experts overlap with the dispatcher, mcore takes the communication out of the layer by
    these attributes (transformer/moe/shared_experts.py, 0.16.1 and 0.19.2).
    """
    if hasattr(module, "parallel_mode"):
        return module.parallel_mode is not None
    return not getattr(module, "explicit_expert_comm", False)


def _stored_weight(module: Any, grouped: bool) -> tuple[int, int] | None:
    """Shape [out, in] of this rank's weight, as the layer declares it: a packed weight has another one."""
    for out, within in (("output_size_per_partition", "input_size"), ("output_size", "input_size_per_partition")):
        if hasattr(module, out) and hasattr(module, within):
            return getattr(module, out), getattr(module, within)
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return module.out_features, module.in_features
    weight = module._parameters.get("weight0" if grouped else "weight")
    return None if weight is None else (weight.shape[-2], weight.shape[-1])


def _layer_numbers(chunk: nn.Module) -> dict[str, int]:
    """Path of every layer of the chunk -> its number in the whole model, counted from 0."""
    return {
        path: int(getattr(module, "layer_number")) - 1  # noqa: B009 - an attribute of some modules alone
        for path, module in chunk.named_modules()
        if hasattr(module, "layer_number") and re.search(r"(^|\.)layers\.\d+$", path)
    }


def _global_name(path: str, numbers: dict[str, int]) -> str:
    name = path
    for layer, number in numbers.items():
        if path.startswith(f"{layer}."):
            name = f"{layer.rpartition('.')[0]}.{number}{path[len(layer) :]}"
    return _PREDICTION.sub(r"\1transformer_layer.", _LOCAL_EXPERT.sub(r"\1", name))

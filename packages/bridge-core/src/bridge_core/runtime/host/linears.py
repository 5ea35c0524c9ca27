"""CPU modules with the parameter layout of mcore's Transformer Engine modules.

| here | stands for | parameters |
|---|---|---|
| `HostNorm` | `TENorm` | `weight` [D]; `bias` [D] for LayerNorm |
| `HostLayerNormColumnParallelLinear` | `TELayerNormColumnParallelLinear` | `layer_norm_weight` ..., and as below |
| mcore's `ColumnParallelLinear` | `TEColumnParallelLinear` | `weight` [out / tp, in], `bias` [out / tp] |
| mcore's `RowParallelLinear` | `TERowParallelLinear` | `weight` [out, in / tp], `bias` [out] |
| `HostDuplicatedLinear` | `TELinear` ("duplicated") | `weight` [out, in], `bias` [out] |
| `HostColumnParallelGroupedLinear` | `TEColumnParallelGroupedLinear` | `weight{i}` [out / etp, in], `bias{i}` |
| `HostRowParallelGroupedLinear` | `TERowParallelGroupedLinear` | `weight{i}` [out, in / etp], `bias{i}` |

Source of names, shapes and sharded state: megatron/core/extensions/transformer_engine.py, 0.16.1 and
0.19.2. Each module also has the `_extra_state` entry that its Transformer Engine counterpart has (empty
here), because mcore's strict load asks for the same objects that the model would save. The attention core
has none there (`TEDotProductAttention.sharded_state_dict`), and none here.

Imported only by `specs` and by the active host backend: it subclasses mcore's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (  # noqa: TID253 - base classes; this module is imported lazily
    ColumnParallelLinear,
    _initialize_affine_weight_cpu,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: TID253 - as above
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: TID253 - as above
from megatron.core.transformer.multi_latent_attention import MLASelfAttention  # noqa: TID253 - as above
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: TID253 - as above
from megatron.core.utils import divide, get_pg_rank, get_pg_size  # noqa: TID253 - as above
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812 - its usual name

Offsets = tuple[tuple[int, int, int], ...]
InitMethod = Callable[[torch.Tensor], Any]


class _EmptyExtraState(torch.nn.Module):
    """A module whose state dict has an empty `_extra_state`, and that loads with any or without one."""

    def __init__(self) -> None:
        super().__init__()
        # A plain state dict (a checkpoint of another backend) may lack the entry; strict load must not mind.
        self.register_load_state_dict_pre_hook(_default_extra_state)

    def get_extra_state(self) -> None:
        """Nothing: there is no FP8 state on a CPU."""

    def set_extra_state(self, state: object) -> None:
        """Ignored: there is no FP8 state on a CPU."""


def _default_extra_state(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object) -> None:
    state_dict.setdefault(f"{prefix}_extra_state")


def _norm_parameters(config: Any, size: int) -> tuple[Parameter, Parameter | None]:
    """Gain and bias of a norm at their neutral values; their gradients are summed over TP when needed."""
    neutral = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    device = _device(config)
    weight = Parameter(neutral(size, dtype=config.params_dtype, device=device))
    bias = None
    if config.normalization == "LayerNorm":
        bias = Parameter(torch.zeros(size, dtype=config.params_dtype, device=device))
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight, bias


def _normalize(
    config: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """LayerNorm or RMSNorm over the last dimension; computed in float32, returned in the dtype of `x`."""
    gain = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    if config.normalization == "LayerNorm":
        return F.layer_norm(x.float(), gain.shape, gain, None if bias is None else bias.float(), eps).to(x.dtype)
    return F.rms_norm(x.float(), gain.shape, gain, eps).to(x.dtype)


def _device(config: Any) -> Any:
    return torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()


class HostNorm(_EmptyExtraState):
    """LayerNorm or RMSNorm, as `config.normalization` says; unlike mcore's torch norm also with sequence parallelism.

    Args:
        config: mcore's `TransformerConfig`.
        hidden_size: size of the last dimension of the input.
        eps: added to the variance.
        ignored: what other norms of mcore take and this one does not need.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **ignored: object) -> None:
        super().__init__()
        self.config = config
        self.eps = eps
        self.weight, bias = _norm_parameters(config, hidden_size)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., D]; same shape and dtype."""
        return _normalize(self.config, x, self.weight, self.bias, self.eps)


class HostLayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm and a column-parallel linear in one module; arguments are mcore's `ColumnParallelLinear`'s."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, bias = _norm_parameters(config, input_size)
        self.register_parameter("layer_norm_bias", bias)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, in] -> ([S, B, out / tp], bias or None); S is the rank's share under sequence parallelism."""
        normed = _normalize(self.config, x, self.layer_norm_weight, self.layer_norm_bias, self.config.layernorm_epsilon)
        return super().forward(normed, *args, **kwargs)


class HostDuplicatedLinear(_EmptyExtraState):
    """A linear that every TP rank holds whole; `TELinear(parallel_mode="duplicated")` of latent attention and experts.

    mcore gives it no TP group. Without one all TP ranks would claim to be the one that saves it, so
    `HostMLASelfAttention` and `HostMoELayer` set `tp_group` afterwards.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.tp_group: ProcessGroup | None = None
        self.skip_bias_add = skip_bias_add
        self.weight = Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=_device(config)))
        if config.perform_initialization:
            init_method(self.weight)
        self.register_parameter("bias", None)
        if bias:
            self.bias = Parameter(torch.zeros(output_size, dtype=config.params_dtype, device=_device(config)))
        for parameter in self.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[..., in] -> ([..., out], bias when it is left to the caller)."""
        bias = None if self.skip_bias_add else self.bias
        return F.linear(x, self.weight, bias), self.bias if self.skip_bias_add else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Replicated over TP and DP."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

    def backward_dw(self) -> None:
        """Nothing: weight gradients are not delayed."""


class HostMLASelfAttention(MLASelfAttention):
    """Latent attention that tells its duplicated linears their TP group."""

    def __init__(self, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        for module in self.children():
            if isinstance(module, HostDuplicatedLinear) and pg_collection is not None:
                module.tp_group = pg_collection.tp


class HostMoELayer(MoELayer):
    """Experts that tell their projections to latent features, which are duplicated linears, their TP group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.children():
            if isinstance(module, HostDuplicatedLinear):
                module.tp_group = self.tp_group


class HostDotProductAttention(DotProductAttention):
    """mcore's attention, also for values narrower than keys (`v_channels`), as latent attention needs."""

    def __init__(
        self, config: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        if v_channels is not None:
            heads = divide(config.num_attention_heads, get_pg_size(self.tp_group))
            self.hidden_size_per_partition = heads * v_channels


class _HostGroupedLinear(_EmptyExtraState):
    """One linear per local expert, as parameters `weight{i}` and `bias{i}` of one module.

    Communication between expert-TP and EP ranks is the token dispatcher's, not this module's.

    Args:
        num_gemms: experts on this rank.
        input_size, output_size: of the whole expert, before expert tensor parallelism.
        config: mcore's `TransformerConfig`.
        init_method: fills a weight in place.
        bias: one bias per expert.
        skip_bias_add: return the biases as a list and leave adding them to the caller.
        pg_collection: mcore's collection; `expt_tp`, `ep` and `expt_dp` are used.
        ignored: what the Transformer Engine class takes and this one does not need.
    """

    split_dim: int  # dimension of `weight{i}` that expert tensor parallelism cuts
    mode: str  # mcore's word for it

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        pg_collection: Any,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_gemms = num_gemms
        self.use_bias = bias
        self.skip_bias_add = skip_bias_add
        self.groups = pg_collection
        etp = get_pg_size(pg_collection.expt_tp)
        sizes = [output_size, input_size]
        local = [divide(size, etp) if dim == self.split_dim else size for dim, size in enumerate(sizes)]
        self.out_features, self.in_features = local
        for index in range(num_gemms):
            weight = torch.empty(local, dtype=config.params_dtype, device=_device(config))
            self.register_parameter(f"weight{index}", Parameter(weight))
            if bias:
                zeros = torch.zeros(self.out_features, dtype=config.params_dtype, device=_device(config))
                self.register_parameter(f"bias{index}", Parameter(zeros))
        if config.perform_initialization:
            self._initialize(sizes, init_method)
        self._mark_parameters()
        self.register_load_state_dict_pre_hook(_drop_extra_state_of_experts)

    def _initialize(self, sizes: Sequence[int], init_method: InitMethod) -> None:
        """Draw every expert of the layer and keep the own ones: the same model in every layout."""
        first = get_pg_rank(self.groups.ep) * self.num_gemms
        for index in range(get_pg_size(self.groups.ep) * self.num_gemms):
            own = first <= index < first + self.num_gemms
            weight = self.expert_weight(index - first) if own else torch.empty_like(self.weight0)
            _initialize_affine_weight_cpu(
                weight,
                *sizes,
                self.weight0.shape[self.split_dim],
                self.split_dim,
                init_method,
                params_dtype=self.config.params_dtype,
                rank=get_pg_rank(self.groups.expt_tp),
                world_size=get_pg_size(self.groups.expt_tp),
                skip_set_tensor_parallel_attributes=True,
            )

    def _mark_parameters(self) -> None:
        """The attributes by which DDP, gradient norms and the optimizer tell expert parameters."""
        config = self.config
        own_data_parallel = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for name, parameter in self.named_parameters():
            split = name.startswith("weight") or self.mode == "column"
            parameter.allreduce = not own_data_parallel  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
            if split:
                parameter.partition_dim = self.split_dim if name.startswith("weight") else 0  # type: ignore[attr-defined]
                parameter.partition_stride = 1  # type: ignore[attr-defined]

    def expert_weight(self, index: int) -> torch.Tensor:
        """Weight [out, in] of the `index`-th local expert, as stored on this rank."""
        return self.get_parameter(f"weight{index}")

    def forward(self, x: torch.Tensor, m_splits: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Apply each expert to its run of tokens.

        Args:
            x: [tokens, in], ordered by expert.
            m_splits: tokens of each local expert.

        Returns:
            [tokens, out], and the biases [out] of the experts when adding them is left to the caller.
        """
        biases = [self.get_parameter(f"bias{index}") for index in range(self.num_gemms)] if self.use_bias else None
        added = [None] * self.num_gemms if biases is None or self.skip_bias_add else biases
        # An expert without tokens takes part with an empty run, so that its weight gets a (zero) gradient.
        runs = zip(torch.split(x, list(m_splits)), range(self.num_gemms), added, strict=True)
        output = torch.cat([F.linear(run, self.expert_weight(index), bias) for run, index, bias in runs])
        return output, biases if self.skip_bias_add else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One entry per expert, all under the key of a single linear, with the expert as a leading dimension.

        Keys of the returned dict are `{prefix}weight{i}`; the sharded key is `{prefix}weight` with offset
        (axis, global expert, experts), or `{global expert}.{prefix}weight` with `singleton_local_shards`.
        """
        metadata = metadata or {}
        first = get_pg_rank(self.groups.ep) * self.num_gemms
        experts = get_pg_size(self.groups.ep) * self.num_gemms
        split = {"weight": self.split_dim} | ({"bias": 0} if self.mode == "column" else {})
        names = ("weight", "bias") if self.use_bias else ("weight",)
        # Of the module as a whole, again for every expert: what others have put there goes along, as with TE's.
        extra_state = self.state_dict(prefix="", keep_vars=True).get("_extra_state")
        sharded: dict[str, Any] = {}
        for index in range(self.num_gemms):
            if metadata.get("singleton_local_shards", False):
                key, offsets = f"{first + index}.{prefix}", sharded_offsets
            else:
                key, offsets = prefix, (*sharded_offsets, (len(sharded_offsets), first + index, experts))
            state = {name: self.get_parameter(f"{name}{index}") for name in names}
            state["_extra_state"] = extra_state
            entries = make_sharded_tensors_for_checkpoint(
                state,
                key,
                split,
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for name in names:
                sharded[f"{prefix}{name}{index}"] = entries[f"{key}{name}"]
            sharded[f"{prefix}_extra_state{index or ''}"] = entries[f"{key}_extra_state"]
        for entry in sharded.values():
            # Replicas of an expert are the ranks of its own data-parallel group.
            entry.replica_id = (*entry.replica_id[:2], get_pg_rank(self.groups.expt_dp))
        return sharded

    def backward_dw(self) -> None:
        """Nothing: weight gradients are not delayed."""


def _drop_extra_state_of_experts(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object
) -> None:
    """A distributed checkpoint has one `_extra_state{i}` per expert; the module has one for all."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}_extra_state")]:
        if name != f"{prefix}_extra_state":
            del state_dict[name]


class HostColumnParallelGroupedLinear(_HostGroupedLinear):
    """Experts cut along their outputs."""

    split_dim = 0
    mode = "column"


class HostRowParallelGroupedLinear(_HostGroupedLinear):
    """Experts cut along their inputs; each rank of expert-TP gives a partial sum."""

    split_dim = 1
    mode = "row"

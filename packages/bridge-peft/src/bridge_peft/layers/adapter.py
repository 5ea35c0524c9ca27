"""One adapter of one linear layer: its factors, and what it adds to the layer's output.

Shape legend: S sequence, B batch (a factor's name elsewhere), T tokens of this rank's experts, E local experts,
r rank, in and out: this rank's share of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from bridge_peft.config import scaling
from bridge_peft.layers.experts import Splits, by_expert, rows_by_expert
from bridge_peft.layers.parallel import gather_features, gather_input, reduce_output, scatter_features, sum_gradient
from bridge_peft.placement import MAGNITUDE, A, B, Factor, Sharing, factors, missing_sum

if TYPE_CHECKING:
    from bridge_peft.layers.sites import Site


@dataclass(frozen=True)
class Settings:
    """What a configuration says about one module.

    Attributes:
        rank, alpha, rslora: r and what `scaling` follows from.
        dropout: probability for elements of the adapter's input.
        dtype: of the factors.
        keep_dtype: whether casts of the whole model leave it alone.
        parts: of a canonical adapter, the parts that it adapts; empty for one pair of factors.
        dora: with a magnitude per output row.
        sharing: what the experts of a layer share.
        changes_base: whether its first values were taken out of the base weight.
    """

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    dtype: torch.dtype
    keep_dtype: bool
    parts: tuple[str, ...] = ()
    dora: bool = False
    sharing: Sharing = "each"
    changes_base: bool = False

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return scaling(self.alpha, self.rank, rslora=self.rslora)


class LoraAdapter(nn.Module):
    """The factors of one adapter on one linear layer; what is added to the layer's output.

    Parameters are `lora_A` [r, in], `lora_B` [out, r] and with DoRA `lora_magnitude` [out], or for a canonical
    adapter `lora_A_q`, `lora_B_q` and so on; with a leading dim E where a module holds several experts.
    `placement` says which part of the whole they are. Values are set by `bridge_peft.init`.

    Args:
        site: the layer.
        settings: what the configuration says about it.
        device: of the factors.
    """

    def __init__(self, site: Site, settings: Settings, *, device: torch.device) -> None:
        super().__init__()
        self.site = site
        self.settings = settings
        self.factors = factors(
            site.linear, settings.rank, sharing=settings.sharing, parts=settings.parts, magnitude=settings.dora
        )
        for name, factor in self.factors.items():
            shape = factor.local_shape(site.size, site.local_experts)
            if factor.by_expert and not site.grouped:
                shape = shape[1:]
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=settings.dtype, device=device)))
        self.mark()

    def mark(self) -> None:
        """Set the attributes by which mcore's DDP, gradient norms and `finalize_model_grads` tell parameters apart."""
        for name, factor in self.factors.items():
            parameter: Any = self.get_parameter(name)
            lacks = self.lacks(factor)
            parameter.allreduce = factor.shared or not self.site.own_data_parallel
            parameter.sequence_parallel = lacks in ("sequence", "all") and self.site.sequence_parallel
            parameter.tensor_model_parallel = factor.cut is not None
            if factor.cut is not None:
                parameter.partition_dim = factor.cut - (factor.by_expert and not self.site.grouped)
                parameter.partition_stride = factor.blocks

    def lacks(self, factor: Factor) -> str:
        """Which sum the factor's gradient lacks; see `placement.missing_sum`."""
        site = self.site
        return missing_sum(
            site.linear, factor, communicates=site.communicates, sequence_parallel=site.sequence_parallel
        )

    def forward(self, x: Tensor, base: Tensor, splits: Splits = None) -> Tensor:
        """What to add to the layer's output.

        Args:
            x: the layer's input, normalised if the layer does that: [S, B, in], or [T, in] for experts.
            base: the layer's output without bias; only DoRA looks at its values.
            splits: tokens of each expert, where the module holds several.

        Returns:
            [..., out], in the dtype of the factors: complete where the layer's output is, a partial sum where
            it is one.
        """
        site, settings = self.site, self.settings
        x = F.dropout(x, settings.dropout, self.training).to(settings.dtype)
        if site.communicates and site.linear.mode == "row" and not getattr(site.module, "input_is_parallel", True):
            x = scatter_features(x, site.group)
        names = [f"_{part}" for part in settings.parts] or [""]
        hidden = by_expert(x, torch.cat([self.used(A + name) for name in names], dim=-2), splits)
        if site.communicates and site.linear.mode == "column":
            hidden = gather_input(hidden, site.group, sequence_parallel=site.sequence_parallel)
        elif site.communicates and site.linear.mode == "row":
            hidden = reduce_output(hidden, site.group, sequence_parallel=site.sequence_parallel)
        runs = hidden.split(settings.rank, dim=-1)
        added = [by_expert(run, self.used(B + name), splits) for run, name in zip(runs, names, strict=True)]
        output = (self._interleaved(added, dim=-1) if settings.parts else added[0]) * settings.scaling
        gathered = base.shape[-1] == output.shape[-1] * site.size != output.shape[-1]
        if settings.dora:
            ratio = rows_by_expert(self.ratio(), splits, base.shape[0], 1.0)
            ratio = gather_features(ratio, site.group) if gathered else ratio
            output = gather_features(output, site.group) if gathered else output
            return (ratio - 1) * base.to(ratio.dtype) + ratio * output
        return gather_features(output, site.group) if gathered else output

    def used(self, name: str) -> Tensor:
        """The part of a factor that this rank's share of the layer takes; its gradient is summed if it must be."""
        factor, value = self.factors[name], self.get_parameter(name)
        if self.lacks(factor) == "factor":
            return sum_gradient(value, self.site.group)
        if factor.used is not None and self.site.size > 1:
            runs = factor.runs(self.site.rank, self.site.size)
            return torch.cat([value.narrow(factor.used, start, length) for start, length in runs], dim=factor.used)
        return value

    def _interleaved(self, values: list[Tensor], dim: int) -> Tensor:
        """Rows of parts, [..., rows of the part, ...] each, in the order of the fused layer; other parts are zeros."""
        dim %= values[0].dim()
        given = dict(zip(self.settings.parts, values, strict=True))
        runs = []
        for part in (part.local(self.site.size) for part in self.site.linear.parts):
            value = given.get(part.name)
            if value is None:
                shape = list(values[0].shape)
                shape[dim] = part.rows
                value = values[0].new_zeros(shape)
            runs.append(value.unflatten(dim, (part.groups, -1)))
        return torch.cat(runs, dim=dim + 1).flatten(dim, dim + 1)

    @torch.no_grad()
    def update(self) -> Tensor:
        """scaling * B A of this rank's share, in float32: [out, in], or [E, out, in]; without DoRA's magnitude."""
        names = self.settings.parts
        if not names:
            return self.settings.scaling * (self._plain(B) @ self._plain(A))
        products = [self._plain(f"{B}_{name}") @ self._plain(f"{A}_{name}") for name in names]
        products = [product.expand(*self._lead(products), *product.shape[-2:]) for product in products]
        return self.settings.scaling * self._interleaved(products, dim=-2)

    @staticmethod
    def _lead(products: list[Tensor]) -> tuple[int, ...]:
        return max((tuple(product.shape[:-2]) for product in products), key=len)

    def _plain(self, name: str) -> Tensor:
        """The used part of a factor in float32, outside of any graph."""
        factor, value = self.factors[name], self.get_parameter(name).detach().float()
        if factor.used is not None and self.site.size > 1:
            runs = factor.runs(self.site.rank, self.site.size)
            return torch.cat([value.narrow(factor.used, start, length) for start, length in runs], dim=factor.used)
        return value

    def ratio(self) -> Tensor:
        """DoRA's magnitude over the norm of the adapted weight's rows: [out] or [E, out].

        Collective over the layer's group where W is cut along its inputs. The norm is a constant of the
        backward (Liu et al. 2024, section 4.3).
        """
        magnitude = self.used(MAGNITUDE)
        return magnitude / self.norm().to(magnitude.dtype)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Norm of every row of W + scaling * B A, in float32: [out] or [E, out]. Collective like `ratio`."""
        from bridge_peft.layers.weights import used_weights

        site = self.site
        updates = self.update()
        updates = updates if site.grouped else updates.unsqueeze(0)
        weights = used_weights(site)
        squares = torch.stack([(w.float() + u).square().sum(-1) for w, u in zip(weights, updates, strict=True)])
        squares = squares if site.grouped else squares[0]
        if site.linear.mode == "row" and site.size > 1:
            torch.distributed.all_reduce(squares, group=site.group)
        return squares.sqrt()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraAdapter:
        """Casts of the whole model leave an explicit dtype alone; moves are followed."""
        super()._apply(self._without_cast(fn) if self.settings.keep_dtype else fn, recurse)
        if not self.settings.keep_dtype:
            self.settings = replace(self.settings, dtype=next(self.parameters()).dtype)
        return self

    @staticmethod
    def _without_cast(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def move(value: Tensor) -> Tensor:
            probe = fn(value.new_empty(0))
            return value.to(probe.device) if probe.dtype != value.dtype else fn(value)

        return move

    def extra_repr(self) -> str:
        """Rank, scaling and shapes."""
        shapes = ", ".join(f"{name}={tuple(value.shape)}" for name, value in self.named_parameters())
        return f"r={self.settings.rank}, scaling={self.settings.scaling:g}, {shapes}"

"""Whole factors from the shares that ranks hold: the same bytes on every rank, whatever the layout.

Every byte of a whole factor has one owner. Owners put theirs into a buffer of zeros, and the sum of all ranks'
buffers, taken as integers, is the whole: no arithmetic touches a value, so layouts cannot differ in a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from bridge_core.checkpoint.workers import jointly
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError, CoverageError, LayoutError
from bridge_core.runtime.homes import unwrap
from bridge_core.runtime.tensors import dtype_name, torch_dtype
from bridge_core.runtime.workers import TorchWorkers, noticing_loss
from bridge_peft.apply import adapters_named
from bridge_peft.converting.adapter_file import Layer
from bridge_peft.converting.bases import Bases
from bridge_peft.converting.exclude import excluded_by
from bridge_peft.settings import AdapterSettings
from bridge_peft.sharded import owns

if TYPE_CHECKING:
    from torch import Tensor

    from bridge_peft.layers.adapter import LoraAdapter

_ALIGN = 8
Described = tuple[AdapterSettings, dict[str, tuple[tuple[int, ...], str]]]
"""Settings of an adapter; whole shape and dtype of each factor."""


def settings_of(adapter: LoraAdapter) -> AdapterSettings:
    """What a checkpoint says of an adapter."""
    own = adapter.settings
    return AdapterSettings(
        r=own.rank,
        alpha=own.alpha,
        rslora=own.rslora,
        dropout=own.dropout,
        dora=own.dora,
        parts=own.parts,
        sharing=own.sharing if adapter.site.linear.experts else "each",
        changes_base=own.changes_base,
    )


def _described(settings: dict[str, Any], factors: dict[str, Any]) -> Described:
    """What another rank says of a layer."""
    known = {key: (tuple(shape), dtype) for key, (shape, dtype) in factors.items()}
    return AdapterSettings.from_dict(settings, where="an adapter on another rank"), known


@dataclass(frozen=True)
class Share:
    """What this rank holds of one whole factor: its parameter, and where each part of it lies in the whole."""

    adapter: LoraAdapter
    factor: str

    @property
    def tensor(self) -> Tensor:
        """The parameter, with the expert dim where the whole has one."""
        value = self.adapter.get_parameter(self.factor).detach()
        by_expert = self.adapter.factors[self.factor].by_expert
        return value.unsqueeze(0) if by_expert and not self.adapter.site.grouped else value

    def regions(self, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the whole factor, and of the parameter, that hold the same elements."""
        site, factor, own = self.adapter.site, self.adapter.factors[self.factor], self.tensor
        if factor.by_expert:
            whole = whole.narrow(0, site.first_expert, own.shape[0])
        if factor.cut is None:
            yield whole, own
            return
        at = 0
        for start, length in factor.runs(site.rank, site.size):
            yield whole.narrow(factor.cut, start, length), own.narrow(factor.cut, at, length)
            at += length


class Held:
    """The adapters of one name on a live model: all layers on every rank, and this rank's shares. Collective.

    Args:
        model: an adapted model or its chunks, wrapped or not.
        bases: the layers of the model.
        name: of the adapter.
        exclude: beginnings of Megatron names to leave out.
        group: all ranks of the model.

    Attributes:
        bases: the layers of the model.
        layers: the adapted ones of all ranks, in the order of the family's table.
        excluded: those of `exclude` that fitted something.

    Raises:
        BridgeError: on every rank, if one has an adapter that does not fit the model, or none has any.
    """

    def __init__(self, model: Any, bases: Bases, name: str, *, exclude: Sequence[str] = (), group: Any) -> None:
        self.group, self.bases = group, bases
        self._workers = TorchWorkers(group)
        mine = jointly(self._workers, lambda: self._mine(model, name, exclude))
        self.device = next((p.device for chunk in unwrap(model) for p in chunk.parameters()), torch.device("cpu"))
        said = self._workers.share([mine, sorted(self.excluded)])
        self.excluded = {prefix for _, theirs in said for prefix in theirs}
        everything = {layer: _described(*value) for theirs, _ in said for layer, value in theirs.items()}
        self.layers = [
            Layer(base, number, *everything[base.named(number)]) for base, number in bases.in_order(everything)
        ]
        _check_found(self.layers, name, exclude)

    def _mine(self, model: Any, name: str, exclude: Sequence[str]) -> dict[str, Any]:
        """`Described` of the layers on this rank, as JSON values."""
        self.shares: dict[tuple[str, str], list[Share]] = {}
        self.excluded: set[str] = set()
        mine: dict[str, Any] = {}
        for adapters in adapters_named(model, ()):
            if name not in adapters:
                continue
            adapter: Any = adapters[name]
            if prefix := excluded_by(adapter.site.name, exclude):
                self.excluded.add(prefix)
                continue
            layer = _checked_name(self.bases, adapter)
            mine[layer] = (
                settings_of(adapter).to_dict(),
                {key: (f.shape, dtype_name(adapter.get_parameter(key))) for key, f in adapter.factors.items()},
            )
            for key in adapter.factors:
                self.shares.setdefault((layer, key), []).append(Share(adapter, key))
        return mine

    def whole(self, bucket_bytes: int, *, to: int | None = None) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
        """Every layer with its whole factors, in buckets of bounded bytes. Collective: all ranks take all.

        Args:
            bucket_bytes: of all factors that travel at a time; one layer may take more.
            to: the rank of `group` that gets them; the others get zeros. All ranks by default.
        """
        bucket: list[Layer] = []
        size = 0
        for layer in self.layers:
            nbytes = sum(_nbytes(*factor) for factor in layer.factors.values())
            if bucket and size + nbytes > bucket_bytes:
                yield from self._summed(bucket, to)
                bucket, size = [], 0
            bucket.append(layer)
            size += nbytes
        if bucket:
            yield from self._summed(bucket, to)

    def _summed(self, layers: list[Layer], to: int | None) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
        data, made = jointly(self._workers, lambda: self._filled(layers))
        words = data.view(torch.int32)
        with noticing_loss():
            if to is None:
                dist.all_reduce(words, group=self.group)
            else:
                dist.reduce(words, dist.get_global_rank(self.group, to), group=self.group)
        yield from made

    def _filled(self, layers: list[Layer]) -> tuple[Tensor, list[tuple[Layer, dict[str, Tensor]]]]:
        """The bytes of some layers' factors, zero but for what this rank owns, and the factors as views of them."""
        sizes = [_nbytes(*factor) for layer in layers for factor in layer.factors.values()]
        data = torch.zeros(sum(sizes), dtype=torch.uint8, device=self.device)
        parts = iter(data.split(sizes))
        made = [
            (
                layer,
                {
                    name: next(parts)[: prod(shape) * dtype_of(dtype).itemsize].view(torch_dtype(dtype)).view(shape)
                    for name, (shape, dtype) in layer.factors.items()
                },
            )
            for layer in layers
        ]
        for layer, factors in made:
            for name, whole in factors.items():
                for share in self.shares.get((layer.name, name), ()):
                    if owns(share.adapter, share.factor):
                        for target, source in share.regions(whole):
                            target.copy_(source)
        return data, made


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return -(-prod(shape) * dtype_of(dtype).itemsize // _ALIGN) * _ALIGN


def _checked_name(bases: Bases, adapter: LoraAdapter) -> str:
    """The name of an adapted layer in the plan, which must see it as the adapter does.

    A layer's rows are cut segment by segment, and so are those of B: both sides must see the same segments.
    """
    base, number, _ = bases.find(adapter.site.name)
    site = adapter.site
    shape = (site.linear.out_features, site.linear.in_features)
    if shape != base.entry.shape or site.linear.experts != base.linear.experts:
        raise CoverageError(
            "an adapted layer has another shape than the model's configuration says",
            where=site.name,
            expected=f"{base.entry.shape}, {base.linear.experts} experts",
            got=f"{shape}, {site.linear.experts} experts",
            fix="use the bridge of the model that was adapted",
        )
    if site.linear.mode == "column" and site.size > 1 and site.linear.blocks != base.linear.blocks:
        raise LayoutError(
            "the rows of a layer are cut otherwise than the adapter knows",
            where=site.name,
            expected=f"{base.linear.blocks} segments",
            got=f"{site.linear.blocks}",
            fix="export at a tensor-parallel size of 1, or leave the layer out",
        )
    return base.named(number or 0)


def _check_found(layers: Sequence[Layer], name: str, exclude: Sequence[str]) -> None:
    if not layers:
        raise ConfigError(
            "there is no adapter to export",
            where=f"adapter {name!r}",
            expected="adapted layers" + (f" beside those that begin with {', '.join(exclude)}" if exclude else ""),
            got="none on any rank",
            fix="call apply_lora first, and pass its adapter_name",
        )

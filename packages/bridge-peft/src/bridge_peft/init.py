"""First values of an adapter's factors. They depend on names and weights, never on the parallel layout."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from bridge_core.errors import ConfigError, preview
from bridge_peft.layers.adapter import LoraAdapter
from bridge_peft.layers.sites import Site
from bridge_peft.layers.weights import input_scale, is_packed, recalibrate, weight_quantizers
from bridge_peft.placement import MAGNITUDE, A, B, Factor

if TYPE_CHECKING:
    from bridge_peft.config import LoraConfig

Pair = tuple[Tensor, Tensor]  # A [r, in] and B [out, r] of a whole layer, float64


@torch.no_grad()
def initialise(adapters: list[tuple[str, LoraAdapter]], config: LoraConfig) -> None:
    """Fill the factors of new adapters, and the base weights where the method takes something out of them.

    Collective over the layers' groups: every rank of a layer must call this, in the same order.

    Args:
        adapters: (name of the adapter, adapter on a layer).
        config: its `lora_init_method` and `seed`.
    """
    method, _ = _METHODS[config.lora_init_method]
    unquantised = []
    for name, adapter in adapters:
        _kaiming_zeros(name, adapter, config.seed)
        if method is not None and not method(adapter):
            unquantised.append(adapter.site.name)
        if adapter.settings.dora:
            value = adapter.get_parameter(MAGNITUDE)
            value.copy_(adapter.norm())
    if unquantised:
        warnings.warn(
            f"svdquant: {len(unquantised)} layer(s) have no enabled weight quantizer, so there is no residual to "
            f"approximate and B starts as zeros: {preview(unquantised)}",
            stacklevel=3,
        )


def _kaiming_zeros(name: str, adapter: LoraAdapter, seed: int) -> None:
    """A uniform in +- 1 / sqrt(in), as PEFT and `nn.Linear` draw it (peft 0.21, tuners/lora/layer.py); B zeros."""
    site = adapter.site
    for key, factor in adapter.factors.items():
        if not key.startswith(A):
            continue
        value = adapter.get_parameter(key)
        experts = range(site.first_expert, site.first_expert + site.local_experts) if factor.by_expert else (None,)
        drawn = [_drawn(factor, f"{seed}|{site.name}|{expert}|{name}|{key}", site) for expert in experts]
        value.copy_(torch.stack(drawn) if factor.by_expert and site.grouped else drawn[0])


def _drawn(factor: Factor, label: str, site: Site) -> Tensor:
    """This rank's share of one whole matrix A, drawn from a generator that its label alone decides."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") >> 1)
    whole = torch.empty(factor.shape[-2:])
    whole.uniform_(-1 / sqrt(whole.shape[1]), 1 / sqrt(whole.shape[1]), generator=generator)
    return _share(whole, factor, site, dim=1)


def _share(whole: Tensor, factor: Factor, site: Site, *, dim: int) -> Tensor:
    """A rank's share of a whole matrix, if its factor is cut in storage."""
    if factor.cut is None:
        return whole
    return torch.cat([whole.narrow(dim, start, length) for start, length in factor.runs(site.rank, site.size)], dim)


def _svdquant(adapter: LoraAdapter) -> bool:
    """B A = the best rank-r approximation of W - quant(W); false where no weight quantizer is enabled.

    Where the layer's input is smoothed (multiplied by a scale before the weight, which was divided by it),
    A is multiplied by that scale: the adapter sees the input as it comes.
    """
    site = adapter.site
    quantizers = weight_quantizers(site)
    if all(quantizer is None for quantizer in quantizers):
        return False
    residuals = [
        torch.zeros_like(weight) if quantizer is None else weight.float() - quantizer(weight).float()
        for weight, quantizer in zip(site.weights(), quantizers, strict=True)
    ]
    _decompose(adapter, residuals, _singular(adapter), input_scale=input_scale(site))
    return True


def _svdquant_weight(adapter: LoraAdapter) -> bool:
    """B A = the leading part of W, taken out of W; the rest is quantised with ranges of its own.

    W is smoothed where the layer's input is (Li et al. 2024; modelopt 0.47, model_calib.py, `svdquant`).
    """
    site = adapter.site
    _take_out(adapter, _singular(adapter), input_scale=input_scale(site))
    recalibrate(site)
    return True


def _check_quantised(site: Site) -> None:
    if any(quantizer is None for quantizer in weight_quantizers(site)):
        raise ConfigError(
            "there is no quantised weight to take the leading part out of",
            where=site.name,
            expected="an enabled weight quantizer",
            got="none",
            fix='quantise the model first, leave this layer out, or take lora_init_method="pissa"',
        )
    _check_not_packed(site)


def _check_not_packed(site: Site) -> None:
    if any(is_packed(weight) for weight in site.weights()):
        raise ConfigError(
            "the weight from before it was quantised cannot be known any more",
            where=site.name,
            expected="fake-quantised weights",
            got="packed ones",
            fix="call apply_lora between quantize and compress, or take kaiming_zeros",
        )


def _pissa(adapter: LoraAdapter) -> bool:
    """B A = the leading part of W, taken out of W (Meng et al. 2024; peft 0.21, `pissa_init`)."""
    _take_out(adapter, _singular(adapter))
    return True


def _olora(adapter: LoraAdapter) -> bool:
    """B, A = the first columns of Q and rows of R of W = Q R, taken out of W (peft 0.21, `olora_init`)."""
    rank = adapter.settings.rank

    def decompose(matrix: Tensor) -> Pair:
        q, r = torch.linalg.qr(matrix)
        return _padded(r[:rank], (rank, matrix.shape[1])), _padded(q[:, :rank], (matrix.shape[0], rank))

    _take_out(adapter, decompose)
    return True


def _singular(adapter: LoraAdapter) -> Callable[[Tensor], Pair]:
    """The rank-r part of a singular value decomposition, singular values shared evenly by A and B."""
    rank, scaling = adapter.settings.rank, adapter.settings.scaling

    def decompose(matrix: Tensor) -> Pair:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        down, up = root[:, None] * vt[:rank], u[:, :rank] * root
        return _padded(down, (rank, matrix.shape[1])), _padded(up, (matrix.shape[0], rank))

    return decompose


def _padded(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros behind, where the rank is larger than the matrix has."""
    padded = matrix.new_zeros(shape)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _check_plain(site: Site) -> None:
    if any(quantizer is not None for quantizer in weight_quantizers(site)):
        raise ConfigError(
            "a method that changes the base weight does not go with a quantised one",
            where=site.name,
            expected="a layer without an enabled weight quantizer",
            got="one with a quantizer that is calibrated for the weight as it is",
            fix='lora_init_method="svdquant" or "svdquant_weight", or quantise afterwards',
        )


def _take_out(adapter: LoraAdapter, decompose: Callable[[Tensor], Pair], *, input_scale: Tensor | None = None) -> None:
    """Set the factors from the weights, and subtract from these what the factors, as they are stored, add."""
    site = adapter.site
    weights = site.weights()
    _decompose(adapter, weights, decompose, input_scale=input_scale)
    updates = adapter.update()
    if input_scale is not None:
        updates = updates / input_scale.to(updates)
    for weight, update in zip(weights, updates if site.grouped else [updates], strict=True):
        weight.copy_(weight.float() - update)


def _decompose(
    adapter: LoraAdapter,
    matrices: list[Tensor],
    decompose: Callable[[Tensor], Pair],
    *,
    input_scale: Tensor | None = None,
) -> None:
    """Set the factors from each whole matrix, of which this rank has a share. Collective over the layer's group."""
    site, factors = adapter.site, adapter.factors
    downs, ups = [], []
    for matrix in matrices:
        down, up = _on_one_rank(site, matrix.double(), adapter.settings.rank, decompose)
        if site.linear.mode == "column":
            up = up.chunk(site.size)[site.rank]  # rows of rank 0, of rank 1, ...: as the shares were gathered
        elif site.linear.mode == "row":
            down = _share(down, Factor(tuple(down.shape), cut=1), site, dim=1)
        downs.append(down if input_scale is None else down * input_scale.to(down))
        ups.append(up)
    for key, values in ((A, downs), (B, ups)):
        assert key in factors
        adapter.get_parameter(key).copy_(torch.stack(values) if site.grouped else values[0])


def _on_one_rank(site: Site, share: Tensor, rank: int, decompose: Callable[[Tensor], Pair]) -> Pair:
    """Decompose the whole matrix on the group's first rank; all get the same bits, signs included."""
    if site.linear.mode == "replicated" or site.size == 1:
        return decompose(share)
    dim = 0 if site.linear.mode == "column" else 1
    shares = [torch.empty_like(share) for _ in range(site.size)]
    dist.all_gather(shares, share.contiguous(), group=site.group)
    whole = torch.cat(shares, dim)
    if site.rank == 0:
        down, up = decompose(whole)
    else:
        down, up = whole.new_empty(rank, whole.shape[1]), whole.new_empty(whole.shape[0], rank)
    down, up = down.contiguous(), up.contiguous()
    source = dist.get_global_rank(site.group, 0)
    dist.broadcast(down, source, group=site.group)
    dist.broadcast(up, source, group=site.group)
    return down, up


def _check_nothing(site: Site) -> None:
    """Every layer goes with zeros."""


# Name -> (how to set the factors, how to refuse a layer).
_METHODS: dict[str, tuple[Callable[[LoraAdapter], bool] | None, Callable[[Site], None]]] = {
    "kaiming_zeros": (None, _check_nothing),
    "svdquant": (_svdquant, _check_not_packed),
    "svdquant_weight": (_svdquant_weight, _check_quantised),
    "pissa": (_pissa, _check_plain),
    "olora": (_olora, _check_plain),
}


def check_method(site: Site, method: str) -> None:
    """Refuse a layer that a method of `lora_init_method` does not go with; before any weight is changed.

    Raises:
        ConfigError: says what the method needs.
    """
    _METHODS[method][1](site)

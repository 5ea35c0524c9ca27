"""Adapters folded into weights: as a stream that leaves the model alone, or in place with an exact way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bridge_core.errors import ConfigError
from bridge_peft.apply import adapters_named
from bridge_peft.layers.attach import Adapters, adapters_of
from bridge_peft.layers.weights import is_packed, used_weights, weight_quantizers

if TYPE_CHECKING:
    from torch import Tensor


def merged_weights(
    model: Any, names: str | Sequence[str] | None = None, *, only_adapted: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters of the base with adapters folded in, one after the other; the model stays as it is.

    Collective over the layers' groups where DoRA needs norms of rows that ranks hold in parts: then all ranks
    must take all entries.

    Args:
        model: an adapted model or its chunks.
        names: which adapters; by default the active ones.
        only_adapted: leave out parameters that no adapter changes.

    Yields:
        Name of the parameter without adapters (in its chunk), and its value: adapted weights in float32, as new
        tensors; other parameters as they are stored, not copied. A quantised layer's weight is what
        its forward multiplies with: quantised and back, plus the adapter.
    """
    from bridge_core.runtime.homes import unwrap

    wanted = _wanted(model, names)
    for chunk in unwrap(model):
        layers = {path: adapters for path, adapters in adapters_of(chunk) if _active(adapters, wanted)}
        for adapters in layers.values():
            adapters.site.weights()  # refuses a layer whose weight is not its own
        owners = {
            f"{path}.{name}": (adapters, index)
            for path, adapters in layers.items()
            for index, name in enumerate(adapters.site.weight_names())
        }
        merged: dict[str, list[Tensor]] = {}
        for name, parameter in chunk.named_parameters():
            if ".adapter." in name:
                continue
            if name not in owners:
                if not only_adapted:
                    yield name, parameter.detach()
                continue
            adapters, index = owners[name]
            path = name.rpartition(".")[0]
            if path not in merged:
                merged = {path: _merged(adapters, _active(adapters, wanted))}  # one layer at a time
            yield name, merged[path][index]


@torch.no_grad()
def merge_adapters(model: Any, names: str | Sequence[str] | None = None, *, keep_on: str | None = None) -> None:
    """Fold adapters into the base weights, in place; the forward then costs what the base's costs.

    The weights from before are kept, because a rounded sum cannot be taken apart again.

    Args:
        model: an adapted model or its chunks.
        names: which adapters; by default the active ones.
        keep_on: device for the weights from before, for example "cpu"; by default where they are.

    Raises:
        ConfigError: something is merged already, or a layer's weight is quantised: the sum would be
            quantised again. Nothing is changed then.
    """
    wanted = _wanted(model, names)
    layers = [adapters for adapters in adapters_named(model, wanted or ()) if _active(adapters, wanted)]
    for adapters in layers:
        _check_mergeable(adapters)
    for adapters in layers:
        site = adapters.site
        merged = _merged(adapters, _active(adapters, wanted))
        originals = {}
        for name, weight, value in zip(site.weight_names(), site.weights(), merged, strict=True):
            originals[name] = weight.detach().to(keep_on or weight.device, copy=True)
            weight.copy_(value)
        adapters.originals = originals


@torch.no_grad()
def unmerge_adapters(model: Any) -> None:
    """Put the weights from before `merge_adapters` back, to the bit; without effect where nothing is merged."""
    for adapters in adapters_named(model, ()):
        originals = adapters.originals
        if originals:
            for name, weight in zip(adapters.site.weight_names(), adapters.site.weights(), strict=True):
                weight.copy_(originals[name])
            adapters.originals = {}


def _wanted(model: Any, names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    wanted = (names,) if isinstance(names, str) else tuple(names)
    adapters_named(model, wanted)
    return wanted


def _active(adapters: Adapters, wanted: tuple[str, ...] | None) -> list[Any]:
    chosen = adapters.active if wanted is None else wanted
    return [adapters[name] for name in chosen if name in adapters]


@torch.no_grad()
def _merged(adapters: Adapters, chosen: list[Any]) -> list[Tensor]:
    """W + the updates of all chosen adapters, each [out, in] in float32."""
    site = adapters.site
    bases = [weight.float() for weight in used_weights(site)]
    totals = [base.clone() for base in bases]
    for adapter in chosen:
        updates = adapter.update()
        updates = updates.expand(len(bases), *updates.shape[-2:]) if updates.dim() == 2 else updates
        ratios = adapter.ratio().float() if adapter.settings.dora else None
        for index, update in enumerate(updates):
            if ratios is not None:
                ratio = (ratios[index] if ratios.dim() == 2 else ratios)[:, None]
                update = (ratio - 1) * bases[index] + ratio * update
            totals[index] += update
    return totals


def _check_mergeable(adapters: Adapters) -> None:
    site = adapters.site
    if adapters.originals:
        raise ConfigError(
            "an adapter is merged already",
            where=site.name,
            expected="a layer with its own weight",
            got="one with an adapter folded in",
            fix="unmerge_adapters first",
        )
    packed = any(is_packed(weight) for weight in site.weights())
    if packed or any(quantizer is not None for quantizer in weight_quantizers(site)):
        raise ConfigError(
            "a merged weight would be quantised once more",
            where=site.name,
            expected="a layer whose weight is not quantised",
            got="a packed weight" if packed else "an enabled weight quantizer",
            fix="take merged_weights, which gives the sum that the forward computes with",
        )

"""Layers whose inputs were never seen in calibration: refused, given the range of their peers, or weights only.

It happens to experts that no calibration token reached. A reader without an input scale computes garbage, so there is
no way to leave it out quietly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bridge_core.errors import ConfigError
from bridge_quant_export.errors import CalibrationError, FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.live.agree import block_of
from bridge_quant_export.live.held import Weight
from bridge_quant_export.live.vectors import reduced
from bridge_quant_export.state import LayerState

Uncalibrated = Literal["error", "peers", "weight_only"]
POLICIES: tuple[Uncalibrated, ...] = ("error", "peers", "weight_only")

_WEIGHT_ONLY = {"nvfp4": "w4a16_nvfp4", "int8": "int8_weight_only", "w4a8_mxfp4_fp8": "w4a16_mxfp4"}

Place = tuple[str, int]


def check_policy(policy: str) -> None:
    """Refuse a word that is no policy.

    Raises:
        ConfigError: says which there are.
    """
    if policy not in POLICIES:
        raise ConfigError("no such policy", where="uncalibrated", expected=", ".join(POLICIES), got=policy)


def settle(
    weights: Sequence[Weight], policy: Uncalibrated, places: Sequence[tuple[str, Sequence[int]]], group: Any
) -> list[Weight]:
    """The same weights with every input range that their formats need. Collective over `group`.

    Args:
        weights: of this rank.
        policy: `error`: leave it to `check_settled`; `peers`: the largest range of the other experts of the layer
            (of the same linear in all other layers, for a layer without experts); `weight_only`: the format without
            quantised inputs, for all experts of the layer alike, because engines give them one method.
        places: every entry of the plan with the layers that have it, the same on all ranks.
        group: all ranks of the model.
    """
    if policy == "error":
        return list(weights)
    everything = dict.fromkeys(place for entry, layers in places for place in _places(entry, layers))
    numbers = {place: at for at, place in enumerate(everything)}
    table = torch.full((len(numbers),), -1.0, dtype=torch.float32)
    for weight in weights:
        at = numbers[_place(weight, policy)]
        if policy == "weight_only":
            table[at] = max(table[at].item(), float(_lacks(weight)))
        elif (known := _input(weight)) is not None:
            table[at] = max(table[at].item(), known.float().max().item())
    table = reduced(table, group)
    change = _to_weight_only if policy == "weight_only" else _to_peers
    return [
        weight._replace(state=change(weight.state, value)) if value > 0 and weight.state is not None else weight
        for weight in weights
        for value in [table[numbers[_place(weight, policy)]].item()]
    ]


def check_settled(weights: Sequence[Weight], policy: Uncalibrated) -> None:
    """Refuse what still lacks a range.

    Raises:
        CalibrationError: names the first such layer, and how many there are.
    """
    lacking = [weight for weight in weights if _lacks(weight)]
    if lacking:
        raise CalibrationError(
            f"the inputs of {len(lacking)} weight(s) on this rank were not calibrated",
            where=lacking[0].shard.name,
            expected="a range of the input, above zero",
            got="none" if policy == "error" else f"none, and no peer that has one (uncalibrated={policy!r})",
            fix="calibrate with inputs that reach this layer, or pass uncalibrated='peers' or 'weight_only'",
        )


def _places(entry: str, layers: Sequence[int]) -> list[Place]:
    return [(name, layer) for name in dict.fromkeys((entry, block_of(entry))) for layer in (-1, *layers)]


def _place(weight: Weight, policy: Uncalibrated) -> Place:
    entry, layer, _ = weight.instance
    if policy == "weight_only":
        return block_of(entry), layer
    return entry, layer if "{expert}" in entry else -1


def _lacks(weight: Weight) -> bool:
    return weight.state is not None and "input" in weight.state.format.needs and _input(weight) is None


def _input(weight: Weight) -> Tensor | None:
    """The input's range; None where there is none. Zero means that only zeros, or nothing, was seen."""
    found = None if weight.state is None else weight.state.calibration.input
    return None if found is None or not bool((found != 0).any()) else found


def _to_peers(state: LayerState, value: float) -> LayerState:
    known = state.calibration.input
    if "input" not in state.format.needs or (known is not None and bool((known != 0).any())):
        return state
    return replace(state, calibration=replace(state.calibration, input=torch.tensor(value)))


def _to_weight_only(state: LayerState, value: float) -> LayerState:
    if "input" not in state.format.needs:
        return state
    name = _WEIGHT_ONLY.get(state.format.name)
    if name is None:
        raise FormatError(
            f"{state.format.title} has no form with unquantised inputs that a reader takes",
            expected=", ".join(_WEIGHT_ONLY),
            got=state.format.name,
            fix="pass uncalibrated='peers', or calibrate with inputs that reach all layers",
        )
    return LayerState(format=format_of(name), calibration=replace(state.calibration, input=None))

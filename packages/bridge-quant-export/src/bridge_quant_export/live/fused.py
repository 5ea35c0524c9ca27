"""Ranges that layers share because engines run them as one, although Megatron has a weight for each.

q, k and v, or gate and up, are one weight in Megatron and have one range from the start. The two projections of latent
attention that read the same input are two weights. Engines load their second-level scales as one and take the larger,
without scaling the blocks of the other again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bridge_core.patterns import fill
from bridge_core.plan import Plan
from bridge_quant_export.configs.layers import fused_name
from bridge_quant_export.errors import CalibrationError
from bridge_quant_export.formats.format import Format, Writer
from bridge_quant_export.live.held import Held, Weight
from bridge_quant_export.manifest import module_of
from bridge_quant_export.readers import READERS
from bridge_quant_export.state import LayerState


def share_fused(held: Held, plan: Plan, writer: Writer) -> Held:
    """The same, with the larger range for what readers need to be equal in layers that they fuse.

    Communicates nothing: such layers are held by the same ranks, on which their own ranges agree already.

    Raises:
        CalibrationError: inputs are scaled by features, differently for layers that read the same input.
    """
    groups: dict[str, dict[int, None]] = {}
    for index, weight in enumerate(held.weights):
        for name in _fused_names(weight, plan):
            groups.setdefault(name, {})[index] = None
    weights = list(held.weights)
    for name, members in groups.items():
        states = [state for index in members if (state := weights[index].state) is not None]
        # Those that are not quantised alike are refused where the configuration is composed.
        if len(members) > 1 and len(states) == len(members) and len({state.format for state in states}) == 1:
            shared = _shared(name, states, writer)
            for index, state in zip(members, states, strict=True):
                weights[index] = weights[index]._replace(
                    state=replace(state, calibration=replace(state.calibration, **shared))
                )
    return Held(tuple(weights), held.kv)


def _fused_names(weight: Weight, plan: Plan) -> Iterator[str]:
    """Names of the fused layers that a weight is part of."""
    entry, layer, expert = weight.instance
    for tensor in plan.entry(entry).hf:
        module = module_of(fill(tensor.name, layer, expert))
        if (fused := fused_name(module)) != module:
            yield fused


def _shared(name: str, states: list[LayerState], writer: Writer) -> dict[str, Tensor]:
    """The fields of the calibration that are to be the same, with their common value."""
    found: dict[str, Tensor] = {}
    for field in _fields(states[0].format, writer):
        values = [getattr(state.calibration, field) for state in states]
        if all(torch.equal(value, values[0]) for value in values):
            continue
        if field == "pre_quant_scale":
            raise CalibrationError(
                "layers that serving engines run as one matrix scale their inputs differently",
                where=name,
                expected="one pre_quant_scale for the input that they share",
                fix="leave these layers unquantised, or quantise them to a format without scaled inputs",
            )
        found[field] = torch.stack(values).amax(0)
    return found


def _fields(format: Format, writer: Writer) -> Iterator[str]:
    """The fields of `Calibration` that the tensors are made from which a reader needs to be shared."""
    needs = [reader.reads.get((writer, format.name)) for reader in READERS.values()]
    shared = {suffix for need in needs if need is not None for suffix in need.shared}
    fields = {"scale_2": "weight" if format.amax == () else "weight_2", "input_scale": "input"}
    for tensor in format.stored(writer) if writer in format.stores else ():
        if tensor.suffix in shared:
            yield fields.get(tensor.part, tensor.part)

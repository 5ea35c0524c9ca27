"""The quantisers of a checkpoint that was saved with ModelOpt, without ModelOpt and without a model.

Format: ModelOpt 0.47, quantization/plugins/megatron.py and opt/plugins/megatron.py. Ranges are tensors of the
checkpoint beside the weights (`<linear>.weight_quantizer._amax`, `<linear>.input_quantizer._pre_quant_scale`), of
experts with the experts' leading dim; those of a gated `linear_fc1` that was cut over ranks have the rows of one rank
after those of another, its gate before its up. Dense gated weights are stored as two halves, `linear_fc1.weight_w` and
`weight_v`. Settings are in the module's `_extra_state` object: a list of one byte tensor, which is a `torch.save` of
`modelopt_quantizer_state`. All are read with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bridge_core.checkpoint.dcp import DcpFolder, DcpTensor
from bridge_core.checkpoint.keys import Place, places
from bridge_core.checkpoint.wiring import Wired
from bridge_core.errors import CheckpointError
from bridge_core.plan import Plan
from bridge_quant_export.errors import FormatError
from bridge_quant_export.live.held import Held, Weight
from bridge_quant_export.manifest import Instance, kv_projection, quantisable
from bridge_quant_export.state import LayerState, read_kv_ranges, read_layer

_OF_QUANTISER = re.compile(r"_quantizer\.|_quantizer_")
_RANGE = re.compile(r"\.\w+_quantizer\.(\d+\.)*_amax")
_EXPERT = re.compile(r"(?<=\.experts\.experts\.)\d+\.")
# Of experts, bridge-core knows the halves.
_GATE = re.compile(r"^(?!.*\.experts\.experts\.).*\.linear_fc1\.weight_w$")


def without_quantisers(dcp: DcpFolder) -> DcpFolder:
    """The same checkpoint without what belongs to quantisers, and with dense gated weights under one key."""
    tensors = {key: found for key, found in dcp.tensors.items() if not _OF_QUANTISER.search(key)}
    for key in [key for key in tensors if _GATE.search(key)]:
        up = key.removesuffix("_w") + "_v"
        if up in tensors:
            gate, up_half = tensors.pop(key), tensors.pop(up)
            tensors[key.removesuffix("_w")] = _joined(gate, up_half)
    return replace(dcp, tensors=tensors)


def _joined(first: DcpTensor, second: DcpTensor) -> DcpTensor:
    """Two tensors, one below the other: no byte of them is elsewhere than before."""
    rows, *rest = first.shape
    below = [chunk._replace(offsets=(chunk.offsets[0] + rows, *chunk.offsets[1:])) for chunk in second.chunks]
    return replace(first, shape=(rows + second.shape[0], *rest), chunks=(*first.chunks, *below))


def read_saved(plan: Plan, wired: Wired, dcp: DcpFolder) -> Held:
    """The state of every weight of a linear layer, and the ranges of the KV cache.

    Args:
        plan: of the checkpoint's model, on one rank.
        wired: where its weights lie.
        dcp: the checkpoint, with its quantisers.

    Raises:
        CheckpointError: settings or ranges of a quantiser are missing or malformed.
        FormatError: quantised in a way that no format stores, or where nothing can be stored quantised.
    """
    saved = _Saved(dcp)
    weights: list[Weight] = []
    kv: dict[Instance, Mapping[str, Tensor]] = {}
    for shard in plan.iter_local_shards(0):
        entry = plan.entry(shard.entry)
        instance = Instance(shard.entry, shard.layer, shard.expert)
        place = next(iter(places(entry, wired.forms[entry.block], shard.layer, shard.expert)))
        if len(shard.shape) < 2 or not entry.name.rpartition(".")[2].startswith("weight"):
            continue
        gated = entry.split is not None and len(entry.split.segments) == 2 and not entry.split.names
        state = saved.layer(place, shard.shape, gated)
        if not quantisable(entry):
            if state is not None:
                raise FormatError("no format stores this tensor quantised", where=place.key, got=state.format.title)
            continue
        weights.append(Weight(shard, state, shared=entry.is_expert))
        if {kv_projection(tensor.name) for tensor in entry.hf} >= {"k", "v"}:
            attention = place.key.rpartition(".")[0].rpartition(".")[0]
            if (ranges := saved.kv(f"{attention}.core_attention", place)) is not None:
                kv[instance] = ranges
    return Held(tuple(weights), kv)


class _Quantiser(nn.Module):
    """A quantiser's settings and ranges under the names that they have on ModelOpt's own."""

    def __init__(self, settings: Mapping[str, Any], amax: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        self.is_enabled = not settings.get("_disabled", False)
        self.num_bits, self.axis = settings.get("_num_bits"), settings.get("_axis")
        self.block_sizes = settings.get("_block_sizes")
        self._dynamic = bool(settings.get("_dynamic", False))
        self._amax, self.pre_quant_scale = amax, scale


class _Saved:
    """The quantisers of a checkpoint, module by module."""

    def __init__(self, dcp: DcpFolder) -> None:
        self._dcp = dcp
        self._settings = cache(self._read_settings)
        self._tensor = cache(self._read_tensor)
        self._ranged = {key[: found.start()] for key in dcp.tensors if (found := _RANGE.search(key))}
        self._states: dict[str, list[str]] = {}
        for key in dcp.objects:
            module, mark, shard = key.rpartition("._extra_state/shard_")
            if mark:
                self._states.setdefault(module, []).append(shard)

    def layer(self, place: Place, shape: tuple[int, ...], gated: bool) -> LayerState | None:
        """How one weight is quantised; None if it is not. `gated`: its rows are a gate's, then those that go up."""
        module = place.key.rpartition(".")[0]
        settings = self._of(module, place)
        levels = _levels(settings)
        if not any(not settings[name].get("_disabled", False) for name, _ in levels):
            return None
        weight = [
            _Quantiser(settings[name], self._range(module, f"{suffix}._amax", place, gated), None)
            for name, suffix in levels
        ]
        found = {
            which: _Quantiser(
                settings[which],
                self._input(module, f"{which}._amax", place, 1),
                self._input(module, f"{which}._pre_quant_scale", place, shape[1]),
            )
            for which in ("input_quantizer", "output_quantizer")
            if which in settings
        }
        layer: Any = SimpleNamespace(
            weight=SimpleNamespace(shape=shape),
            weight_quantizer=weight[0] if len(weight) == 1 else nn.Sequential(*weight),
            **found,
        )
        return read_layer(layer, where=place.key)

    def kv(self, module: str, place: Place) -> dict[str, Tensor] | None:
        """Ranges of the keys and values of an attention module; None if its KV cache is not quantised."""
        settings = self._of(module, place)
        found = {
            name: _Quantiser(settings[name], self._input(module, f"{name}._amax", place, 1), None)
            for name in ("k_bmm_quantizer", "v_bmm_quantizer")
            if name in settings
        }
        attention: Any = SimpleNamespace(**found)
        return read_kv_ranges(attention, where=module)

    def _of(self, module: str, place: Place) -> Mapping[str, Any]:
        """The settings of a module's quantisers, by their names in it; empty if it has none."""
        wanted = _numbers(place.stack) + "_" + _numbers(place.extents) if place.stack else "0_1"
        shards = self._states.get(module, [])
        settings: Mapping[str, Any] = {}
        if shards:
            settings = self._settings(f"{module}._extra_state/shard_{wanted if wanted in shards else min(shards)}")
        if not settings and module in self._ranged:
            raise CheckpointError(
                "a layer has ranges, and the settings of its quantisers are missing",
                where=module,
                expected=f"an object {module}._extra_state with what ModelOpt saves",
                got="none that says how the layer is quantised",
                fix="save the checkpoint with ModelOpt's own functions; attention of Transformer Engine 1 lacks it",
            )
        return settings

    def _read_settings(self, key: str) -> Mapping[str, Any]:
        try:
            (state,) = torch.load(io.BytesIO(self._dcp.read_object_bytes(key)), weights_only=True)
            if not isinstance(state, Tensor) or not state.numel():
                return {}
            found = torch.load(io.BytesIO(state.numpy().tobytes()), weights_only=True)
        except (pickle.UnpicklingError, ValueError, TypeError, RuntimeError, OSError, EOFError) as error:
            raise CheckpointError(
                "the settings of quantisers cannot be read",
                where=f"{self._dcp.path}: {key}",
                expected="what ModelOpt 0.29 or later saves",
                got=str(error).partition("\n")[0],
                fix="save the checkpoint again, with that version",
            ) from None
        if isinstance(found, Mapping) and found.get("modelopt_real_quantizer_state"):
            raise FormatError(
                "weights that are stored compressed are not read", where=key, fix="save the model before compressing it"
            )
        return (found.get("modelopt_quantizer_state") if isinstance(found, Mapping) else None) or {}

    def _range(self, module: str, name: str, place: Place, gated: bool) -> Tensor | None:
        """A range of a weight; of a gated one from both halves, where each has a key of its own."""
        halves = [self._at(f"{module}.{name}_{half}", place) for half in ("w", "v")]
        if all(half is not None for half in halves):
            return torch.cat([half for half in halves if half is not None])
        return self._at(f"{module}.{name}", place, gated)

    def _at(self, key: str, place: Place, gated: bool = False) -> Tensor | None:
        """A tensor beside a weight, for the weight's place in a stack."""
        if key not in self._dcp.tensors:
            return None
        depth = len(place.stack)
        stacked = depth > 0 and self._dcp.tensors[key].shape[:depth] == place.extents
        tensor = self._tensor(key, (depth if stacked else 0) if gated else None)
        return tensor[tuple(place.stack)] if stacked else tensor

    def _input(self, module: str, name: str, place: Place, numel: int) -> Tensor | None:
        """A range or scale of inputs: the experts' own, or one for all, without an expert's number in its key."""
        key = f"{module}.{name}"
        if key not in self._dcp.tensors:
            key = f"{_EXPERT.sub('', module)}.{name}"
        if key in self._dcp.tensors and self._tensor(key).numel() == numel:
            return self._tensor(key).reshape(-1)
        return self._at(key, place)

    def _read_tensor(self, key: str, gated: int | None = None) -> Tensor:
        """A tensor; of a gated weight with all of the gate first, along the dim that is given."""
        found = self._dcp.tensors[key]
        whole = torch.empty(found.shape, dtype=_dtype(found))
        for chunk in found.chunks:
            with open(self._dcp.path / chunk.file, "rb") as file:
                file.seek(chunk.offset)
                data = torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True)
            region = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            if gated is None or gated >= len(region) or found.shape[gated] < 2:
                whole[region] = data
                continue
            half = found.shape[gated] // 2
            for number, part in enumerate(data.chunk(2, dim=gated)):
                start = number * half + chunk.offsets[gated] // 2
                own = slice(start, start + part.shape[gated])
                whole[(*region[:gated], own, *region[gated + 1 :])] = part
        return whole


def _dtype(tensor: DcpTensor) -> torch.dtype:
    from bridge_core.runtime.tensors import torch_dtype

    return torch_dtype(tensor.dtype)


def _numbers(stack: Sequence[int]) -> str:
    return ".".join(map(str, stack))


def _levels(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The quantisers that a weight goes through: names of their settings, and of their ranges.

    A weight with two has `weight_quantizer.0` and `.1`: INT4, then FP8. Grouped experts have one (or two) each, under
    their number on the rank that saved them, of which the ranges know nothing; experts are quantised alike.
    """
    single, first, second = "weight_quantizer", "weight_quantizer.0", "weight_quantizer.1"
    if single in settings:
        return [(single, single)]
    if f"{first}.0" in settings:
        return [(f"{first}.{level}", f"{single}.{level}") for level in (0, 1)]
    if first not in settings:
        return []
    if settings[first].get("_num_bits") == 4 and settings.get(second, {}).get("_num_bits") in ((4, 3), [4, 3]):
        return [(first, first), (second, second)]
    return [(first, single)]

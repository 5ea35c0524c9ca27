"""Names and shapes of adapter tensors in an HF file, for each of those who read them.

Everybody agrees on plain layers: `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [rows, r].
For routed experts there are three forms:

* **per expert**: each expert's projections are modules with a number, `...experts.7.gate_proj`. vLLM reads that
  where the model's checkpoint has such names (vllm/lora/model_manager.py, `FusedMoEWithLoRA`); so does PEFT, which
  on transformers 5 turns it into the next form while loading (peft 0.21, utils/transformers_weight_conversion.py).
* **flat**: the experts' weights are parameters [E, rows, in] of one module. A and B of all experts lie in one
  matrix each, [E * r, in] and [rows, r * E], and parameters of one module are told apart by how deep they are nested:
  `experts.base_layer` for the first, `experts` for the last (peft 0.21, tuners/lora/layer.py, `ParamWrapper`;
  vLLM's `FusedMoE3DWithLoRA` reads the same).
* **stacked**: [E, r, in] and [E, rows, r] under the projection's name without a number, where 1 stands for E if all
  experts share a factor. SGLang reads that (python/sglang/srt/lora/lora.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from bridge_core.errors import ConfigError
from bridge_core.patterns import fill
from bridge_peft.converting.bases import Base
from bridge_peft.converting.fuse import Pair, take_apart
from bridge_peft.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["peft", "peft-target-parameters", "vllm", "sglang"]
PREFIX = "base_model.model."
# Blocks whose name in a transformers 5 model is not that of their weights in a checkpoint.
_RENAMED_BLOCKS = {".block_sparse_moe.": ".mlp."}


@dataclass(frozen=True)
class Module:
    """An HF module, or a parameter, that an export adapts.

    Attributes:
        name: without `base_model.model.`; with its numbers.
        r, alpha: of its adapter.
        parameter: whether it is a parameter, for PEFT's `target_parameters`.
        expert: whether it belongs to routed experts.
    """

    name: str
    r: int
    alpha: float
    parameter: bool = False
    expert: bool = False


@dataclass(frozen=True)
class Written:
    """What an export writes for one Megatron layer: tensors by HF name, and the modules that they adapt."""

    tensors: dict[str, Tensor]
    modules: tuple[Module, ...]


def check_target(target: str) -> Target:
    """`target`, if there is such a layout.

    Raises:
        ConfigError: there is none.
    """
    if target not in get_args(Target):
        raise ConfigError(
            "there is no such target",
            where="target",
            expected=", ".join(get_args(Target)),
            got=repr(target),
            fix="take one of these",
        )
    return target  # type: ignore[return-value]


def written(
    base: Base,
    layer: int,
    settings: AdapterSettings,
    factors: Mapping[str, Tensor],
    target: Target,
    siblings: Iterable[Base] = (),
) -> Written:
    """The HF tensors of the adapter of one Megatron layer.

    Args:
        base, layer: which one.
        settings, factors: of its adapter; whole factors by name, or meta tensors for names and shapes alone.
        target: who is to read them.
        siblings: the adapted layers of the same module of experts, in the order of the family's table: they decide
            how deep parameters are nested.

    Raises:
        ConfigError: the target cannot hold such an adapter.
    """
    _check_dora(base, settings, target)
    _check_prediction(base, layer, target)
    pairs = take_apart(base, settings, factors)
    if not base.is_expert:
        return _plain(base, layer, settings, pairs)
    stacked = base.parts[0].stacked
    shared = any(tensor.shape[0] != base.linear.experts for pair in pairs.values() for tensor in (pair.a, pair.b))
    if target == "sglang" and (stacked or shared):
        return _stacked(base, layer, settings, pairs)
    if target == "peft-target-parameters" or stacked:
        depth = [sibling.name for sibling in siblings]
        below = len(depth) - 1 - depth.index(base.name) if base.name in depth else 0
        return _flat(base, layer, settings, pairs, below)
    return _per_expert(base, layer, settings, pairs)


def _check_dora(base: Base, settings: AdapterSettings, target: Target) -> None:
    if not settings.dora or (target in ("peft", "peft-target-parameters") and not base.is_expert):
        return
    raise ConfigError(
        "nobody reads magnitudes here",
        where=f"{base.name}, target {target}",
        expected="DoRA on layers other than experts, read by PEFT",
        got="use_dora" + (" on experts" if base.is_expert else ""),
        fix="merge the adapter into the model (bridge-peft merge)",
    )


def _check_prediction(base: Base, layer: int, target: Target) -> None:
    """PEFT passes tensors by for which the model has no module (peft 0.21, utils/save_and_load.py)."""
    if base.name.startswith("mtp.") and target in ("peft", "peft-target-parameters"):
        raise ConfigError(
            "transformers leaves prediction layers out, so PEFT would drop their adapters",
            where=f"{base.named(layer)}, target {target}",
            expected="no adapter on a prediction layer",
            got=", ".join(part.module for part in base.parts),
            fix='exclude_adapter_base_prefix=["mtp."] (--exclude-adapter-base-prefix mtp.), or target="vllm"',
        )


def _alpha_of(pair: Pair, settings: AdapterSettings) -> float:
    """A canonical adapter whose parts were joined has more ranks, and an alpha that keeps its scaling."""
    if pair.r == settings.r:
        return settings.alpha
    return settings.scaling * (pair.r**0.5 if settings.rslora else pair.r)


def _plain(base: Base, layer: int, settings: AdapterSettings, pairs: Mapping[int, Pair]) -> Written:
    tensors: dict[str, Tensor] = {}
    modules: list[Module] = []
    for number, pair in pairs.items():
        name = fill(base.parts[number].module, layer)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": pair.a, f"{PREFIX}{name}.lora_B.weight": pair.b}
        if pair.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
        modules.append(Module(name, pair.r, _alpha_of(pair, settings)))
    return Written(tensors, tuple(modules))


def _per_expert(base: Base, layer: int, settings: AdapterSettings, pairs: Mapping[int, Pair]) -> Written:
    tensors: dict[str, Tensor] = {}
    modules: list[Module] = []
    for number, pair in pairs.items():
        for expert in range(base.linear.experts):
            name = fill(base.parts[number].module, layer, expert)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = _of_expert(pair.a, expert)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = _of_expert(pair.b, expert)
            modules.append(Module(name, pair.r, _alpha_of(pair, settings), expert=True))
    return Written(tensors, tuple(modules))


def _of_expert(factor: Tensor, expert: int) -> Tensor:
    return factor[expert if factor.shape[0] > 1 else 0]


def _stacked(base: Base, layer: int, settings: AdapterSettings, pairs: Mapping[int, Pair]) -> Written:
    tensors: dict[str, Tensor] = {}
    modules: list[Module] = []
    for number, pair in pairs.items():
        name = fill(base.parts[number].module.replace(".{expert}.", "."), layer)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": pair.a, f"{PREFIX}{name}.lora_B.weight": pair.b}
        modules.append(Module(name, pair.r, _alpha_of(pair, settings), expert=True))
    return Written(tensors, tuple(modules))


def _flat(base: Base, layer: int, settings: AdapterSettings, pairs: Mapping[int, Pair], below: int) -> Written:
    pair = _in_one(base, pairs)
    experts, rows = base.linear.experts, pair.b.shape[-2]
    a = pair.a.expand(experts, *pair.a.shape[1:]).reshape(experts * pair.r, -1)
    b = pair.b.expand(experts, *pair.b.shape[1:]).permute(1, 2, 0).reshape(rows, pair.r * experts)
    parameter = fill(parameter_name(base), layer)
    path = parameter.rpartition(".")[0] + ".base_layer" * below
    tensors = {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    return Written(tensors, (Module(parameter, pair.r, _alpha_of(pair, settings), parameter=True, expert=True),))


def _in_one(base: Base, pairs: Mapping[int, Pair]) -> Pair:
    """The pairs of a layer's parts as that of the one parameter that holds them, part after part."""
    found = [pairs[number] for number in sorted(pairs)]
    if len(found) == len(base.parts) and all(pair.a is found[0].a for pair in found):
        return Pair(found[0].a, torch.cat([pair.b for pair in found], dim=-2))
    lead = max((tuple(x.shape[:1]) for pair in found for x in (pair.a, pair.b)), key=lambda shape: shape[0])
    a = torch.cat([pair.a.expand(*lead, *pair.a.shape[1:]) for pair in found], dim=-2)
    blocks, at = [], 0
    for number, part in enumerate(base.parts):
        block = a.new_zeros(*lead, len(part.rows), a.shape[-2])
        if number in pairs:
            block[..., at : at + pairs[number].r] = pairs[number].b
            at += pairs[number].r
        blocks.append(block)
    return Pair(a, torch.cat(blocks, dim=-2))


def parameter_name(base: Base) -> str:
    """The parameter that holds a layer of experts in a transformers 5 model, `{layer}` open.

    Where a checkpoint has experts one by one, such a model still has them in one parameter (transformers 5.23,
    conversion_mapping.py, patterns `qwen2_moe` and `mixtral`).
    """
    first = base.parts[0]
    if first.stacked:
        return first.name
    container = first.module.partition(".{expert}.")[0]
    for old, new in _RENAMED_BLOCKS.items():
        container = container.replace(old, new)
    if base.name.endswith("linear_fc1"):
        return f"{container}.{'gate_up_proj' if len(base.parts) > 1 else 'up_proj'}"
    return f"{container}.down_proj"


def same_module(bases: Iterable[Base]) -> dict[str, list[Base]]:
    """Layers of experts by the module that holds their parameters, in the order of the family's table."""
    found: dict[str, list[Base]] = {}
    for base in bases:
        if base.is_expert:
            found.setdefault(parameter_name(base).rpartition(".")[0], []).append(base)
    return found


def unpacked(base: Base, a: Tensor, b: Tensor) -> dict[int, Pair]:
    """The pairs of a layer's HF weights from flat matrices: A [E * r, in], B [rows, r * E]."""
    experts = base.linear.experts
    a = a.view(experts, -1, a.shape[-1])
    b = b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    found: dict[int, Pair] = {}
    at = 0
    for number, part in enumerate(base.parts):
        found[number] = Pair(a, b[:, at : at + len(part.rows)].contiguous())
        at += len(part.rows)
    return found


def modules_of(bases: Iterable[Base]) -> Iterator[tuple[str, bool]]:
    """Every HF module of a model that could be adapted, with its numbers, and whether it is an expert's."""
    for base in bases:
        for name, _ in base.entry.hf_names():
            yield name.removesuffix(".weight"), base.is_expert

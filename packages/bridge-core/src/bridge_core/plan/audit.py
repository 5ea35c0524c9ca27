"""The proof that comes before the first byte: every element of both sides is covered exactly once.

It is exact, and cheap because it is done per entry: that an entry's pieces tile its tensors was
checked when it was compiled; here follow its cuts over tensor-parallel ranks, its layers over
pipeline stages, its experts over expert-parallel ranks, and the names on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from bridge_core.errors import CoverageError, preview
from bridge_core.geometry import Box, Shape, View, row_major, tiling_error
from bridge_core.patterns import match

if TYPE_CHECKING:
    from bridge_core.plan.plan import Plan


class Audit(NamedTuple):
    """What an audit found to be covered, each element once.

    Attributes:
        hf_tensors: HF tensors; with the scales of quantised weights, where an inventory has them.
        megatron_tensors: Megatron tensors.
        elements: elements of the HF tensors, copies and scales among them.
        padding: elements of Megatron tensors that no HF element fills.
        ignored: HF tensors left out, by name.
    """

    hf_tensors: int
    megatron_tensors: int
    elements: int
    padding: int
    ignored: tuple[str, ...]


def audit(plan: Plan, inventory: Mapping[str, Shape] | None = None) -> Audit:
    """Check a plan, and an HF inventory against it; see `Plan.audit`."""
    for entry in plan.entries:
        entry.check()
        _check_cuts(plan, entry.name)
        _check_placement(plan, entry.name)
    _check_names(plan)
    ignored = compare(plan, inventory) if inventory is not None else ()
    # An inventory of plain weights may be that of a quantised checkpoint, read.
    stored = inventory is None or plan.stores(inventory)
    beyond = {name: shape for name, shape in plan.parts.items() if stored and name not in plan.hf_tensors}
    padding = sum(prod(e.padding.shape) * len(e.layers) * e.experts for e in plan.entries if e.padding)
    megatron = sum(e.numel * len(e.layers) * e.experts for e in plan.entries)
    hf = sum(prod(tensor.shape) for entry in plan.entries for _, tensor in entry.hf_names())
    if hf + padding != megatron:
        raise CoverageError("the two sides differ in elements", expected=f"{hf} + {padding} padding", got=megatron)
    counted = hf + sum(prod(plan.hf_tensors[name]) for name in plan.written_copies) + sum(map(prod, beyond.values()))
    return Audit(len(plan.hf_tensors) + len(beyond), len(plan.megatron_tensors), counted, padding, ignored)


def _check_cuts(plan: Plan, name: str) -> None:
    """The regions that tensor-parallel ranks hold tile the tensor."""
    entry = plan.entry(name)
    size = 1 if entry.split is None else plan.layout.etp if entry.is_expert else plan.layout.tp
    boxes = [box for rank in range(size) for box, _ in plan.local_form(name, rank).blocks]
    if error := tiling_error(entry.shape, [_as_view(box, entry.shape) for box in boxes]):
        raise CoverageError("tensor-parallel shards do not tile a tensor", where=name, got=error)


def _as_view(box: Box, shape: Shape) -> tuple[Shape, View]:
    strides = row_major(shape)
    return box.shape, View("", sum(i * s for i, s in zip(box.start, strides, strict=True)), strides)


def _check_placement(plan: Plan, name: str) -> None:
    """Every layer is on one pipeline stage; the ends of the model are on at least one."""
    entry = plan.entry(name)
    held = Counter(layer for stage in plan.placement.stages for layer in plan.layers_of(entry, stage))
    if entry.has_layer and (held != Counter(entry.layers)):
        wrong = sorted(set(entry.layers) ^ set(held)) or [layer for layer, n in held.items() if n > 1]
        raise CoverageError("layers are not each on one pipeline stage", where=name, got=f"layers {preview(wrong)}")
    if not held:
        raise CoverageError("no pipeline stage holds a tensor", where=name)
    placed = [expert for ep in range(plan.layout.ep) for expert in plan.experts_of(entry, ep)]
    if entry.is_expert and placed != list(range(entry.experts)):
        raise CoverageError("experts are not each on one rank", where=name, expected=entry.experts, got=len(placed))


def _check_names(plan: Plan) -> None:
    """No tensor is explained by two rows."""
    for side, count, names in (
        ("HF", sum(1 for e in plan.entries for _ in e.hf_names()) + len(plan.written_copies), plan.hf_tensors),
        ("Megatron", sum(len(e.layers) * e.experts for e in plan.entries), plan.megatron_tensors),
    ):
        if count != len(names):
            raise CoverageError(
                f"two rows of the {plan.family.name} table explain the same {side} tensor",
                expected=f"{count} different names",
                got=len(names),
            )


def compare(plan: Plan, inventory: Mapping[str, Shape]) -> tuple[str, ...]:
    """Raise unless an HF inventory is what the plan expects; the tensors ignored by name come back."""
    expected = plan.hf_tensors
    if plan.stores(inventory):
        expected = {name: shape for name, shape in expected.items() if name not in plan.quantised} | plan.parts
    missing = [name for name in expected if name not in inventory and name not in plan.copies]
    extra = [name for name in inventory if name not in expected and name not in plan.copies]
    no_weights = plan.family.ignored
    ignored = [n for n in extra if plan.ignores(n) or any(match(pattern, n) is not None for pattern in no_weights)]
    known = set(ignored)
    unexpected = [name for name in extra if name not in known]
    if kept := [name for name in inventory if name in expected and plan.ignores(name)]:
        raise CoverageError(
            "a tensor was to be left out that the model cannot do without",
            where=preview(kept),
            expected="patterns that name a kind of tensor on all of its layers, or none",
            got=f"ignore={', '.join(plan.ignore)}",
            fix="leave out whole parts, such as mtp.* or model.visual.*",
        )
    if missing or unexpected:
        raise CoverageError(
            f"the HF checkpoint does not hold the tensors that a {plan.family.name} model with this config.json has",
            where=preview([*missing, *unexpected]),
            expected=f"{len(expected)} tensors; missing {len(missing)}: {preview(missing) or 'none'}",
            got=f"{len(inventory)} tensors; unexpected {len(unexpected)}: {preview(unexpected) or 'none'}",
            fix="check that config.json belongs to these weights and that no shard file is missing",
        )
    expected = expected | {name: plan.hf_tensors[copy.of] for name, copy in plan.copies.items() if name in inventory}
    wrong = [name for name, shape in expected.items() if tuple(inventory.get(name, shape)) != tuple(shape)]
    if wrong:
        first = wrong[0]
        raise CoverageError(
            f"{len(wrong)} tensor(s) of the HF checkpoint have another shape than config.json says",
            where=preview(wrong),
            expected=f"{first}: {tuple(expected[first])}",
            got=f"{first}: {tuple(inventory[first])}",
            fix="check hidden size, heads, experts and vocabulary in config.json against the weights",
        )
    return tuple(ignored)

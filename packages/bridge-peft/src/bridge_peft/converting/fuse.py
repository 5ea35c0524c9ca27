"""The factors of a Megatron layer taken apart into those of its HF weights, and joined again.

Shape legend: E experts (a dim that only layers of experts have; 1 where all share a factor), r rank, in and out
those of the layer, rows those of one HF weight.

Taking apart is a permutation: every HF weight gets all of A [E, r, in] and its rows of B. Joining is the way back
where all of a layer's HF weights have the same A. Where they differ, the layer gets all ranks, one after the
other: A = [A_q; A_k; A_v], and B has the rows of q in the columns of A_q and zeros elsewhere, and so on. B A is
then the same sum with zeros added, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, sqrt
from typing import TYPE_CHECKING

import torch

from bridge_core.errors import CheckpointError, ConfigError
from bridge_peft.converting.bases import Base
from bridge_peft.placement import MAGNITUDE, A, B
from bridge_peft.settings import AdapterSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """The adapter of one HF weight.

    Attributes:
        a: [r, in], or [E, r, in] for a layer of experts.
        b: [rows, r], or [E, rows, r].
        magnitude: [rows] or [E, rows], with DoRA.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """Its rank."""
        return self.a.shape[-2]


def take_apart(base: Base, settings: AdapterSettings, factors: Mapping[str, Tensor]) -> dict[int, Pair]:
    """The adapter of each HF weight of a layer, by its place in `base.parts`; canonical ones may lack some.

    Args:
        base: the layer.
        settings: of its adapter.
        factors: whole factors by name, as `placement.factors` has them; meta tensors will do.
    """
    factors = {name: _with_expert(base, name, value) for name, value in factors.items()}
    canonical = [part.name for part in base.linear.parts]
    if settings.parts and len(base.parts) != len(canonical):  # HF has the parts in one weight, so in one pair
        settings, factors = _one_pair(base, settings, factors)
    found: dict[int, Pair] = {}
    for number, part in enumerate(base.parts):
        rows = _index(part.rows, next(iter(factors.values())))
        magnitude = factors.get(MAGNITUDE)
        magnitude = None if magnitude is None else magnitude.index_select(-1, rows)
        if not settings.parts:
            found[number] = Pair(factors[A], factors[B].index_select(-2, rows), magnitude)
        elif (name := canonical[number]) in settings.parts:
            order = _index(part.rows.argsort().argsort(), rows)
            found[number] = Pair(factors[f"{A}_{name}"], factors[f"{B}_{name}"].index_select(-2, order), magnitude)
    return found


def _with_expert(base: Base, name: str, value: Tensor) -> Tensor:
    """A factor of a layer of experts with its first dim, also if all experts share it."""
    matrix = 1 if name == MAGNITUDE else 2
    return value.unsqueeze(0) if base.is_expert and value.dim() == matrix else value


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(rows, device=like.device)


def _one_pair(
    base: Base, settings: AdapterSettings, factors: Mapping[str, Tensor]
) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """A canonical adapter as one of rank r times the number of its parts."""
    groups = {part.name: part for part in base.linear.parts}
    slots = _canonical_rows(base)
    pairs = [(factors[f"{A}_{name}"], factors[f"{B}_{name}"], slots[name]) for name in settings.parts]
    a, b = _side_by_side(pairs, sum(part.rows for part in groups.values()))
    rest = {MAGNITUDE: factors[MAGNITUDE]} if MAGNITUDE in factors else {}
    joined = replace(settings, r=a.shape[-2], alpha=_alpha(settings.scaling, a.shape[-2], settings.rslora), parts=())
    return joined, {A: a, B: b, **rest}


def _canonical_rows(base: Base) -> dict[str, Tensor]:
    """The layer's rows of each of its canonical parts, which are dealt group by group."""
    rows: dict[str, list[Tensor]] = {part.name: [] for part in base.linear.parts}
    at = 0
    for _ in range(max(part.groups for part in base.linear.parts)):
        for part in base.linear.parts:
            count = part.rows // part.groups
            rows[part.name].append(torch.arange(at, at + count))
            at += count
    return {name: torch.cat(found) for name, found in rows.items()}


def _side_by_side(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], out: int) -> tuple[Tensor, Tensor]:
    """Pairs (A, B, rows) of one layer as one pair: ranks one after the other, B block by block."""
    lead = max((tuple(x.shape[:-2]) for a, b, _ in pairs for x in (a, b)), key=lambda shape: (len(shape), shape))
    a = torch.cat([a.expand(*lead, *a.shape[-2:]) for a, _, _ in pairs], dim=-2)
    b = pairs[0][1].new_zeros(*lead, out, a.shape[-2])
    at = 0
    for part_a, part_b, rows in pairs:
        r = part_a.shape[-2]
        if not b.is_meta:
            b[..., rows.to(b.device), at : at + r] = part_b
        at += r
    return a, b


def _alpha(scale: float, r: int, rslora: bool) -> float:
    """The alpha that gives a scaling at a rank."""
    return scale * (sqrt(r) if rslora else r)


def join(
    base: Base, found: Mapping[int, tuple[AdapterSettings, Pair]], *, where: str, canonical: bool = False
) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """The adapter of a layer from those of its HF weights.

    Args:
        base: the layer.
        found: settings and factors by the weight's place in `base.parts`; weights that are not adapted are missing.
        where: name of the layer, for messages.
        canonical: keep the parts of a fused layer apart instead of putting their ranks side by side.

    Returns:
        Settings of the layer's adapter, and its whole factors by name.

    Raises:
        CheckpointError: the parts of one layer cannot be one adapter.
    """
    _check_alike(base, found, where)
    first, pair = next(iter(found.values()))
    whole = len(found) == len(base.parts)
    magnitude = _magnitude(base, found, where)
    out = base.linear.out_features
    same = all(settings == first and torch.equal(other.a, pair.a) for settings, other in list(found.values())[1:])
    if canonical and len(base.linear.parts) == len(base.parts) > 1:
        return _canonical(base, found, magnitude, where)
    if same and whole:
        b = pair.b.new_zeros(*pair.b.shape[:-2], out, pair.r)
        for number, (_, other) in found.items():
            b[..., torch.as_tensor(base.parts[number].rows), :] = other.b
        return first, {A: pair.a, B: b, **magnitude}
    pairs = [
        (other.a, _rescaled(other.b, settings.scaling, first.scaling), torch.as_tensor(base.parts[number].rows))
        for number, (settings, other) in sorted(found.items())
    ]
    a, b = _side_by_side(pairs, out)
    joined = replace(first, r=a.shape[-2], alpha=_alpha(first.scaling, a.shape[-2], first.rslora))
    return joined, {A: a.contiguous(), B: b, **magnitude}


def _rescaled(b: Tensor, own: float, wanted: float) -> Tensor:
    """B under another scaling, so that the product stays; rounded once, unless the ratio is a power of two."""
    return b if isclose(own, wanted, rel_tol=1e-12) else (b.double() * (own / wanted)).to(b.dtype)


def _canonical(
    base: Base, found: Mapping[int, tuple[AdapterSettings, Pair]], magnitude: dict[str, Tensor], where: str
) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """One pair for each part. They have one rank: smaller ones are filled up with zeros."""
    first = next(iter(found.values()))[0]
    r = max(pair.r for _, pair in found.values())
    factors: dict[str, Tensor] = {}
    names: list[str] = []
    for number, (settings, pair) in sorted(found.items()):
        name = base.linear.parts[number].name
        names.append(name)
        own = torch.as_tensor(base.parts[number].rows.argsort())
        b = _rescaled(pair.b, settings.scaling, first.scaling).index_select(-2, own)
        factors[f"{A}_{name}"] = torch.nn.functional.pad(pair.a, (0, 0, 0, r - pair.r))
        factors[f"{B}_{name}"] = torch.nn.functional.pad(b, (0, r - pair.r))
    alpha = first.alpha if r == first.r else _alpha(first.scaling, r, first.rslora)
    return replace(first, r=r, alpha=alpha, parts=tuple(names)), factors | magnitude


def _magnitude(base: Base, found: Mapping[int, tuple[AdapterSettings, Pair]], where: str) -> dict[str, Tensor]:
    given = {number: pair.magnitude for number, (_, pair) in found.items() if pair.magnitude is not None}
    if not given:
        return {}
    if len(given) != len(base.parts):
        lacking = [part.module for number, part in enumerate(base.parts) if number not in given]
        raise CheckpointError(
            "a fused layer has magnitudes for a part of its rows only",
            where=where,
            expected=f"DoRA on all of {', '.join(part.module for part in base.parts)}",
            got=f"none for {', '.join(lacking)}",
            fix="train with all of them, or merge the adapter into the HF model",
        )
    some = next(iter(given.values()))
    whole = some.new_zeros(*some.shape[:-1], base.linear.out_features)
    for number, value in given.items():
        whole[..., torch.as_tensor(base.parts[number].rows)] = value
    return {MAGNITUDE: whole}


def _check_alike(base: Base, found: Mapping[int, tuple[AdapterSettings, Pair]], where: str) -> None:
    dtypes = {str(tensor.dtype) for _, pair in found.values() for tensor in (pair.a, pair.b)}
    if len(dtypes) > 1:
        raise CheckpointError(
            "the factors of one layer differ in dtype", where=where, expected="one dtype", got=", ".join(sorted(dtypes))
        )
    for number, (settings, pair) in found.items():
        rows, within = len(base.parts[number].rows), base.linear.in_features
        shapes = {"lora_A": tuple(pair.a.shape[-2:]), "lora_B": tuple(pair.b.shape[-2:])}
        wanted = {"lora_A": (settings.r, within), "lora_B": (rows, settings.r)}
        for name, shape in shapes.items():
            if shape != wanted[name]:
                raise CheckpointError(
                    "a factor has another shape than the model and the adapter's settings say",
                    where=f"{where}: {name} of {base.parts[number].module}",
                    expected=wanted[name],
                    got=shape,
                    fix="check that the adapter belongs to this model, and its rank in its configuration",
                )


def check_rank(settings: AdapterSettings, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse factors whose rank is not the one that the settings say.

    Raises:
        ConfigError: says both.
    """
    for name, shape in shapes.items():
        if name == MAGNITUDE:
            continue
        r = shape[-2] if name.startswith(A) else shape[-1]
        if r != settings.r:
            raise ConfigError(
                "the rank of an adapter's tensors is not the one that its configuration says",
                where=f"{where}: {name}",
                expected=f"r={settings.r}",
                got=f"r={r}, shape {shape}",
                fix="correct the configuration, or give r (--r) by hand",
            )

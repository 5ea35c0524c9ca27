"""Whether a quantised checkpoint is what it says: its configuration, its scales, and its weights against another's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_quant_export.configs.layers import fused_name
from bridge_quant_export.errors import FormatError
from bridge_quant_export.folders.open import QuantizedFolder, open_quantized
from bridge_quant_export.folders.values import Values
from bridge_quant_export.readers import READERS


@dataclass(frozen=True)
class LayerError:
    """How far a quantised weight is from the one that it was made of.

    Attributes:
        module: HF name.
        format: its name.
        relative: norm of the difference, relative to the norm of the weight.
        largest: largest difference, relative to the largest weight.
    """

    module: str
    format: str
    relative: float
    largest: float


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        wrong: contradictions; empty if there are none.
        errors: of every quantised weight, where there was another checkpoint to compare with.
        unquantized: tensors that are compared as they are.
    """

    wrong: tuple[str, ...]
    errors: tuple[LayerError, ...]
    unquantized: int

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts anything."""
        return not self.wrong


def verify_quantized(path: str | Path, original: str | Path | None = None, *, tolerance: float = 0.3) -> Verification:
    """Check a quantised checkpoint folder, alone or against the one it was made of. One tensor at a time in memory.

    Args:
        path: the folder.
        original: the same model, unquantised; or packed otherwise, which is read dequantised.
        tolerance: relative error of a weight above which it is another weight: 0.3 lies well above what four bits
            cost, and well below two matrices that have nothing to do with each other.

    Raises:
        BridgeError: a folder cannot be read, or is quantised in a way that is not known here.
    """
    found = open_quantized(path)
    wrong = list(found.wrong)
    errors: list[LayerError] = []
    count = 0
    with Values() as values:
        sound = [module for module in found.layers.quantized if not _broken(found, module)]
        wrong += _check_scales(found, values, sound)
        wrong += _check_shared(found, values, sound)
        if original is not None:
            other = open_hf(original)
            for module in sound:
                if f"{module}.weight" not in other.tensors:
                    wrong.append(f"{module}.weight is not in the original")
                    continue
                errors.append(_error(found, values, module, other))
            wrong += [
                f"{e.module} is {e.relative:.3f} away from the original" for e in errors if not e.relative <= tolerance
            ]
            differing, count = _compare_rest(found, values, other)
            wrong += differing
    return Verification(tuple(wrong), tuple(errors), count)


def _broken(found: QuantizedFolder, module: str) -> bool:
    """Whether tensors of a module are missing or misshapen, which is told already."""
    if module not in found.shapes:
        return True
    try:
        specs = found.stored_of(module)
    except FormatError:
        return True
    held = [found.folder.tensors.get(f"{module}.{spec.suffix}") for spec in specs]
    return any(
        tensor is None or (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape)
        for tensor, spec in zip(held, specs, strict=True)
    )


def _check_scales(found: QuantizedFolder, values: Values, modules: list[str]) -> Iterator[str]:
    """Scales are finite, and none of them is zero or negative."""
    names = [
        f"{module}.{spec.suffix}"
        for module in modules
        for spec in found.stored_of(module)
        if "scale" in spec.suffix and spec.dtype != "U8"  # exponents alone: any byte is a scale but the last
    ]
    for name in (*names, *found.kv_scales):
        scale = values.tensor(found.folder, name).float()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            yield f"{name} is not finite and positive: {scale.min().item():g} to {scale.max().item():g}"


def _check_shared(found: QuantizedFolder, values: Values, modules: list[str]) -> Iterator[str]:
    """What a reader needs to be equal in layers that it fuses is equal."""
    first: dict[tuple[str, str], tuple[str, float]] = {}
    for module in modules:
        format = found.layers.quantized[module]
        needs = [reader.reads.get((found.writer, format.name)) for reader in READERS.values()]
        for suffix in sorted({suffix for need in needs if need is not None for suffix in need.shared}):
            if f"{module}.{suffix}" not in found.folder.tensors:
                continue
            value = values.tensor(found.folder, f"{module}.{suffix}").float().max().item()
            other, known = first.setdefault((fused_name(module), suffix), (module, value))
            if known != value:
                yield f"{module}.{suffix} is {value:g}, {other}'s is {known:g}; engines fuse them and take one"


def _error(found: QuantizedFolder, values: Values, module: str, other: HfFolder) -> LayerError:
    wanted = values.tensor(other, f"{module}.weight").float()
    made = values.weight(found, module)
    if made.shape != wanted.shape:
        return LayerError(module, found.layers.quantized[module].name, float("inf"), float("inf"))
    off = made - wanted
    relative = (off.norm() / wanted.norm().clamp(min=1e-30)).item()
    largest = (off.abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
    return LayerError(module, found.layers.quantized[module].name, relative, largest)


def _compare_rest(found: QuantizedFolder, values: Values, other: HfFolder) -> tuple[list[str], int]:
    """Tensors that are not quantised have the values of the original, rounded to the dtype that they have here."""
    packed = {f"{module}.{spec.suffix}" for module in found.shapes for spec in found.stored_of(module)}
    plain = [name for name in found.folder.tensors if name not in packed and name not in found.kv_scales]
    wrong = []
    for name in plain:
        if name not in other.tensors:
            wrong.append(f"{name} is not in the original")
            continue
        mine, theirs = values.tensor(found.folder, name), values.tensor(other, name)
        if mine.shape != theirs.shape or not torch.equal(mine, theirs.to(mine.dtype)):
            wrong.append(f"{name} differs from the original")
    made = {f"{module}.weight" for module in found.shapes}
    wrong += [f"{name} of the original is missing" for name in other.tensors if name not in {*plain, *made}]
    return wrong, len(plain)

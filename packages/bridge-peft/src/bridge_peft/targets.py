"""Which modules a configuration means, by their names in the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bridge_core.errors import ConfigError, preview
from bridge_peft.config import ALL_LINEAR, LoraConfig, pattern_key

# Parts of fused linears under the names that canonical adapters have in Megatron-Bridge, and in Hugging Face models.
_PARTS = {
    "linear_q": ("linear_qkv", "q"),
    "linear_k": ("linear_qkv", "k"),
    "linear_v": ("linear_qkv", "v"),
    "linear_fc1_gate": ("linear_fc1", "gate"),
    "linear_fc1_up": ("linear_fc1", "up"),
    "q_proj": ("linear_qkv", "q"),
    "k_proj": ("linear_qkv", "k"),
    "v_proj": ("linear_qkv", "v"),
    "gate_proj": ("linear_fc1", "gate"),
    "up_proj": ("linear_fc1", "up"),
}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Matches:
    """What the patterns of a configuration found among some names.

    Attributes:
        parts: module -> parts of it to adapt; no parts means the whole module.
        used: patterns that fitted some name, as (field of the configuration, pattern).
    """

    parts: Mapping[str, tuple[str, ...]]
    used: frozenset[tuple[str, str]]


def match(config: LoraConfig, names: Mapping[str, Sequence[str]]) -> Matches:
    """Find the modules that a configuration means.

    Args:
        config: its `target_modules`, `exclude_modules`, `layers_to_transform` and the two pattern fields.
        names: module that can be adapted -> names of the parts of it, in order; none if it is not fused.
    """
    used: set[tuple[str, str]] = set()
    found: dict[str, tuple[str, ...]] = {}
    for name, parts in names.items():
        wanted: set[str] = set()
        whole = False
        for pattern in _patterns(config.target_modules):
            part = _part(config, pattern, name, parts)
            if part is None and not _fits(config.target_modules, pattern, name):
                continue
            used.add(("target_modules", pattern))
            whole, wanted = whole or part is None, wanted | ({part} if part else set())
        if not (whole or wanted) or not _in_layers(config, name):
            continue
        excluded = [p for p in _patterns(config.exclude_modules) if _fits(config.exclude_modules, p, name)]
        used.update(("exclude_modules", pattern) for pattern in excluded)
        if not excluded:
            canonical = tuple(part for part in parts if whole or part in wanted)
            found[name] = canonical if config.variant == "canonical" else ()
    for fieldname in ("rank_pattern", "alpha_pattern"):
        keys = {pattern_key(getattr(config, fieldname), name) for name in found}
        used.update((fieldname, key) for key in keys if key is not None)
    return Matches(found, frozenset(used))


def check_used(config: LoraConfig, used: Iterable[tuple[str, str]], names: Iterable[str]) -> None:
    """Refuse a configuration with a pattern that fits no module of the model.

    Args:
        used: patterns that fitted something on any rank.
        names: modules that can be adapted, to be shown.
    """
    fields = {
        "target_modules": _patterns(config.target_modules),
        "exclude_modules": _patterns(config.exclude_modules),
        "rank_pattern": tuple(config.rank_pattern),
        "alpha_pattern": tuple(config.alpha_pattern),
    }
    unused = [(name, pattern) for name, patterns in fields.items() for pattern in patterns]
    unused = [entry for entry in unused if entry not in set(used)]
    if not unused:
        return
    fieldname, pattern = unused[0]
    hint = "see the names above; layers and experts are numbered as in the whole model"
    if pattern in _PARTS and config.variant != "canonical":
        hint = f'{pattern} is a part of {_PARTS[pattern][0]}: take that, or variant="canonical"'
    raise ConfigError(
        "a pattern fits no module that can be adapted",
        where=", ".join(f"{name}: {text!r}" for name, text in unused),
        expected=f"the end of one of {preview(sorted({_short(name) for name in names}), limit=12) or 'no modules'}",
        got=f"{fieldname}={pattern!r}",
        fix=hint,
    )


def _patterns(value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _fits(value: object, pattern: str, name: str) -> bool:
    """PEFT's rule: a list holds ends of names, a single string is a regular expression for the whole name."""
    if pattern == ALL_LINEAR:
        return name.rpartition(".")[2] != "output_layer"
    if any(sign in pattern for sign in "*?[") and not isinstance(value, str):
        return fnmatchcase(name, pattern)
    if isinstance(value, str) and name.rpartition(".")[2] != pattern:
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error:
            return fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def _part(config: LoraConfig, pattern: str, name: str, parts: Sequence[str]) -> str | None:
    """The part of module `name` that a pattern names, in a canonical configuration."""
    if config.variant != "canonical":
        return None
    head, _, leaf = pattern.rpartition(".")
    fused, part = _PARTS.get(leaf, ("", ""))
    whole = f"{head}.{fused}" if head else fused
    return part if part in parts and _fits((), whole, name) else None


def _in_layers(config: LoraConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None:
        return True
    found = _LAYER.search(name)
    return found is not None and int(found[1]) in layers  # type: ignore[operator]


def _short(name: str) -> str:
    """A name without the number of its layer, so that a message lists every kind of module once."""
    return _LAYER.sub(".layers.*.", name)

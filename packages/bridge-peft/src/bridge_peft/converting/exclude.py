"""Layers left out by the beginning of their Megatron name."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence


def excluded_by(name: str, prefixes: Sequence[str]) -> str | None:
    """The first of `prefixes` that a Megatron name begins with."""
    return next((prefix for prefix in prefixes if name.startswith(prefix)), None)


def warn_unused(prefixes: Sequence[str], used: Collection[str]) -> None:
    """Warn of prefixes that no adapted layer begins with: a misspelt one leaves in what was to go."""
    if unused := [prefix for prefix in prefixes if prefix not in used]:
        warnings.warn(
            f"no adapted layer begins with {', '.join(map(repr, unused))}; names are Megatron's, such as "
            "decoder.layers.0.mlp.linear_fc1",
            stacklevel=4,
        )

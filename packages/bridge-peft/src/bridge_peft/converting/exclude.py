"""What an export warns of: layers left out by name, and bases that an adapter does not go with as they were."""

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


def warn_changed_base() -> None:
    """Warn of an adapter that is none for the model that its training started from."""
    warnings.warn(
        "the adapter's first values were taken out of the base weights (pissa, olora, svdquant_weight): it belongs to "
        "the base as it was trained; save that too (AutoBridge.save_hf_pretrained)",
        stacklevel=4,
    )

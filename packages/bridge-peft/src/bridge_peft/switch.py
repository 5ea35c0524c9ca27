"""Several named adapters on one model: which take part, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge_peft.apply import adapters_named


def set_adapter(model: Any, names: str | Sequence[str]) -> None:
    """Let these adapters take part in the forward and be trained; all others neither.

    Several take part together: their updates are added. Before DDP is made: it looks once at what is trained.

    Raises:
        ConfigError: the model has no adapter of that name.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for adapters in adapters_named(model, wanted):
        adapters.active = tuple(name for name in wanted if name in adapters)
        for name, adapter in adapters.items():
            for parameter in adapter.parameters():
                parameter.requires_grad_(name in wanted)


def disable_adapters(model: Any) -> None:
    """Let the model compute what its base computes, until `enable_adapters`."""
    for adapters in adapters_named(model, ()):
        adapters.enabled = False


def enable_adapters(model: Any) -> None:
    """Undo `disable_adapters`: the active adapters take part again."""
    for adapters in adapters_named(model, ()):
        adapters.enabled = True


def delete_adapter(model: Any, name: str) -> None:
    """Take one adapter off all layers; a layer without adapters is as it was before the first.

    Raises:
        ConfigError: the model has no adapter of that name.
    """
    from bridge_peft.layers.attach import detach

    for adapters in adapters_named(model, (name,)):
        if name in adapters:
            del adapters[name]
            adapters.active = tuple(other for other in adapters.active if other != name)
        if not len(adapters):
            detach(adapters.site)

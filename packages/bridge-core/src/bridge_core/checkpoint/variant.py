"""How the Megatron side of a conversion is arranged, where that is not as the model's family has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_core.families import Family, Fields


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model under other Megatron names: as a part of a larger one, say.

    Attributes:
        family: from the family and the Megatron fields of a model to the family under whose names its weights lie
            (`plan.scoped`). The third argument is the folder of the iteration that is read; None for an import.
        sections: what run_config.yaml is to say of it, by section.
        from_source: patterns (as in a shell) of HF names that an export takes from its `source` where the checkpoint
            does not hold them.
    """

    family: Callable[[Family, Fields, Path | None], Family]
    sections: Callable[[Family, Fields], Mapping[str, Any]] = lambda family, fields: {}
    from_source: tuple[str, ...] = ()


PLAIN = Variant(family=lambda family, fields, folder: family)
"""As the family has it."""

"""What a MIMO checkpoint says of its components: a section of `run_config.yaml`, plain data.

With the family and the Megatron fields, which bridge-core's section records, it is all that the model is built from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge_core.checkpoint.run_config import RUN_CONFIG, read_run_config
from bridge_core.checkpoint.variant import Variant
from bridge_core.errors import BridgeError, CheckpointError
from bridge_core.families import Family, Fields
from bridge_mimo.components import Components, MIMOComponent
from bridge_mimo.layout import ComponentLayout, Layouts
from bridge_mimo.plan import MimoPlan

SECTION = "bridge_mimo"


class Stored(NamedTuple):
    """What a checkpoint says of its components.

    Attributes:
        routes: where tensors lie in `MimoModel`.
        layouts: of the run that it was made for, by component; empty if that is not known. It loads in any other.
        colocated: whether all components were on the same ranks.
        hf_towers: components whose towers are HF's own.
    """

    routes: tuple[MIMOComponent, ...]
    layouts: dict[str, ComponentLayout]
    colocated: bool
    hf_towers: tuple[str, ...]


def components_section(components: Components, layouts: Layouts, *, colocated: bool) -> dict[str, Any]:
    """The section, to be written."""
    routes = [[route.name, route.source_prefix, route.target_module_path] for route in components.routes]
    written = {name: layout.to_dict() for name, layout in layouts.items()}
    section = {"routes": routes, "components": written, "colocated": colocated}
    return {SECTION: section | {"hf_towers": list(components.hf_towers)}}


def stored_components(folder: Path) -> Stored | None:
    """The section of a checkpoint's folder (an iteration's, or its run's); None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = next((f / RUN_CONFIG for f in (folder, folder.parent) if (f / RUN_CONFIG).exists()), None)
    section = read_run_config(path).get(SECTION) if path else None
    if section is None:
        return None
    try:
        return Stored(
            tuple(MIMOComponent(*(str(part) for part in route)) for route in section["routes"]),
            {name: ComponentLayout(**options) for name, options in section["components"].items()},
            bool(section["colocated"]),
            tuple(str(name) for name in section.get("hf_towers", ())),
        )
    except (TypeError, KeyError, AttributeError, BridgeError) as error:
        raise CheckpointError(
            "the checkpoint's section of components is damaged",
            where=f"{path}: {SECTION}",
            expected="routes (name, prefix, module), components (layout by name) and colocated",
            got=f"{type(error).__name__}: {error}",
            fix="copy the file again, or import the checkpoint again",
        ) from error


def mimo_variant(layouts: Layouts | None = None, *, colocated: bool = False, hf_towers: Sequence[str] = ()) -> Variant:
    """How core's conversions are told of components.

    Args:
        layouts: filled in. They have to fit the model; an import records them.
        colocated: whether all components are on the same ranks.
        hf_towers: components whose towers are HF's own; a checkpoint that is read says so itself.
    """

    def components(family: Family, fields: Fields, folder: Path | None) -> Components:
        stored = stored_components(folder) if folder else None
        if stored is None:
            found = Components.of(family, fields, hf_towers=hf_towers)
        else:
            found = Components.of(family, fields, stored.routes, hf_towers=stored.hf_towers)
        if layouts is not None:
            # Layouts that do not fit are refused before a byte is written.
            MimoPlan(found, layouts, colocated=colocated)
        return found

    def sections(family: Family, fields: Fields) -> Mapping[str, Any]:
        return components_section(components(family, fields, None), layouts or {}, colocated=colocated)

    return Variant(
        family=lambda family, fields, folder: components(family, fields, folder).whole,
        sections=sections,
        from_source=("mtp.*",),
    )

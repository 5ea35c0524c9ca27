"""`bridge-core inspect`: what a checkpoint folder holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bridge_core.cli.tables import facts, in_bytes, in_count, table

if TYPE_CHECKING:
    from bridge_core.checkpoint.inspect import Description


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe an HF or Megatron checkpoint folder from its headers; no tensor data is read."""

    path: Annotated[Path, "An HF folder, or a Megatron one (a run or one iteration)."]
    json: Annotated[bool, "Print the description as JSON."] = False

    def run(self) -> int:
        """Describe."""
        from bridge_core.checkpoint.inspect import inspect

        found = inspect(self.path)
        print(json.dumps(found.to_dict()) if self.json else _text(found))
        return 0


def _text(found: Description) -> str:
    held = sum(found.files.values())
    layout = {"hf": "HF safetensors", "megatron": "Megatron torch_dist"}[found.kind]
    head = facts([
        ("folder", found.path),
        ("kind", f"{layout}, {found.form}" if found.form else layout),
        ("family", found.family or "unknown"),
        ("note", found.note),
        ("quantised", found.quantised),
        ("weights", f"{in_count(found.parameters)} parameters, {in_bytes(found.nbytes)}"),
        ("dtypes", ", ".join(f"{dtype} {in_count(count)}" for dtype, count in found.dtypes.items())),
        ("files", f"{len(found.files)}, {in_bytes(held)}"),
        ("training state", ", ".join(f"{name} ({count})" for name, count in found.training_state.items())),
    ])  # fmt: skip
    rows = [(p.name, p.tensors, p.dtype, list(p.shape), in_bytes(p.nbytes)) for p in found.tensors]
    return f"{head}\n\n{table(['name', 'tensors', 'dtype', 'shape', 'bytes'], rows, right=('tensors', 'bytes'))}"

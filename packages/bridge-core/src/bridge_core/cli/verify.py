"""`bridge-core verify`: whether two checkpoints hold the same tensors."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bridge_core.cli.progress import bar
from bridge_core.cli.tables import facts, in_bytes
from bridge_core.errors import preview

if TYPE_CHECKING:
    from bridge_core.checkpoint.variant import Variant
    from bridge_core.checkpoint.verify import Comparison


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare two checkpoint folders, HF or Megatron, by names, shapes, dtypes and content.

    The exit code is 1 if they differ.
    """

    a: Annotated[Path, "An HF folder, or a Megatron one."]
    b: Annotated[Path, "Another one, of either kind."]
    names: Annotated[tuple[str, ...], "Patterns of HF names, as in a shell; everything is compared if not given."] = ()
    limit: Annotated[int, "How many differences of each kind to name."] = 5
    threads: Annotated[int, "Tensors compared at a time."] = 2
    json: Annotated[bool, "Print the result as JSON."] = False

    def run(self) -> int:
        """Compare, report; 1 if the two differ."""
        from bridge_core.checkpoint.verify import verify

        started = time.perf_counter()
        with bar("verify") as shown:
            found = verify(
                self.a,
                self.b,
                names=self.names,
                limit=self.limit,
                threads=self.threads,
                progress=shown.progress,
                on_total=shown.on_total,
                variant=self.variant(),
            )
        seconds = time.perf_counter() - started
        print(json.dumps(found.to_dict()) if self.json else _text(found, seconds))
        return 0 if found.ok else 1

    def variant(self) -> Variant:
        """How the tensors of Megatron folders are arranged; for commands that build on this one."""
        from bridge_core.checkpoint.variant import PLAIN

        return PLAIN


def _text(found: Comparison, seconds: float) -> str:
    kinds = [{"hf": "HF", "megatron": "Megatron"}[kind] for kind in found.kinds]
    lines = []
    for kind, count in found.counts.items():
        named = [difference for difference in found.differences if difference.kind == kind]
        lines.append(f"\n{count} x {kind}")
        lines += [f"  {difference}" for difference in named]
        lines += [f"  ... ({count - len(named)} more)"] if count > len(named) else []
    head = facts([
        ("verified", "equal" if found.ok else f"{sum(found.counts.values())} tensors differ"),
        ("a", f"{found.a} ({kinds[0]})"),
        ("b", f"{found.b} ({kinds[1]})"),
        ("compared", f"{found.tensors} tensors, {in_bytes(found.nbytes)}, to the bit, in {seconds:.2f} s"),
        ("left out", preview(f"{name} ({reason})" for name, reason in found.ignored.items())),
    ])  # fmt: skip
    return "\n".join([head, *lines])

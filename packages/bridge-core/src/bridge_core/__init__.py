"""Hugging Face <-> Megatron-Core: conversions that are planned, audited and bit-exact.

The names below are loaded on first use: importing this package needs neither torch nor megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.extras import late

if TYPE_CHECKING:
    from bridge_core.bridge import AutoBridge as AutoBridge
    from bridge_core.checkpoint.convert import export_ckpt as export_ckpt
    from bridge_core.checkpoint.convert import import_ckpt as import_ckpt
    from bridge_core.checkpoint.verify import verify as verify
    from bridge_core.errors import BridgeError as BridgeError
    from bridge_core.families import Family as Family
    from bridge_core.geometry import Box as Box
    from bridge_core.geometry import Piece as Piece
    from bridge_core.geometry import View as View
    from bridge_core.plan import Plan as Plan
    from bridge_core.topology import ParallelLayout as ParallelLayout

__version__ = "0.1.0"

_HOME = {
    "AutoBridge": "bridge",
    "BridgeError": "errors",
    "Box": "geometry",
    "Family": "families",
    "ParallelLayout": "topology",
    "Piece": "geometry",
    "Plan": "plan",
    "View": "geometry",
    "export_ckpt": "checkpoint.convert",
    "import_ckpt": "checkpoint.convert",
    "verify": "checkpoint.verify",
}
__all__ = [
    "AutoBridge",
    "Box",
    "BridgeError",
    "Family",
    "ParallelLayout",
    "Piece",
    "Plan",
    "View",
    "export_ckpt",
    "import_ckpt",
    "verify",
]


__getattr__, __dir__ = late(__name__, _HOME)

"""Multimodal Megatron models whose components each have their own parallel layout and ranks.

The names below are loaded on first use: importing this package needs neither torch nor megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.extras import late

if TYPE_CHECKING:
    from bridge_mimo.bridge import MegatronMIMOBridge as MegatronMIMOBridge
    from bridge_mimo.components import MIMOComponent as MIMOComponent
    from bridge_mimo.components import register_mimo_conversion_spec as register_mimo_conversion_spec
    from bridge_mimo.layout import ComponentLayout as ComponentLayout
    from bridge_mimo.layout import auto_fill_layout as auto_fill_layout
    from bridge_mimo.plan import MimoPlan as MimoPlan

__version__ = "0.1.0"

_HOME = {
    "ComponentLayout": "layout",
    "MIMOComponent": "components",
    "MegatronMIMOBridge": "bridge",
    "MimoPlan": "plan",
    "auto_fill_layout": "layout",
    "register_mimo_conversion_spec": "components",
}
__all__ = [
    "ComponentLayout",
    "MIMOComponent",
    "MegatronMIMOBridge",
    "MimoPlan",
    "auto_fill_layout",
    "register_mimo_conversion_spec",
]


__getattr__, __dir__ = late(__name__, _HOME)

"""ModelOpt-quantised Megatron-Core models as checkpoints that serving engines load.

Importing this package needs neither torch nor modelopt.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge_quant_export.live.export import ExportReport, export_quantized
    from bridge_quant_export.prepare import prepare_for_modelopt
    from bridge_quant_export.saved.export import SavedReport, export_saved

__version__ = "0.1.0"
__all__ = ["ExportReport", "SavedReport", "export_quantized", "export_saved", "prepare_for_modelopt"]

_AT = {
    "ExportReport": "bridge_quant_export.live.export",
    "export_quantized": "bridge_quant_export.live.export",
    "prepare_for_modelopt": "bridge_quant_export.prepare",
    "SavedReport": "bridge_quant_export.saved.export",
    "export_saved": "bridge_quant_export.saved.export",
}


def __getattr__(name: str) -> Any:
    if name not in _AT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_AT[name]), name)

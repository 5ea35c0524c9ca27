"""ModelOpt-quantised Megatron-Core models as checkpoints that serving engines load.

Importing this package needs neither torch nor modelopt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.extras import late

if TYPE_CHECKING:
    from bridge_quant_export.live.export import ExportReport, export_quantized
    from bridge_quant_export.prepare import prepare_for_modelopt
    from bridge_quant_export.saved.export import SavedReport, export_saved

__version__ = "0.1.0"
__all__ = ["ExportReport", "SavedReport", "export_quantized", "export_saved", "prepare_for_modelopt"]

_HOME = {
    "ExportReport": "live.export",
    "export_quantized": "live.export",
    "prepare_for_modelopt": "prepare",
    "SavedReport": "saved.export",
    "export_saved": "saved.export",
}


__getattr__, __dir__ = late(__name__, _HOME)

"""`python -m bridge_quant_export.cli`."""

from __future__ import annotations

import sys

from bridge_quant_export.cli import main

sys.exit(main())

"""Settings of all tests of bridge-quant-export."""

import sys
from pathlib import Path

import pytest

# Helpers are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("torch", reason="packing needs the extra bridge-quant-export[torch]")

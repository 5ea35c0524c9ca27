"""Settings of all tests of bridge-quant-export."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Helpers are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

# The first example of a property may pay for importing torch; a deadline would blame the property.
settings.register_profile("bridge", deadline=None)
settings.load_profile("bridge")

pytest.importorskip("torch", reason="packing needs the extra bridge-quant-export[torch]")

"""Fixtures and settings of all tests of bridge-core."""

import sys
from pathlib import Path

from hypothesis import settings

# Helpers are imported as `runtime.helpers`, here and in the rank processes, which inherit this path.
sys.path.insert(0, str(Path(__file__).parent))

# The first example of a property may pay for importing torch; a deadline would blame the property.
settings.register_profile("bridge", deadline=None)
settings.load_profile("bridge")

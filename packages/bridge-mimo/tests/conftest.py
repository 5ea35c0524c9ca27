"""Settings of all tests of bridge-mimo."""

import sys
from pathlib import Path

# Jobs are imported by name, here and in the rank processes, which inherit this path.
sys.path.insert(0, str(Path(__file__).parent))

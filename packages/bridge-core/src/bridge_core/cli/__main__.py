"""`python -m bridge_core.cli`, and `torchrun -m bridge_core.cli`."""

import sys

from bridge_core.cli import main

sys.exit(main())

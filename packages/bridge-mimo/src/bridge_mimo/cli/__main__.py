"""`python -m bridge_mimo.cli`."""

import sys

from bridge_mimo.cli import main

if __name__ == "__main__":
    sys.exit(main())

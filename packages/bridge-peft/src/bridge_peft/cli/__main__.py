"""`python -m bridge_peft.cli`."""

import sys

from bridge_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())

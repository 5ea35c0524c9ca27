"""Names source files that have grown past 400 lines. Exit code 1 if one is past 600: split it by idea."""

from __future__ import annotations

import sys
from pathlib import Path

SOFT, HARD = 400, 600


def main() -> int:
    """Print files over the limits, longest first."""
    root = Path(__file__).resolve().parent.parent
    sizes = {
        path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines())
        for path in (root / "packages").rglob("*.py")
    }
    over = sorted(((lines, path) for path, lines in sizes.items() if lines > SOFT), reverse=True)
    for lines, path in over:
        print(f"{lines:5d} lines  {path}")
    return int(any(lines > HARD for lines, _ in over))


if __name__ == "__main__":
    sys.exit(main())

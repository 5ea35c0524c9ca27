"""What every refusal of bad input has in common: a complete message, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_core.errors import BridgeError


def refused(run, *words: str) -> BridgeError:
    """Run, and check that it raises a complete message that holds `words`."""
    with pytest.raises(BridgeError) as caught:
        run()
    error = caught.value
    text = str(error)
    for fact in ("what", "where", "expected", "got", "fix"):
        assert getattr(error, fact) is not None, f"no {fact!r} in:\n{text}"
    for word in words:
        assert word in text, f"{word!r} is not in:\n{text}"
    return error


def left(folder: Path) -> list[str]:
    """What is in a folder, hidden files too; nothing if there is no folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

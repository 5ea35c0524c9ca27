"""The one door to optional dependencies: it names the cure and never hides a broken install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bridge_core.errors import MissingExtraError


def require(module: str, *, extra: str, package: str = "bridge-core") -> Any:
    """Import `module`, or say which extra brings it.

    Args:
        module: dotted name, for example `"megatron.core"`.
        extra: the extra of `package` that installs it.
        package: the distribution whose extra is meant.

    Raises:
        MissingExtraError: the module itself is absent. An import error raised *inside* an installed
            module is passed on untouched: that install is broken, not missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise MissingExtraError(
            f"{module} is not installed",
            fix=f"pip install '{package}[{extra}]'",
        ) from error

"""What is imported late: optional dependencies, by a door that names the cure, and the public names of a package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
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


def late(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose public names are imported when they are first asked for.

    Args:
        package: its `__name__`.
        home: public name to the module inside the package that defines it.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home})

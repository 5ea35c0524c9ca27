"""Every error that the package raises on purpose.

A message answers five questions, one line each and only those that apply: what happened, where,
what was expected, what was found, and what to do about it. The same facts are attributes, so that
a program can act on them without parsing text.
"""

from __future__ import annotations

from collections.abc import Iterable


class BridgeError(Exception):
    """Base of all errors of the bridge packages.

    Args:
        what: one sentence that says what went wrong.
        where: file, tensor, rank or option that it is about.
        expected: what would have been right.
        got: what was found instead.
        fix: what the user can do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.fix = fix
        lines = [what]
        for label, value in (("where", where), ("expected", expected), ("got", got), ("fix", fix)):
            if value is not None:
                lines.append(f"  {label + ':':<10}{value}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between ranks; the keyword-only constructor needs its state restored by hand.
        return _restore, (type(self), dict(self.__dict__), self.args)


def _restore(cls: type[BridgeError], state: dict[str, object], args: tuple[object, ...]) -> BridgeError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class ConfigError(BridgeError, ValueError):
    """A model configuration is unknown, incomplete, or says something that is not translated."""


class LayoutError(BridgeError, ValueError):
    """A parallel layout does not fit the model or the number of ranks."""


class GeometryError(BridgeError, ValueError):
    """A strided copy does not fit its tensors, or copies do not tile a tensor exactly once."""


class CoverageError(BridgeError):
    """Tensors or elements are missing, unexpected, misshapen, or covered more than once."""


class CheckpointError(BridgeError):
    """A checkpoint on disk is missing, truncated, corrupt, or not what its index says."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks for something that is refused: a path that leaves the folder, foreign pickle code."""


class OutputError(BridgeError, OSError):
    """The output cannot be written: folder in use, disk full, no permission."""


class VerificationError(BridgeError):
    """Two checkpoints that should be equal are not."""


class MissingExtraError(BridgeError, ImportError):
    """An optional dependency is needed and is not installed."""


def preview(names: Iterable[object], *, limit: int = 5) -> str:
    """The first `limit` of `names`, one after the other, and how many more there are."""
    items = list(names)
    head = ", ".join(str(item) for item in items[:limit])
    return head if len(items) <= limit else f"{head}, ... ({len(items) - limit} more)"


def check_count(where: str, value: object) -> None:
    """Raise unless an option is a whole number of at least 1.

    Args:
        where: name of the option.
        value: what it was given.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{where} is no positive whole number",
            where=where,
            expected="a whole number of at least 1; bytes are such as 512 * 1024 * 1024",
            got=repr(value),
            fix=f"pass another {where}, or leave it out",
        )

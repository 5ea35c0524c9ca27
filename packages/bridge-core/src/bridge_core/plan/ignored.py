"""Patterns of names to leave out: each must leave out something, because a typing error would leave out nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from bridge_core.errors import ConfigError, preview
from bridge_core.families import Family, Fields
from bridge_core.patterns import fill
from bridge_core.plan.entries import compile_entries

# Parts that some models have and others do not: whoever wants none of them may say so of any model.
_PARTS = ("mtp.", "model.visual.")


def check_ignored(family: Family, fields: Fields, ignore: Sequence[str], names: Iterable[str] = ()) -> None:
    """Raise unless every pattern of `ignore` fits the name of an HF tensor.

    Args:
        family, fields: of the model, with its prediction layers.
        ignore: patterns (as in a shell) of HF names. Those of prediction layers (`mtp.*`) and of a vision tower
            (`model.visual.*`) fit any model.
        names: of tensors that a checkpoint has beside those of the model, which may be left out too.

    Raises:
        ConfigError: names the patterns that fit nothing.
    """
    waiting = [pattern for pattern in ignore if not pattern.startswith(_PARTS)]
    if not waiting:
        return
    known = {name: None for entry in compile_entries(family, fields) for name, _ in entry.hf_names()}
    known |= dict.fromkeys(family.copies(fields)) | dict.fromkeys(fill(name, 0) for name in family.ignored)
    known |= dict.fromkeys(names)
    if unused := [pattern for pattern in waiting if not any(fnmatchcase(name, pattern) for name in known)]:
        raise ConfigError(
            "a pattern of names to leave out fits no tensor",
            where=f"ignore={preview(unused)}",
            expected=f"names such as {preview(known)}",
            got="no such name",
            fix="correct the pattern (as in a shell: * stands for anything), or leave it out",
        )

"""What an export or an import says it did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What an export or an import did.

    Attributes:
        output: the folder.
        layers: adapted Megatron layers.
        tensors: tensors written.
        nbytes: bytes of them.
        read: bytes of tensors that were read from files; 0 where the source is a live model.
        left_out: beginnings of Megatron names that were excluded.
    """

    output: Path
    layers: int
    tensors: int
    nbytes: int
    read: int = 0
    left_out: tuple[str, ...] = ()

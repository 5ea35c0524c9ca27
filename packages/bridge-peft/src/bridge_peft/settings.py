"""What is known of the adapter of a layer besides its factors: a checkpoint has to say it to be readable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bridge_core.errors import CheckpointError
from bridge_peft.config import scaling
from bridge_peft.placement import Sharing


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The adapter of one Megatron layer.

    Attributes:
        r, alpha, rslora: what `scaling` follows from.
        dropout: probability while training.
        dora: whether there is a magnitude per output row.
        parts: parts of a fused layer that a canonical adapter adapts; empty for one pair of factors.
        sharing: what the experts of a layer share.
        changes_base: whether its first values were taken out of the base weight, which is another one since.
    """

    r: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    parts: tuple[str, ...] = ()
    sharing: Sharing = "each"
    changes_base: bool = False

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return scaling(self.alpha, self.r, rslora=self.rslora)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"parts": list(self.parts)}

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, where: object) -> AdapterSettings:
        """The way back of `to_dict`.

        Raises:
            CheckpointError: values are missing, unknown, or of another kind.
        """
        known = {field.name for field in fields(AdapterSettings)}
        whole = isinstance(values, Mapping) and values.keys() <= known and {"r", "alpha"} <= values.keys()
        if not whole or type(values["r"]) is not int or not isinstance(values["alpha"], int | float):
            raise CheckpointError(
                "the settings of an adapter cannot be read",
                where=where,
                expected=f"a mapping of {', '.join(sorted(known))}; r and alpha are numbers",
                got=values,
                fix="save the adapter again, or give its settings by hand (r, alpha, ...)",
            )
        return AdapterSettings(**{**values, "parts": tuple(values.get("parts", ()))})

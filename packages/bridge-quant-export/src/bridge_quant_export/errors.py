"""What can be wrong with a quantised model, beyond what `bridge_core.errors` names."""

from __future__ import annotations

from bridge_core.errors import BridgeError


class FormatError(BridgeError, ValueError):
    """A format is unknown, has no reader in the asked checkpoint format, or does not fit a tensor or a cut."""


class CalibrationError(BridgeError, ValueError):
    """A quantiser's range is missing, zero, not finite, or of the wrong shape."""

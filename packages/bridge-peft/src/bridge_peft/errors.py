"""Errors that bridge-peft adds to those of bridge-core."""

from __future__ import annotations

from bridge_core.errors import CheckpointError


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no such folder, or it lacks the file that makes it an adapter."""

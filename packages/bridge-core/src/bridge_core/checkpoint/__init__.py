"""Checkpoints on disk as readable and writable sources: no model, no process group, no torch."""

"""Checkpoints of multimodal models: torch_dist folders with the names of `MimoModel`."""

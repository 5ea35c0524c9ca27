"""Quantised models as Megatron saved them: quantisers read from a checkpoint, and its export. No model is built."""

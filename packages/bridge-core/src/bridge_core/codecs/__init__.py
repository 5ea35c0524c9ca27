"""Codecs: formats in which one weight of a checkpoint is stored as several tensors that belong together.

Only descriptions live here: names, shapes, and what config.json says. The arithmetic is where bytes are moved.
"""

from bridge_core.codecs.fp8_blocks import Fp8Blocks, codec_of

__all__ = ["Fp8Blocks", "codec_of"]

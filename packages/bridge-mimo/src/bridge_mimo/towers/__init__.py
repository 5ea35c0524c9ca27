"""Encoders of images with their own tensor and pipeline parallelism, as specs for mcore's `MimoModel`.

The names below are loaded on first use: importing this package needs neither torch nor megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.extras import late

if TYPE_CHECKING:
    from bridge_mimo.towers.build import clip_tower_spec as clip_tower_spec
    from bridge_mimo.towers.build import projector_spec as projector_spec
    from bridge_mimo.towers.build import replicated_tower_spec as replicated_tower_spec
    from bridge_mimo.towers.build import tower_spec as tower_spec
    from bridge_mimo.towers.build import vision_modality_spec as vision_modality_spec
    from bridge_mimo.towers.config import TowerSizes as TowerSizes
    from bridge_mimo.towers.config import tower_config as tower_config
    from bridge_mimo.towers.config import tower_sizes as tower_sizes
    from bridge_mimo.towers.deepstack import DeepstackMimoModel as DeepstackMimoModel

_HOME = {
    "DeepstackMimoModel": "deepstack",
    "TowerSizes": "config",
    "clip_tower_spec": "build",
    "projector_spec": "build",
    "replicated_tower_spec": "build",
    "tower_config": "config",
    "tower_sizes": "config",
    "tower_spec": "build",
    "vision_modality_spec": "build",
}
__all__ = [
    "DeepstackMimoModel",
    "TowerSizes",
    "clip_tower_spec",
    "projector_spec",
    "replicated_tower_spec",
    "tower_config",
    "tower_sizes",
    "tower_spec",
    "vision_modality_spec",
]


__getattr__, __dir__ = late(__name__, _HOME)

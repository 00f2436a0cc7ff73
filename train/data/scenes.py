"""Drawn parking lots as a surveillance camera sees them, with exact boxes: the demo's data.

scene = draw_scene(np.random.default_rng(0))
write_demo_data(folder, train=600, test=100)
"""

from __future__ import annotations

from parkdet.train.data.scene_dataset import CLASS_NAMES, write_demo_data
from parkdet.train.data.scene_render import Scene, draw_scene

__all__ = ["CLASS_NAMES", "Scene", "draw_scene", "write_demo_data"]

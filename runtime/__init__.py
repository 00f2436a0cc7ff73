"""Artifact and images to detections: numpy, never torch.

The names below are what other programs import. They are loaded on first use, so that
`import parkdet.runtime` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parkdet.runtime.detections import Detections as Detections
    from parkdet.runtime.detector import Detector as Detector
    from parkdet.runtime.evaluation import evaluate as evaluate
    from parkdet.runtime.geometry import Letterbox as Letterbox
    from parkdet.runtime.heads import decode_heads as decode_heads
    from parkdet.runtime.model_spec import ModelSpec as ModelSpec
    from parkdet.runtime.nms import non_max_suppression as non_max_suppression

_HOME = {
    "Detections": "detections",
    "Detector": "detector",
    "Letterbox": "geometry",
    "ModelSpec": "model_spec",
    "decode_heads": "heads",
    "evaluate": "evaluation",
    "non_max_suppression": "nms",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

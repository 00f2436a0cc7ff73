"""Data set to checkpoint, in torch.

The names below are what other programs import; they are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parkdet.train.checkpoint import load_checkpoint as load_checkpoint
    from parkdet.train.checkpoint import save_checkpoint as save_checkpoint
    from parkdet.train.model.loss import DetectionLoss as DetectionLoss
    from parkdet.train.model.tta import forward_tta as forward_tta

_HOME = {
    "DetectionLoss": "model.loss",
    "forward_tta": "model.tta",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

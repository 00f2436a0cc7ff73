"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Options of `parkdet export`."""

    weights: Path
    output: Path | None = None
    """ONNX file; beside the weights without it."""
    calibration: Path | None = None
    """Folder of images for the gate; the training's own images, else drawn ones, without it."""
    imgsz: int | None = None
    canvas_hw: tuple[int, int] | None = None
    """Fixed canvas, height and width; any without it."""
    batch: int | None = None
    """Fixed batch; any without it."""
    backend: str | None = None
    """What the gate runs the graph with; the runtime's default without it."""

"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from parkdet.runtime.errors import UsageError
from parkdet.runtime.model_spec import HeadKind, InputFormat, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphOptions:
    """What the graph is to be; the defaults are what the runtime wants."""

    precision: Precision = "fp32"
    """Of the stored weights and of the body."""
    input_format: InputFormat = "uint8-nhwc"
    head: HeadKind = "raw"
    tta: bool = False
    """Whether the graph makes the three test-time views itself."""
    canvas_hw: tuple[int, int] | None = None
    """Fixed canvas, height and width; any without it."""
    batch: int | None = None
    """Fixed batch; any without it."""

    def check(self, stride: int) -> None:
        """UsageError unless the canvas is of whole cells of the coarsest level, `stride` pixels each."""
        if self.canvas_hw is None:
            return
        height, width = self.canvas_hw
        if min(height, width) < stride or height % stride or width % stride:
            raise UsageError(f"a canvas of {height}x{width} cannot be: each side must be a multiple of {stride}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Options of `parkdet export`."""

    weights: Path
    output: Path | None = None
    """ONNX file; beside the weights without it."""
    calibration: Path | None = None
    """Folder of images for the gate; the training's own images, else drawn ones, without it."""
    imgsz: int | None = None
    graph: GraphOptions = field(default_factory=GraphOptions)
    backend: str | None = None
    """What the gate runs the graph with; the runtime's default without it."""

"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from parkdet.runtime.engine_sidecar import Flavour, HardwareCompatibility, ShapeRange
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
class EngineOptions:
    """What engines are to be built of the graph."""

    flavour: Flavour
    architectures: tuple[int, ...] = ()
    hardware: HardwareCompatibility = "none"
    workspace_bytes: int | None = None
    level: int | None = None
    plugin: Path | None = None
    timing_folder: Path | None = None
    """Where timings of earlier builds are kept; the user's cache folder without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Options of `parkdet export`."""

    weights: Path
    output: Path | None = None
    """File (or OpenVINO folder) to write; beside the weights without it."""
    calibration: Path | None = None
    """Folder of images for the gate; the training's own images, else drawn ones, without it."""
    data: Path | None = None
    """Data set whose canvases the artifact is for."""
    imgsz: int | None = None
    conf: float | None = None
    """Post-processing that the artifact carries; the checkpoint's without it."""
    iou: float | None = None
    max_det: int | None = None
    graph: GraphOptions = field(default_factory=GraphOptions)
    batches: ShapeRange = field(default_factory=lambda: ShapeRange(low=1, best=16, high=16))
    """Batches that an engine of a dynamic batch is for."""
    engine: EngineOptions | None = None
    backend: str | None = None
    """What the gate runs a float32 graph with; the runtime's default without it."""

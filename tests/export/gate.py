"""The gate as the tests hold it: a few drawn canvases and one contender."""

from __future__ import annotations

from contextlib import nullcontext

from parkdet.export.canvases import GateImage, generated_canvases
from parkdet.export.parity import Contender, Infer, ParityReport, compare
from parkdet.train.model.network import Yolov5

CANVAS = (64, 96)


def drawn(network: Yolov5, count: int = 2, canvas_hw: tuple[int, int] | None = None) -> list[GateImage]:
    return [GateImage(canvas) for canvas in generated_canvases(network.spec, canvas_hw, count)]


def judged(network: Yolov5, infer: Infer, images: list[GateImage], precision: str = "fp32") -> ParityReport:
    (found,) = compare(network, [nullcontext(Contender("it", precision, infer, network.spec))], images)
    return found

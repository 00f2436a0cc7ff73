"""Which canvas an image goes onto, given what the graph was exported for."""

from __future__ import annotations

from parkdet.runtime.backends.base import Backend, FinishingBackend
from parkdet.runtime.geometry import Letterbox


def fit_letterbox(image_hw: tuple[int, int], imgsz: int, backend: Backend) -> Letterbox:
    """The image's way onto its own canvas, or onto the one of the sizes that the graph was exported for.

    Of several sizes, where the image's own is not among them, the one that shows it largest, of these the smallest.
    """
    _, height, width = backend.fixed_input
    stride = backend.spec.stride_max
    own = Letterbox.fit(image_hw, imgsz, stride)
    choices = backend.canvases if isinstance(backend, FinishingBackend) else ()
    if own.canvas_hw in choices:
        return own
    if choices:
        fitted = [_onto(image_hw, imgsz, stride, canvas) for canvas in choices]
        return max(fitted, key=lambda box: (box.resized_hw, -box.canvas_hw[0] * box.canvas_hw[1]))
    if height is None and width is None:
        return own
    return _onto(image_hw, imgsz, stride, (height or own.canvas_hw[0], width or own.canvas_hw[1]))


def _onto(image_hw: tuple[int, int], imgsz: int, stride: int, canvas: tuple[int, int]) -> Letterbox:
    # The largest long side, up to imgsz, with which both sides fit.
    sides = zip(canvas, image_hw, strict=True)
    long = min(imgsz, *(side * max(image_hw) // length for side, length in sides))
    return Letterbox.fit(image_hw, max(long, 1), stride, canvas)

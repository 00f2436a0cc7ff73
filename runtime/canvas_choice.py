"""Which canvas an image goes onto, given what the graph was exported for."""

from __future__ import annotations

from parkdet.runtime.backends.base import Backend, FinishingBackend
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.image_headers import read_header
from parkdet.runtime.loading import ImageItem


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


def in_canvas_order(items: list[ImageItem], imgsz: int, backend: Backend) -> list[ImageItem]:
    """The images with those of one canvas in a row, as their headers say, else in their order.

    A backend keeps few canvases compiled, and batches get full. What has no size comes first.
    """

    def canvas_hw(item: ImageItem) -> tuple[int, int]:
        header = None if item.path is None else read_header(item.path)
        if header is None or header.problem is not None:
            return 0, 0
        return fit_letterbox((header.height, header.width), imgsz, backend).canvas_hw

    return sorted(items, key=canvas_hw)


def _onto(image_hw: tuple[int, int], imgsz: int, stride: int, canvas: tuple[int, int]) -> Letterbox:
    # The largest long side, up to imgsz, with which both sides fit.
    sides = zip(canvas, image_hw, strict=True)
    long = min(imgsz, *(side * max(image_hw) // length for side, length in sides))
    return Letterbox.fit(image_hw, max(long, 1), stride, canvas)

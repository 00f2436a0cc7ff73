"""Box formats and the letterbox: how an image becomes a canvas, and how boxes come back.

Formats: `xyxy` is two corners, `xywh` the top left corner with width and height (COCO), `cxcywh` the centre
with width and height. All are pixels of the frame that the name says (image or canvas).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ImageArray = NDArray[np.uint8]

PAD_VALUE = 114
"""Grey level of the canvas outside the image, in all channels."""


def cxcywh_to_xyxy(cxcywh: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """(..., 4) centre and size to (..., 4) corners, same dtype."""
    centre, half = cxcywh[..., :2], cxcywh[..., 2:4] / 2
    return np.concatenate((centre - half, centre + half), axis=-1)


def xyxy_to_cxcywh(xyxy: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """(..., 4) corners to (..., 4) centre and size, same dtype."""
    low, high = xyxy[..., :2], xyxy[..., 2:4]
    return np.concatenate(((low + high) / 2, high - low), axis=-1)


def xyxy_to_xywh(xyxy: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """(..., 4) corners to (..., 4) top left corner and size, same dtype."""
    low, high = xyxy[..., :2], xyxy[..., 2:4]
    return np.concatenate((low, high - low), axis=-1)


def xywh_to_xyxy(xywh: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """(..., 4) top left corner and size to (..., 4) corners, same dtype."""
    low, size = xywh[..., :2], xywh[..., 2:4]
    return np.concatenate((low, low + size), axis=-1)


def areas(xyxy: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """(..., 4) corners to (...) areas in square pixels; 0 where a side is not positive."""
    sides = np.maximum(xyxy[..., 2:4] - xyxy[..., :2], 0)
    return np.asarray(sides[..., 0] * sides[..., 1])


def iou_matrix(a_xyxy: NDArray[np.floating[Any]], b_xyxy: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Intersection over union of each box of (N, 4) with each of (M, 4): (N, M), 0 where both are empty."""
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:4], b_xyxy[None, :, 2:4])
    sides = np.maximum(high - low, 0)
    intersection = sides[..., 0] * sides[..., 1]
    union = areas(a_xyxy)[:, None] + areas(b_xyxy)[None, :] - intersection
    return np.asarray(np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0))


def canvas_hw(image_hw: tuple[int, int], imgsz: int, stride: int) -> tuple[int, int]:
    """The canvas of one image: each side `ceil(side / stride + 0.5) * stride` with the image's aspect.

    The long side is taken as `imgsz`. Computed in integers: the rule meets its ties exactly for 16:9
    images at 1536, where a float quotient may fall on either side. 1080 x 1920 at 1536 with
    stride 64 gives 896 x 1600.
    """
    long = max(image_hw)
    height, width = (-(-(2 * imgsz * side + stride * long) // (2 * stride * long)) * stride for side in image_hw)
    return height, width


@dataclass(frozen=True, slots=True)
class Letterbox:
    """One image's way onto its canvas and back: aspect kept, centred, padded with grey 114."""

    image_hw: tuple[int, int]
    """Height and width of the image in pixels."""
    resized_hw: tuple[int, int]
    """Height and width of the scaled image on the canvas."""
    canvas_hw: tuple[int, int]
    """Height and width of the canvas: the network's input."""
    top: int
    left: int

    @classmethod
    def fit(
        cls, image_hw: tuple[int, int], imgsz: int, stride: int, canvas: tuple[int, int] | None = None
    ) -> Letterbox:
        """Fit an image whose long side becomes `imgsz` onto its own canvas, or onto the given one.

        Raises ValueError when a side is not positive or the scaled image is larger than the given canvas.
        """
        height, width = (int(side) for side in image_hw)
        if height < 1 or width < 1 or imgsz < 1 or stride < 1:
            raise ValueError(f"sides must be positive: image {height} x {width}, imgsz {imgsz}, stride {stride}")
        ratio = imgsz / max(height, width)
        # A line of pixels thinner than one pixel when scaled stays one pixel: OpenCV has no empty images.
        resized = (height, width) if ratio == 1 else (max(int(height * ratio), 1), max(int(width * ratio), 1))
        size = canvas if canvas is not None else canvas_hw((height, width), imgsz, stride)
        spare_h, spare_w = size[0] - resized[0], size[1] - resized[1]
        if spare_h < 0 or spare_w < 0:
            raise ValueError(f"a canvas of {size[0]} x {size[1]} cannot hold {resized[0]} x {resized[1]} pixels")
        return cls((height, width), resized, size, round(spare_h / 2 - 0.1), round(spare_w / 2 - 0.1))

    def apply(self, image: ImageArray) -> ImageArray:
        """Canvas (H, W, C) uint8 of an image (h, w, C) uint8: area averaging to shrink, linear to enlarge."""
        if image.shape[:2] != self.image_hw:
            raise ValueError(f"this letterbox is for an image of {self.image_hw}, not of {image.shape[:2]}")
        resized = image if self.resized_hw == self.image_hw else _resized(image, self.resized_hw)
        canvas = np.full((*self.canvas_hw, *image.shape[2:]), PAD_VALUE, dtype=np.uint8)
        canvas[self.top : self.top + self.resized_hw[0], self.left : self.left + self.resized_hw[1]] = resized
        return canvas

    def to_canvas(self, image_xyxy: NDArray[np.floating[Any]]) -> FloatArray:
        """Boxes (N, 4), xyxy: image pixels to canvas pixels."""
        return (np.asarray(image_xyxy, np.float32).reshape(-1, 4) * self._scale() + self._offset()).astype(np.float32)

    def to_image(self, canvas_xyxy: NDArray[np.floating[Any]]) -> FloatArray:
        """Boxes (N, 4), xyxy: canvas to image pixels, clipped to the image. Each axis has its own ratio."""
        return np.asarray(np.clip(self._unclipped(canvas_xyxy), 0, self._limits()), np.float32)

    def reach_out(self, canvas_xyxy: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """(N,): which boxes reach over the image's edge, so that `to_image` clips them."""
        boxes = self._unclipped(canvas_xyxy)
        return np.asarray(((boxes < 0) | (boxes > self._limits())).any(axis=1))

    def _unclipped(self, canvas_xyxy: NDArray[np.floating[Any]]) -> FloatArray:
        boxes = np.asarray(canvas_xyxy, np.float32).reshape(-1, 4)
        return np.asarray((boxes - self._offset()) / self._scale(), np.float32)

    def _limits(self) -> FloatArray:
        height, width = self.image_hw
        return np.array([width, height, width, height], np.float32)

    def _scale(self) -> FloatArray:
        y, x = self.resized_hw[0] / self.image_hw[0], self.resized_hw[1] / self.image_hw[1]
        return np.array([x, y, x, y], np.float32)

    def _offset(self) -> FloatArray:
        return np.array([self.left, self.top, self.left, self.top], np.float32)


def _resized(image: ImageArray, hw: tuple[int, int]) -> ImageArray:
    import cv2

    from parkdet.runtime.shrinking import shrink_by_a_part

    shrinks = max(hw) < max(image.shape[:2])
    if shrinks and (small := shrink_by_a_part(image, hw)) is not None:
        return small
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(image, hw[::-1], interpolation=method), dtype=np.uint8)
    return resized.reshape(*hw, *image.shape[2:])  # cv2 drops a single channel's axis

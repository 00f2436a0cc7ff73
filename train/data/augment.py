"""Augmentation as YOLOv5 v6 defines it: mosaic, random affine or perspective, mix-up, HSV jitter, flips.

Pure numpy and OpenCV; every random number comes from the generator that the caller passes, and how many are
drawn does not depend on the images. Boxes are in continuous pixels: the first pixel spans 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from parkdet.runtime.geometry import PAD_VALUE, FloatArray, ImageArray, Letterbox
from parkdet.runtime.settings import Settings

MATRIX_IDENTITY = np.eye(3)
MIN_SIDE = 2.0
"""A box stays when its clipped sides are longer than this, in pixels,"""
MIN_AREA_RATIO = 0.1
"""when more than this share of its scaled area is left,"""
MAX_ASPECT = 100.0
"""and when its long side is less than this many times its short one."""
MAX_HIDDEN = 0.3
"""Share of a box that a pasted copy may not hide."""
MIN_CROP_SCALE = 0.5
"""Under this scale a crop would be mostly grey, and large."""
TILES = 8
"""Tiles a canvas may need: four of its mosaic, four of the mosaic it is mixed with."""


class AugmentSettings(Settings):
    """How strongly training images are varied. The defaults are the contest's baseline."""

    hsv_h: float = Field(default=0.015, ge=0, le=1)
    """Hue: the largest relative change."""
    hsv_s: float = Field(default=0.7, ge=0, le=1)
    """Saturation: the largest relative change."""
    hsv_v: float = Field(default=0.4, ge=0, le=1)
    """Value (brightness): the largest relative change."""
    degrees: float = Field(default=0.0, ge=0, le=180)
    """Rotation to either side, in degrees."""
    translate: float = Field(default=0.1, ge=0, le=0.9)
    """Shift to any side, as a share of the canvas."""
    scale: float = Field(default=0.5, ge=0, lt=1)
    """Scaling by 1 - scale to 1 + scale."""
    shear: float = Field(default=0.0, ge=0, le=45)
    """Shear along either axis, in degrees."""
    perspective: float = Field(default=0.0, ge=0, le=0.001)
    """Perspective terms of the matrix, per pixel."""
    flipud: float = Field(default=0.0, ge=0, le=1)
    """Probability of turning the canvas upside down."""
    fliplr: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring left and right."""
    mosaic: float = Field(default=1.0, ge=0, le=1)
    """Probability of a mosaic of four images in place of one letterboxed image."""
    mosaic_window: int = Field(default=256, ge=0)
    """A mosaic's other images are drawn from so many places of the epoch, those up to its own, and kept in memory so
    long: an image is then decoded about once an epoch, not four times. 0: from all (at no cost with cache=ram)."""
    mixup: float = Field(default=0.0, ge=0, le=1)
    """Probability of blending a mosaic with a second one."""
    copy_paste: float = Field(default=0.0, ge=0, le=1)
    """Share of a mosaic's boxes of which a mirrored copy is pasted where it hides nothing much."""


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """An image scaled to its long side, read only when its pixels are needed, and its boxes."""

    image_hw: tuple[int, int]
    """Height and width of the scaled image."""
    class_ids: NDArray[np.int32]
    xyxy: FloatArray
    """Boxes (n, 4) in pixels of the scaled image."""
    load: Callable[[], ImageArray]
    """Returns the scaled image (h, w, 3) BGR; nobody writes to it."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledCanvas:
    """What the network is to see: an image (H, W, 3) BGR uint8, and boxes (n, 4), xyxy in canvas pixels."""

    image: ImageArray
    class_ids: NDArray[np.int32]
    xyxy: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Warp:
    """A random affine or perspective map from one frame into another."""

    matrix: NDArray[np.float64]
    """(3, 3), on homogeneous continuous pixel coordinates."""
    scale: float
    """The factor that the map was drawn with, before shear and perspective."""
    output_hw: tuple[int, int]
    crop: tuple[int, int, int, int] | None = None
    """Where the map only scales and shifts: the part of the input, x1, y1, x2, y2 in whole pixels and perhaps beyond
    its borders, that fills the output."""

    @classmethod
    def draw(
        cls,
        input_hw: tuple[int, int],
        output_hw: tuple[int, int],
        settings: AugmentSettings,
        rng: np.random.Generator,
    ) -> Warp:
        """Perspective, rotation with scaling, shear, all about the input's centre, which goes near the output's.

        Without perspective, rotation and shear, scale and shift are rounded so that the output shows whole pixels of
        the input: a crop, which is faster to resize than to warp.
        """
        draws = rng.uniform(-1, 1, 8)
        angle = math.radians(draws[0] * settings.degrees)
        scale = 1 + draws[1] * settings.scale
        shear_x, shear_y = (math.tan(math.radians(draw * settings.shear)) for draw in draws[2:4])
        shift_x, shift_y = 0.5 + draws[4:6] * settings.translate
        if scale >= MIN_CROP_SCALE and not (settings.degrees or settings.shear or settings.perspective):
            return cls._cropping(input_hw, output_hw, float(scale), (float(shift_x), float(shift_y)))
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        centring = np.array([[1, 0, -input_hw[1] / 2], [0, 1, -input_hw[0] / 2], [0, 0, 1]])
        perspective = np.array([[1, 0, 0], [0, 1, 0], [*(draws[6:8] * settings.perspective), 1]])
        rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
        placing = np.array([[1, 0, shift_x * output_hw[1]], [0, 1, shift_y * output_hw[0]], [0, 0, 1]])
        return cls(placing @ shear @ rotation @ perspective @ centring, float(scale), output_hw)

    @classmethod
    def _cropping(
        cls, input_hw: tuple[int, int], output_hw: tuple[int, int], scale: float, shift_xy: tuple[float, float]
    ) -> Warp:
        (input_h, input_w), (output_h, output_w) = input_hw, output_hw
        width, height = max(round(output_w / scale), 1), max(round(output_h / scale), 1)
        left, top = round(input_w / 2 - shift_xy[0] * width), round(input_h / 2 - shift_xy[1] * height)
        factor_x, factor_y = output_w / width, output_h / height
        matrix = np.array([[factor_x, 0, -left * factor_x], [0, factor_y, -top * factor_y], [0, 0, 1]])
        return cls(matrix, scale, output_hw, (left, top, left + width, top + height))

    def boxes(self, xyxy: FloatArray) -> NDArray[np.float64]:
        """Boxes (n, 4) around the mapped corners of boxes (n, 4), not clipped; NaN beyond the horizon."""
        corners = np.ones((len(xyxy), 4, 3))
        corners[:, :, :2] = xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        mapped = corners @ self.matrix.T
        # A corner beyond the horizon has no place in the output: its box becomes NaN, and is not kept.
        depth = np.where(mapped[..., 2:] > 0, mapped[..., 2:], np.nan)
        points = mapped[..., :2] / depth
        return np.concatenate((points.min(axis=1), points.max(axis=1)), axis=1)

    def source_window(self, input_hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """The part of the input that the output may show: x1, y1, x2, y2 in whole pixels, perhaps empty.

        A crop may reach beyond the input, where all is grey.
        """
        if self.crop is not None:
            return self.crop
        height, width = self.output_hw
        corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
        mapped = corners @ np.linalg.inv(self.matrix).T
        if np.any(mapped[:, 2] <= 0):  # the horizon crosses the output
            return 0, 0, input_hw[1], input_hw[0]
        points = mapped[:, :2] / mapped[:, 2:]
        # Interpolation reaches half a pixel beyond a corner; the rest of the margin is for rounding.
        x1, y1 = np.floor(points.min(axis=0)).astype(int) - 2
        x2, y2 = np.ceil(points.max(axis=0)).astype(int) + 2
        return max(int(x1), 0), max(int(y1), 0), min(int(x2), input_hw[1]), min(int(y2), input_hw[0])

    def apply(self, image: ImageArray, origin_xy: tuple[int, int] = (0, 0)) -> ImageArray:
        """The output (H, W, 3) of an input, or of its part that begins at `origin_xy`; grey outside of it."""
        if self.crop is not None:
            return self._resized(image, origin_xy)
        # OpenCV counts from pixel centres, boxes are counted from pixel edges: half a pixel between the two.
        to_edges = np.array([[1, 0, origin_xy[0] + 0.5], [0, 1, origin_xy[1] + 0.5], [0, 0, 1]])
        to_centres = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
        matrix = to_centres @ self.matrix @ to_edges
        size_wh, grey = self.output_hw[::-1], (PAD_VALUE,) * 3
        if np.array_equal(self.matrix[2], MATRIX_IDENTITY[2]):
            output = cv2.warpAffine(image, matrix[:2], size_wh, flags=cv2.INTER_LINEAR, borderValue=grey)
        else:
            output = cv2.warpPerspective(image, matrix, size_wh, flags=cv2.INTER_LINEAR, borderValue=grey)
        return np.asarray(output, np.uint8)

    def _resized(self, image: ImageArray, origin_xy: tuple[int, int]) -> ImageArray:
        assert self.crop is not None
        x1, x2 = self.crop[0] - origin_xy[0], self.crop[2] - origin_xy[0]
        y1, y2 = self.crop[1] - origin_xy[1], self.crop[3] - origin_xy[1]
        height, width = image.shape[:2]
        if (x1, y1, x2, y2) != (0, 0, width, height):
            part = np.full((y2 - y1, x2 - x1, 3), PAD_VALUE, np.uint8)
            inside = image[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
            top, left = max(-y1, 0), max(-x1, 0)
            part[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
            image = part
        return np.asarray(cv2.resize(image, self.output_hw[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)

    def keep(self, before_xyxy: FloatArray, after_xyxy: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Which boxes (n,) are still worth learning after they were mapped and clipped."""
        area_before = np.prod((before_xyxy[:, 2:] - before_xyxy[:, :2]).astype(np.float64) * self.scale, axis=1)
        sides = after_xyxy[:, 2:] - after_xyxy[:, :2]
        long, short = sides.max(axis=1, initial=0), sides.min(axis=1, initial=np.inf)
        enough_left = sides[:, 0] * sides[:, 1] > MIN_AREA_RATIO * area_before
        return np.asarray((short > MIN_SIDE) & (long < MAX_ASPECT * short) & enough_left)

    def label(self, image: ImageArray, class_ids: NDArray[np.int32], input_xyxy: FloatArray) -> LabelledCanvas:
        """The mapped image with the boxes that are worth keeping, clipped to it."""
        height, width = self.output_hw
        after = np.clip(self.boxes(input_xyxy), 0, (width, height, width, height)).astype(np.float32)
        keep = self.keep(input_xyxy, after)
        return LabelledCanvas(image, class_ids[keep], after[keep])


def to_long_side(image: ImageArray, resized_hw: tuple[int, int]) -> ImageArray:
    """The image at `resized_hw`, by linear interpolation up and down; itself when it has that size."""
    if image.shape[:2] == resized_hw:
        return image
    return np.asarray(cv2.resize(image, resized_hw[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def letterboxed(
    tile: Tile, canvas_hw: tuple[int, int], settings: AugmentSettings, rng: np.random.Generator
) -> LabelledCanvas:
    """One tile in the middle of a canvas, then mapped at random within it; scaled down where it is too large."""
    fits = min(canvas_hw[0] / tile.image_hw[0], canvas_hw[1] / tile.image_hw[1], 1.0)
    box = Letterbox.fit(tile.image_hw, int(max(tile.image_hw) * fits), 1, canvas=canvas_hw)
    height, width = box.resized_hw
    canvas = np.full((*canvas_hw, 3), PAD_VALUE, np.uint8)
    canvas[box.top : box.top + height, box.left : box.left + width] = to_long_side(tile.load(), box.resized_hw)
    warp = Warp.draw(canvas_hw, canvas_hw, settings, rng)
    if not np.array_equal(warp.matrix, MATRIX_IDENTITY):
        canvas = warp.apply(canvas)
    return warp.label(canvas, tile.class_ids, box.to_canvas(tile.xyxy))


def mosaic(tiles: Sequence[Tile], imgsz: int, settings: AugmentSettings, rng: np.random.Generator) -> LabelledCanvas:
    """Four tiles around a random point of a canvas twice as large, mapped at random into one of `imgsz`.

    Only what the output shows of that canvas is made, and a tile out of view is not loaded: with scaling to
    1.5 that spares every tenth image its decoding, and changes no pixel.
    """
    side = 2 * imgsz
    canvas_hw = (side, side)
    centre_x, centre_y = (int(centre) for centre in rng.uniform(imgsz / 2, side - imgsz / 2, 2))
    order = rng.permutation(4)
    warp = Warp.draw(canvas_hw, (imgsz, imgsz), settings, rng)
    # A copy may come from anywhere, so that all of the canvas is needed.
    x1, y1, x2, y2 = (0, 0, side, side) if settings.copy_paste else warp.source_window(canvas_hw)
    canvas = np.full((max(y2 - y1, 1), max(x2 - x1, 1), 3), PAD_VALUE, np.uint8)
    boxes = []
    for place, tile_index in enumerate(order):
        tile = tiles[tile_index]
        height, width = tile.image_hw
        # Places 0 and 2 end at the centre's left, 0 and 1 above it.
        left = centre_x - width if place in (0, 2) else centre_x
        top = centre_y - height if place in (0, 1) else centre_y
        boxes.append(tile.xyxy + np.array([left, top, left, top], np.float32))
        seen_x1, seen_x2 = max(left, x1, 0), min(left + width, x2, side)
        seen_y1, seen_y2 = max(top, y1, 0), min(top + height, y2, side)
        if seen_x1 < seen_x2 and seen_y1 < seen_y2:
            part = tile.load()[seen_y1 - top : seen_y2 - top, seen_x1 - left : seen_x2 - left]
            canvas[seen_y1 - y1 : seen_y2 - y1, seen_x1 - x1 : seen_x2 - x1] = part
    canvas_xyxy = np.clip(np.concatenate(boxes), 0, np.float32(side))
    class_ids = np.concatenate([tiles[tile_index].class_ids for tile_index in order])
    whole = LabelledCanvas(canvas, class_ids, canvas_xyxy)
    if settings.copy_paste:
        # A generator of its own: how many numbers it gives depends on the boxes.
        whole = paste_mirrored(whole, settings.copy_paste, np.random.default_rng(rng.integers(2**63)))
    return warp.label(warp.apply(whole.image, (x1, y1)), whole.class_ids, whole.xyxy)


def paste_mirrored(canvas: LabelledCanvas, share: float, rng: np.random.Generator) -> LabelledCanvas:
    """The canvas with mirrored copies of `share` of its boxes, each pasted at the place that is its mirror image.

    A copy that would hide `MAX_HIDDEN` or more of any box, an earlier copy's too, is left out. Source: YOLOv5's
    copy-paste, with a box's pixels in place of a segment's.
    """
    width = canvas.image.shape[1]
    image, class_ids, boxes = canvas.image.copy(), list(canvas.class_ids), list(canvas.xyxy)
    for index in rng.choice(len(boxes), size=round(share * len(boxes)), replace=False) if boxes else ():
        x1, y1, x2, y2 = canvas.xyxy[index]
        mirrored = np.array([width - x2, y1, width - x1, y2], np.float32)
        left, top, right, bottom = (round(float(edge)) for edge in (x1, y1, x2, y2))
        if min(right - left, bottom - top) < 1 or (_hidden(mirrored, np.stack(boxes)) >= MAX_HIDDEN).any():
            continue
        image[top:bottom, width - right : width - left] = canvas.image[top:bottom, left:right][:, ::-1]
        class_ids.append(canvas.class_ids[index])
        boxes.append(mirrored)
    return LabelledCanvas(image, np.array(class_ids, np.int32), np.array(boxes, np.float32).reshape(-1, 4))


def _hidden(box: FloatArray, others: FloatArray) -> FloatArray:
    """Share (n,) of the area of every other box (n, 4) that lies under a box (4,)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    area = np.prod(others[:, 2:] - others[:, :2], axis=1)
    return np.asarray(np.prod(np.maximum(sides, 0), axis=1) / np.maximum(area, 1e-9), np.float32)


def mix(first: LabelledCanvas, second: LabelledCanvas, rng: np.random.Generator) -> LabelledCanvas:
    """Two canvases of one size blended with a weight from Beta(32, 32), and the boxes of both."""
    weight = float(rng.beta(32, 32))
    return LabelledCanvas(
        np.asarray(cv2.addWeighted(first.image, weight, second.image, 1 - weight, 0), np.uint8),
        np.concatenate((first.class_ids, second.class_ids)),
        np.concatenate((first.xyxy, second.xyxy)),
    )


def jitter_hsv(image: ImageArray, settings: AugmentSettings, rng: np.random.Generator) -> ImageArray:
    """The BGR image with hue, saturation and value each multiplied by a random gain (8-bit HSV)."""
    strengths = np.array([settings.hsv_h, settings.hsv_s, settings.hsv_v])
    gains = 1 + rng.uniform(-1, 1, 3) * strengths
    return scale_hsv(image, gains) if strengths.any() else image


def scale_hsv(image: ImageArray, gains: NDArray[np.float64]) -> ImageArray:
    """The BGR image with its 8-bit hue, saturation and value multiplied by `gains` (3,), rounded down."""
    tables = np.arange(256)[:, None] * gains
    tables[:, 0] %= 180  # OpenCV's hue is half the angle
    tables = np.ascontiguousarray(np.minimum(tables, 255).astype(np.uint8).T)
    # Plane by plane, split and merged, takes two thirds of the time of three channels at once.
    planes = [
        cv2.LUT(plane, table)
        for plane, table in zip(cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV)), tables, strict=True)
    ]
    return np.asarray(cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2BGR), np.uint8)


def flipped(canvas: LabelledCanvas, settings: AugmentSettings, rng: np.random.Generator) -> LabelledCanvas:
    """The canvas turned upside down and mirrored, each with its probability."""
    height, width = canvas.image.shape[:2]
    upside_down, mirrored = rng.random(2) < (settings.flipud, settings.fliplr)
    image, xyxy = canvas.image, canvas.xyxy
    if upside_down:
        image = np.asarray(cv2.flip(image, 0), np.uint8)
        xyxy = np.stack((xyxy[:, 0], height - xyxy[:, 3], xyxy[:, 2], height - xyxy[:, 1]), axis=1)
    if mirrored:
        image = np.asarray(cv2.flip(image, 1), np.uint8)
        xyxy = np.stack((width - xyxy[:, 2], xyxy[:, 1], width - xyxy[:, 0], xyxy[:, 3]), axis=1)
    return LabelledCanvas(image, canvas.class_ids, xyxy)


def augmented(
    tile: Callable[[int], Tile],
    imgsz: int,
    settings: AugmentSettings,
    rng: np.random.Generator,
    canvas_hw: tuple[int, int] | None = None,
) -> LabelledCanvas:
    """One training canvas of `imgsz` squared: `tile(0)` is its own, those up to `TILES` its companions.

    With `canvas_hw`, one image on a canvas of that height and width, and no mosaic.
    """
    if canvas_hw is None and rng.random() < settings.mosaic:
        canvas = mosaic([tile(number) for number in range(4)], imgsz, settings, rng)
        if rng.random() < settings.mixup:
            partner = mosaic([tile(number) for number in range(4, TILES)], imgsz, settings, rng)
            canvas = mix(canvas, partner, rng)
    else:
        canvas = letterboxed(tile(0), canvas_hw or (imgsz, imgsz), settings, rng)
    image = jitter_hsv(canvas.image, settings, rng)
    return flipped(LabelledCanvas(image, canvas.class_ids, canvas.xyxy), settings, rng)

"""Pictures of detections: boxes in the colour of their class, labels that stay readable in a crowd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray, ImageArray

Bgr = tuple[int, int, int]
Rect = tuple[int, int, int, int]
"""x, y, width, height in whole image pixels."""

COLOUR_COUNT = 64
"""Classes beyond it share the colours of the first ones."""
BLACK: Bgr = (0, 0, 0)
WHITE: Bgr = (255, 255, 255)

_STROKES = 0  # cv2.FONT_HERSHEY_SIMPLEX
_SHIFT = 4
"""Bits of a pixel's fraction in the coordinates that OpenCV is given."""


def draw_detections(
    image: ImageArray,
    detections: Detections,
    class_names: Sequence[str],
    *,
    truth_xyxy: FloatArray | None = None,
    min_score: float = 0.25,
    scores: bool = True,
    font: Path | None = None,
    letters_as_at: int | None = None,
) -> ImageArray:
    """A copy of the image (h, w, 3) uint8 BGR with the detections of at least `min_score` drawn on it.

    Boxes are in pixels of this image and are clipped to it. A label says `name 0.87`, or `name` without `scores`.
    OpenCV's letters are ASCII: another name is written with `font`, a font file (Pillow reads it), and without
    one it is the class's number, as `class_label` tells. Letters go with the boxes' lines, or with lines of
    `letters_as_at` pixels: a crowd wants small ones. A label that would leave the image moves, then loses letters
    of its name, then the name. `truth_xyxy` (N, 4) is drawn thin, in white dashes on black, under the detections.
    """
    import cv2

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture is (h, w, 3) uint8, not {image.shape} {image.dtype}")
    picture = np.ascontiguousarray(image).copy()
    width_px = line_width(image.shape[:2])
    if truth_xyxy is not None:
        for box in np.asarray(truth_xyxy, np.float32).reshape(-1, 4):
            _draw_dashed(picture, box, width_px // 2)
    shown = detections.select(detections.scores >= min_score)
    # The best last, so that it lies on top; labels after all boxes, so that no line crosses one.
    for box, _, class_id in reversed(list(shown)):
        _draw_box(picture, box, class_colour(class_id), width_px)
    style = _LabelStyle.of(letters_as_at or width_px, font)
    taken: list[Rect] = []
    for box, score, class_id in shown:
        has_name = font is not None and 0 <= class_id < len(class_names)
        name = class_names[class_id] if has_name else class_label(class_id, class_names)
        text = style.fitting(name, f"{score:.2f}" if scores else "", picture.shape[1])
        chip = _place(box, style.chip_size(text), picture.shape[:2], taken, width_px) if text else None
        if chip is None:
            continue
        taken.append(chip)
        colour = class_colour(class_id)
        x, y, width, height = chip
        cv2.rectangle(picture, (x, y), (x + width - 1, y + height - 1), colour, cv2.FILLED)
        style.write(picture, text, (x + style.padding, y + style.padding + style.ascent), _ink_on(colour))
    return picture


def class_label(class_id: int, class_names: Sequence[str]) -> str:
    """What a label calls the class: its name where that is printable ASCII, else `#` and the class id."""
    name = class_names[class_id] if 0 <= class_id < len(class_names) else ""
    return name if name.strip() and name.isascii() and name.isprintable() else f"#{class_id}"


def class_colour(class_id: int) -> Bgr:
    """The colour of a class (from 0), the same in every picture and whatever the number of classes."""
    blue, green, red = _palette()[class_id % COLOUR_COUNT]
    return blue, green, red


def line_width(image_hw: tuple[int, int]) -> int:
    """Width of a box's line in pixels: 2 at 640 x 480, 4 at 1920 x 1080."""
    return max(2, round(sum(image_hw) / 2 * 0.0028))


@cache
def _palette() -> tuple[Bgr, ...]:
    """Colours chosen one after the other, each the farthest in OKLab from all before it.

    Candidates are of middle lightness and coloured but not glaring: they show on bright ground, on night and
    on asphalt. The first is a blue. The colour of a class does not depend on how many classes follow.
    """
    levels = np.linspace(0, 255, 13)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3).round()
    lab = _oklab(rgb)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    usable = (lightness > 0.55) & (lightness < 0.86) & (chroma > 0.10) & (chroma < 0.215)
    rgb, lab = rgb[usable], lab[usable]
    # Hue tells classes apart across a photograph; lightness also changes with the light.
    space = lab * np.array([0.6, 1.0, 1.0])
    chosen = [int(np.argmin(np.abs(rgb - (38, 128, 255)).sum(axis=1)))]
    distance = np.full(len(space), np.inf)
    while len(chosen) < COLOUR_COUNT:
        distance = np.minimum(distance, np.linalg.norm(space - space[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return tuple((int(blue), int(green), int(red)) for red, green, blue in rgb[chosen])


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB 0 to 255, (N, 3), to OKLab (N, 3) as Björn Ottosson defined it in 2020."""
    unit = rgb / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    axes = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.asarray(np.cbrt(linear @ cones.T) @ axes.T)


def _ink_on(colour: Bgr) -> Bgr:
    """Black or white, whichever reads better on the colour (the greater contrast ratio of WCAG 2)."""
    unit = np.array(colour[::-1]) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return BLACK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else WHITE


def _line_corners(picture: ImageArray, box: FloatArray, thickness: int) -> tuple[float, float, float, float]:
    """Corners for the middle of the box's line in OpenCV's frame, the whole line inside the picture."""
    height, width = picture.shape[:2]
    inset = (thickness - 1) / 2
    # OpenCV's coordinates name pixels' centres, a box's their edges.
    x0, y0, x1, y1 = (float(value) - 0.5 for value in np.nan_to_num(box))
    right, bottom = max(width - 1 - inset, inset), max(height - 1 - inset, inset)
    x0, x1 = (min(max(x, inset), right) for x in (x0, x1))
    y0, y1 = (min(max(y, inset), bottom) for y in (y0, y1))
    return x0, y0, x1, y1


def _fixed(x: float, y: float) -> tuple[int, int]:
    return round(x * 2**_SHIFT), round(y * 2**_SHIFT)


def _draw_box(picture: ImageArray, box: FloatArray, colour: Bgr, thickness: int) -> None:
    import cv2

    x0, y0, x1, y1 = _line_corners(picture, box, thickness)
    cv2.rectangle(picture, _fixed(x0, y0), _fixed(x1, y1), colour, thickness, cv2.LINE_AA, _SHIFT)


def _draw_dashed(picture: ImageArray, box: FloatArray, thickness: int) -> None:
    """White dashes with black between them: visible on any ground."""
    import cv2

    # A thin line between two pixels would be pale: it goes to the nearest one.
    x0, y0, x1, y1 = (math.floor(corner + 0.5) for corner in _line_corners(picture, box, thickness))
    cv2.rectangle(picture, _fixed(x0, y0), _fixed(x1, y1), BLACK, thickness, cv2.LINE_AA, _SHIFT)
    dash = 5 * thickness
    for (ax, ay), (bx, by) in pairwise([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]):
        length = math.hypot(bx - ax, by - ay)
        # An odd number of equal pieces: a dash at each end, so that corners are closed.
        pieces = max(1, 2 * round((length / dash - 1) / 2) + 1)
        for piece in range(0, pieces, 2):
            start, end = piece / pieces, (piece + 1) / pieces
            points = (ax + (bx - ax) * part for part in (start, end))
            ordinates = (ay + (by - ay) * part for part in (start, end))
            head, tail = zip(points, ordinates, strict=True)
            cv2.line(picture, _fixed(*head), _fixed(*tail), WHITE, thickness, cv2.LINE_AA, _SHIFT)


@dataclass(frozen=True, slots=True)
class _LabelStyle:
    """The letters of labels: OpenCV's strokes for ASCII, a font's where there is one for what is not."""

    scale: float
    thickness: int
    ascent: int
    descent: int
    padding: int
    face: Any
    """Pillow's font; None without one."""

    @classmethod
    def of(cls, width_px: int, font: Path | None = None) -> _LabelStyle:
        """The style that goes with boxes of this line width; letters under 9 pixels cannot be read."""
        import cv2

        height, thickness = max(9, 6 * width_px), max(1, round(width_px / 2))
        scale = float(cv2.getFontScaleFromHeight(_STROKES, height, thickness))
        (_, ascent), descent = cv2.getTextSize("Ag", _STROKES, scale, thickness)
        face = None
        if font is not None:
            from PIL import ImageFont

            # A capital is about 0.72 of the size that a font is asked for.
            face = ImageFont.truetype(str(font), round(height / 0.72))
            ascent, descent = (max(ours, its) for ours, its in zip((ascent, descent), face.getmetrics(), strict=True))
        return cls(scale, thickness, ascent, descent, max(2, width_px), face)

    def text_width(self, text: str) -> int:
        """Width of the text in pixels."""
        import cv2

        if self._has_strokes(text):
            (width, _), _ = cv2.getTextSize(text, _STROKES, self.scale, self.thickness)
            return width
        width_in_font: float = self.face.getlength(text)
        return math.ceil(width_in_font)

    def write(self, picture: ImageArray, text: str, origin: tuple[int, int], ink: Bgr) -> None:
        """Write on the picture, from the left end of the line that the letters stand on."""
        import cv2

        if self._has_strokes(text):
            cv2.putText(picture, text, origin, _STROKES, self.scale, ink, self.thickness, cv2.LINE_AA)
            return
        from PIL import Image, ImageDraw

        mask = Image.new("L", (picture.shape[1], picture.shape[0]))
        ImageDraw.Draw(mask).text(origin, text, fill=255, font=self.face, anchor="ls")
        box = mask.getbbox()
        if box is not None:
            x0, y0, x1, y1 = box
            share = np.asarray(mask.crop(box), np.float32)[..., None] / 255
            part = picture[y0:y1, x0:x1]
            part[:] = np.rint(part * (1 - share) + np.array(ink, np.float32) * share)

    def chip_size(self, text: str) -> tuple[int, int]:
        """Width and height in pixels of the filled chip that holds the text."""
        return self.text_width(text) + 2 * self.padding, self.ascent + self.descent + 2 * self.padding

    def fitting(self, name: str, score: str, width_limit: int) -> str:
        """`name score`, shortened to the width in pixels; the score alone, or nothing where that is too wide."""
        shortened = (name, *(f"{name[:count]}.." for count in range(len(name) - 1, 0, -1)))
        texts = (*(f"{head} {score}".rstrip() for head in shortened), score)
        return next((text for text in texts if self.chip_size(text)[0] <= width_limit), "")

    def _has_strokes(self, text: str) -> bool:
        return self.face is None or text.isascii()


def _place(
    box: FloatArray, size: tuple[int, int], image_hw: tuple[int, int], taken: Sequence[Rect], width_px: int
) -> Rect | None:
    """Where the chip goes: inside the image, at a corner of its box, on as little of other chips as can be.

    None where the image is too small for it.
    """
    (width, height), (image_h, image_w) = size, image_hw
    if width > image_w or height > image_h:
        return None
    half = width_px / 2
    x0, y0, x1, y1 = (float(value) for value in np.nan_to_num(box))
    left, right = x0 - half, x1 + half - width
    # In the order of preference: outside above, below; inside at the top, at the bottom; left before right.
    tops = (y0 - half - height, y1 + half, y0 + half, y1 - half - height)
    best: tuple[int, Rect] | None = None
    for top in tops:
        for x in (left, right):
            inside_x = min(max(round(x), 0), image_w - width)
            inside_y = min(max(round(top), 0), image_h - height)
            chip = (inside_x, inside_y, width, height)
            # Pushed back by the image's edge, the chip would hide the object: a place that fits is better.
            pushed = abs(inside_y - round(top)) * width
            cost = pushed + sum(_overlap(chip, other) for other in taken)
            if cost == 0:
                return chip
            if best is None or cost < best[0]:
                best = (cost, chip)
    assert best is not None
    return best[1]


def _overlap(a: Rect, b: Rect) -> int:
    """Square pixels that two chips share."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)

"""Pictures of batches: up to sixteen images with their boxes side by side, as YOLOv5's users know them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from parkdet.runtime.detections import Detections
from parkdet.runtime.errors import DataError
from parkdet.runtime.geometry import PAD_VALUE, ImageArray, cxcywh_to_xyxy
from parkdet.runtime.images import read_image
from parkdet.runtime.pictures import draw_detections
from parkdet.train.data.loader import TrainingBatch
from parkdet.train.data.samples import Sample
from parkdet.train.lettering import Lettering

TILES = 16
"""Images on a picture."""
MAX_SIDE = 1920
"""Longest side of a picture in pixels."""
LARGEST_SCALE = 3.0
"""Small images are drawn larger, so that labels leave something of them to see."""
MIN_SCORE = 0.25
"""Detections under it are not drawn."""
_GAP = 4


def batch_picture(batch: TrainingBatch, lettering: Lettering) -> ImageArray:
    """The canvases of a training batch with their boxes, as the network is given them: BGR."""
    images = batch.images[:TILES].numpy().transpose(0, 2, 3, 1)[..., ::-1]
    targets = batch.targets.numpy()
    tiles = []
    for number, image in enumerate(images):
        own = targets[targets[:, 0] == number]
        height, width = image.shape[:2]
        xyxy = cxcywh_to_xyxy(own[:, 2:6] * np.array([width, height] * 2, np.float32))
        boxes = Detections.sorted(xyxy, np.ones(len(own)), own[:, 1].astype(np.int32))
        tiles.append((np.ascontiguousarray(image), boxes, Path(batch.paths[number][0]).name))
    return _grid(tiles, lettering, scores=False)


def truth_picture(samples: Sequence[Sample], lettering: Lettering) -> ImageArray:
    """Validation images with the boxes that they should be found to have."""
    marked = [(s, Detections.sorted(s.xyxy, np.ones(len(s.xyxy)), s.class_ids)) for s in samples[:TILES]]
    return _grid([(_image_of(sample), boxes, sample.path.name) for sample, boxes in marked], lettering, scores=False)


def found_picture(
    found: Sequence[tuple[Sample, Detections]], lettering: Lettering, max_side: int = MAX_SIDE
) -> ImageArray:
    """Validation images with what was detected in them."""
    tiles = [(_image_of(sample), detections, sample.path.name) for sample, detections in found[:TILES]]
    return _grid(tiles, lettering, scores=True, max_side=max_side)


def _image_of(sample: Sample) -> ImageArray:
    try:
        return read_image(sample.path)
    except DataError:
        # It was named when it was validated; its place stays grey.
        return np.full((*sample.image_hw, 3), PAD_VALUE, np.uint8)


def _grid(
    tiles: Sequence[tuple[ImageArray, Detections, str]], lettering: Lettering, *, scores: bool, max_side: int = MAX_SIDE
) -> ImageArray:
    """Each image scaled into its place, boxes and labels drawn at that scale, the file's name above."""
    columns = max(math.ceil(math.sqrt(len(tiles))), 1)
    rows = max(math.ceil(len(tiles) / columns), 1)
    largest = [max((image.shape[side] for image, *_ in tiles), default=1) for side in (0, 1)]
    scale = min(max_side / (rows * largest[0]), max_side / (columns * largest[1]), LARGEST_SCALE)
    height, width = (max(int(side * scale), 1) for side in largest)
    picture = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for number, (image, detections, caption) in enumerate(tiles):
        size = (min(max(int(image.shape[1] * scale), 1), width), min(max(int(image.shape[0] * scale), 1), height))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        tile = np.asarray(cv2.resize(image, size, interpolation=how), np.uint8)
        ratio = np.array([tile.shape[1] / image.shape[1], tile.shape[0] / image.shape[0]] * 2, np.float32)
        scaled, _ = detections.moved(detections.xyxy * ratio)
        tile = draw_detections(
            tile, scaled, lettering.names, min_score=MIN_SCORE, scores=scores, font=lettering.font, letters_as_at=1
        )  # fmt: skip
        row, column = divmod(number, columns)
        top, left = row * (height + _GAP), column * (width + _GAP)
        part = picture[top : top + height, left : left + width]
        part[: tile.shape[0], : tile.shape[1]] = tile
        _write_caption(part, caption)
    return picture


def _write_caption(tile: ImageArray, text: str) -> None:
    """The file's name in the upper left corner, its end where it is too long: that is where names differ."""
    font, scale, width = cv2.FONT_HERSHEY_SIMPLEX, 0.4, tile.shape[1]
    shown = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)
    while len(shown) > 4 and cv2.getTextSize(shown, font, scale, 1)[0][0] > width - 8:
        shown = ".." + shown[3:]
    for ink, thickness in ((0, 3), (255, 1)):
        cv2.putText(tile, shown, (4, 13), font, scale, (ink,) * 3, thickness, cv2.LINE_AA)

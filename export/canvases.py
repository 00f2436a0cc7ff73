"""The canvases that the gate runs on: the user's images, letterboxed as for inference, with their labels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import DataError, ParkdetError, UsageError
from parkdet.runtime.geometry import FloatArray, ImageArray, Letterbox
from parkdet.runtime.geometry import canvas_hw as own_canvas_hw
from parkdet.runtime.image_headers import read_header
from parkdet.runtime.image_names import IMAGE_EXTENSIONS
from parkdet.runtime.images import read_image
from parkdet.runtime.model_spec import ModelSpec

GATE_IMAGES = 32
DRAWN_IMAGES = 12
"""They show a wrong graph, and a few do; how much a precision costs only real images tell."""

Labels = tuple[FloatArray, NDArray[np.int64]]
"""Boxes (M, 4) xyxy and class ids (M,) of one image."""


@dataclass(frozen=True, slots=True, eq=False)
class GateImage:
    """One canvas (H, W, 3) uint8 BGR, and its labels in canvas pixels where the image has some."""

    canvas: ImageArray
    labels: Labels | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GateSource:
    """Where the gate's images come from."""

    paths: tuple[Path, ...]
    """Empty: drawn ones."""
    words: str
    """What they are, for the report."""
    labels: Mapping[str, Labels]
    """By file name, in image pixels and the model's class ids."""

    def images(self, spec: ModelSpec, canvas_hw: tuple[int, int] | None) -> Iterator[GateImage]:
        """The canvases. DataError where none of the files can be read."""
        if not self.paths:
            yield from map(GateImage, generated_canvases(spec, canvas_hw))
            return
        read = 0
        for path in self.paths:
            try:
                image = read_image(path)
            except DataError:
                continue  # the gate needs some readable images, not every one; `prepare` reports the rest
            read += 1
            letterbox = letterbox_of(image.shape[:2], spec, canvas_hw)
            labels = self.labels.get(path.name)
            on_canvas = None if labels is None else (letterbox.to_canvas(labels[0]), labels[1])
            yield GateImage(letterbox.apply(image), on_canvas)
        if read == 0:
            raise DataError(
                f"{self.paths[0].parent}: none of {len(self.paths)} images could be read; run 'parkdet prepare'"
            )


def gate_source(calibration: Path | None, trained_on: object, spec: ModelSpec) -> GateSource:
    """The images of a folder; without one those that the checkpoint was trained on, if they are there; else drawn."""
    if calibration is not None:
        return GateSource(
            tuple(calibration_paths(calibration)), f"images of {calibration}", labels_beside(calibration, spec)
        )
    if isinstance(trained_on, str) and trained_on and Path(trained_on).is_dir() and any(Path(trained_on).iterdir()):
        folder = Path(trained_on)
        return GateSource(tuple(calibration_paths(folder)), f"images of {folder}", labels_beside(folder, spec))
    return GateSource((), "drawn images (name a folder of your own with --calibration)", {})


def calibration_paths(folder: Path, count: int = GATE_IMAGES) -> list[Path]:
    """At most `count` images anywhere under a folder, drawn with a fixed seed. UsageError where there are none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder of calibration images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
    if not found:
        raise UsageError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))}) to prove the export on")
    return sorted(random.Random(0).sample(found, min(count, len(found))))


def labels_beside(folder: Path, spec: ModelSpec) -> dict[str, Labels]:
    """Labels by file name where a folder is a data set's `train/images` and the model has its categories; else none."""
    root = folder.resolve().parent.parent
    if not (root / "train" / "label" / "Train.json").is_file() or folder.resolve() != root / "train" / "images":
        return {}
    try:
        labelled = ContestData(root).train_labels()
        boxes = labelled.clean()
    except ParkdetError:
        return {}  # a gate without labels is a gate all the same; `prepare` says what is wrong with them
    class_of = {category: class_id for class_id, category in enumerate(spec.category_ids)}
    found = {}
    for index, record in enumerate(labelled.records):
        rows = slice(int(boxes.starts[index]), int(boxes.starts[index + 1]))
        categories = [int(category) for category in boxes.category_ids[rows]]
        if record.path is None or not all(category in class_of for category in categories):
            continue
        class_ids = np.array([class_of[category] for category in categories], np.int64)
        found[record.path.name] = (np.asarray(boxes.xyxy[rows], np.float32), class_ids)
    return found


@dataclass(frozen=True, slots=True)
class DataCanvases:
    """The canvases that the images of a data set need."""

    counts: Mapping[tuple[int, int], int]
    """Canvas (height, width) -> images, the most frequent first."""

    @property
    def most_frequent(self) -> tuple[int, int]:
        return next(iter(self.counts))

    def bounds(self, axis: int) -> tuple[int, int, int]:
        """Smallest, most frequent and largest side: axis 0 is the height, 1 the width."""
        sides = [canvas[axis] for canvas in self.counts]
        return min(sides), self.most_frequent[axis], max(sides)


def canvases_of_data(data: Path, spec: ModelSpec) -> DataCanvases:
    """The canvases of a data set's test images (training images without a test set), from the files' headers.

    UsageError where there is no such folder; DataError where no image can be read.
    """
    contest = ContestData(data)
    folder = contest.images_folder("test") if contest.images_folder("test").is_dir() else contest.images_folder("train")
    if not folder.is_dir():
        folder = data  # a plain folder of images serves as well
    counts: Counter[tuple[int, int]] = Counter()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_EXTENSIONS:
            continue
        header = read_header(path)
        if header.width and header.height:
            counts[own_canvas_hw((header.height, header.width), spec.imgsz, spec.stride_max)] += 1
    if not counts:
        raise DataError(f"{folder}: holds no image whose size can be read; name a canvas: --canvas 896x1600")
    return DataCanvases(dict(counts.most_common()))


def generated_canvases(
    spec: ModelSpec, canvas_hw: tuple[int, int] | None, count: int = DRAWN_IMAGES
) -> list[ImageArray]:
    """Drawn canvases for when there are no images: overlapping gradients of many sizes and colours."""
    rng = np.random.default_rng(0)
    canvases = []
    for number in range(count):
        height, width = [(540, 960), (960, 540), (720, 960)][number % 3]
        image = np.full((height, width, 3), rng.integers(256, size=3), np.uint8)
        for _ in range(int(rng.integers(10, 40))):
            h, w = rng.integers(12, height // 2, size=2)
            y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
            left, right = rng.uniform(0, 255, size=2)
            ramp = np.linspace(left, right, int(w))[None, :, None] * rng.uniform(0.3, 1, size=3)
            image[y : y + h, x : x + w] = ramp.astype(np.uint8)
        canvases.append(letterbox_of((height, width), spec, canvas_hw).apply(image))
    return canvases


def letterbox_of(image_hw: tuple[int, int], spec: ModelSpec, canvas_hw: tuple[int, int] | None) -> Letterbox:
    """The way onto the image's own canvas, or onto the fixed one with the image scaled so that it fits."""
    if canvas_hw is None:
        return Letterbox.fit(image_hw, spec.imgsz, spec.stride_max)
    height, width = image_hw
    fitting = min(canvas_hw[0] / height, canvas_hw[1] / width) * max(height, width)
    imgsz = max(min(spec.imgsz, int(fitting)), 1)
    return Letterbox.fit((height, width), imgsz, spec.stride_max, canvas_hw)

"""The canvases that the gate runs on: the user's images, letterboxed as inference letterboxes them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from parkdet.runtime.errors import UsageError
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.image_names import IMAGE_EXTENSIONS
from parkdet.runtime.images import read_image
from parkdet.runtime.model_spec import ModelSpec

GATE_IMAGES = 32


def calibration_paths(folder: Path, count: int = GATE_IMAGES) -> list[Path]:
    """At most `count` images anywhere under a folder, drawn with a fixed seed. UsageError where there are none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder of calibration images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
    if not found:
        raise UsageError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))}) to prove the export on")
    return sorted(random.Random(0).sample(found, min(count, len(found))))


def canvas_of(path: Path, spec: ModelSpec, canvas_hw: tuple[int, int] | None) -> ImageArray:
    """One image's canvas: its own, or the graph's where that is fixed. DataError where it cannot be read."""
    return letterboxed(read_image(path), spec, canvas_hw)


def generated_canvases(
    spec: ModelSpec, canvas_hw: tuple[int, int] | None, count: int = GATE_IMAGES
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
        canvases.append(letterboxed(image, spec, canvas_hw))
    return canvases


def letterboxed(image: ImageArray, spec: ModelSpec, canvas_hw: tuple[int, int] | None) -> ImageArray:
    """The image's own canvas, or the fixed one with the image scaled so that it fits."""
    if canvas_hw is None:
        return Letterbox.fit(image.shape[:2], spec.imgsz, spec.stride_max).apply(image)
    height, width = image.shape[:2]
    fitting = min(canvas_hw[0] / height, canvas_hw[1] / width) * max(height, width)
    imgsz = max(min(spec.imgsz, int(fitting)), 1)
    return Letterbox.fit((height, width), imgsz, spec.stride_max, canvas_hw).apply(image)

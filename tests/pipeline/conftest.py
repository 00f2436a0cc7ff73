"""A data set small enough for tests: coloured rectangles on grey, in the contest's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

COLOURS = ((40, 40, 220), (220, 60, 40), (40, 200, 60))


def write_rectangles(root: Path, train: int, test: int, seed: int = 0) -> Path:
    """`train` and `test` images of 96 x 128 with one to three rectangles, each class its own colour."""
    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        (root / part / "images").mkdir(parents=True)
    (root / "train" / "label").mkdir()
    parts: dict[str, dict[str, Any]] = {}
    for part, count, first in (("train", train, 1), ("test", test, 1001)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(first, first + count):
            name = f"주차장 {number}.v1.png"
            image = rng.integers(90, 140, (96, 128, 3), dtype=np.uint8)
            for _ in range(int(rng.integers(1, 4))):
                category = int(rng.integers(1, 4))
                w, h = (int(v) for v in rng.integers(18, 44, 2))
                x, y = int(rng.integers(0, 128 - w)), int(rng.integers(0, 96 - h))
                cv2.rectangle(image, (x, y), (x + w - 1, y + h - 1), COLOURS[category - 1], -1)
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": category,
                     "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                )  # fmt: skip
            cv2.imwrite(str(root / part / "images" / name), image)
            images.append({"id": number, "file_name": name, "width": 128, "height": 96})
        categories = [{"id": i + 1, "name": text} for i, text in enumerate(("sedan", "van", "bus"))]
        parts[part] = {"images": images, "annotations": annotations, "categories": categories}
    (root / "train" / "label" / "Train.json").write_text(json.dumps(parts["train"], ensure_ascii=False))
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": parts["test"]["images"]}))
    (root / "test_ground_truth.json").write_text(json.dumps(parts["test"]))
    sample = [{"image_id": 1001, "category_id": 1, "bbox": [1.0, 1.0, 5.0, 5.0], "score": 0.5, "segmentation": []}]
    (root / "sample_submission.json").write_text(json.dumps(sample))
    return root


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images to train on, 10 to test."""
    return write_rectangles(tmp_path_factory.mktemp("data") / "사각형 data", 40, 10)

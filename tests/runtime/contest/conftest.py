"""A small data set in the contest's layout that a test damages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.runtime.check_report import CheckReport, Finding, Kind
from parkdet.runtime.contest import ContestData, LabelledImages
from parkdet.runtime.contest_check import check_data


class ContestFolder:
    """Two training images of 64 x 36 with three boxes, one test image; JSON is written when it is asked for."""

    width, height = 64, 36
    name = "20201102_경기도_-_-_맑음 주간.v1_000079.png"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train: dict[str, Any] = {
            "images": [self.image(7, self.name), self.image(3, "B.PNG")],
            "annotations": [
                self.box(3, [1, 2, 10, 12.5], 2),
                self.box(7, [5, 5, 20, 20]),
                self.box(3, [30, 2, 9, 9]),
            ],
            "categories": [{"id": 2, "name": "van"}, {"id": 1, "name": "sedan"}],
        }
        self.test: dict[str, Any] = {"images": [self.image(1001, "t.png")]}
        for part, names in (("train", (self.name, "B.PNG")), ("test", ("t.png",))):
            for name in names:
                self.put(part, name, self.png())

    @classmethod
    def png(cls, width: int = width, height: int = height, seed: int = 0) -> bytes:
        """A picture of noise."""
        image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        return cv2.imencode(".png", image)[1].tobytes()

    @classmethod
    def image(cls, image_id: int, name: str, **changes: Any) -> dict[str, Any]:
        """An entry of `images`."""
        return {"id": image_id, "file_name": name, "width": cls.width, "height": cls.height} | changes

    @staticmethod
    def box(image_id: int, bbox: list[Any], category_id: int = 1, **changes: Any) -> dict[str, Any]:
        """An entry of `annotations`."""
        return {"image_id": image_id, "category_id": category_id, "bbox": bbox} | changes

    def put(self, part: str, name: str, content: bytes) -> Path:
        """Write a file into a part's folder of images."""
        path = self.root / part / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def data(self) -> ContestData:
        """The folder, its JSON files written as the dictionaries now are."""
        label = self.root / "train" / "label" / "Train.json"
        label.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate has no UTF-8; JSON writes it as an escape.
        plain = all(str(entry["file_name"]).isprintable() for entry in self.train["images"][2:])
        label.write_text(json.dumps(self.train, ensure_ascii=not plain), encoding="utf-8")
        text = json.dumps(self.test, ensure_ascii=False)
        (self.root / "Test_Images_Information.json").write_text(text, encoding="utf-8")
        return ContestData(self.root)

    def labels(self) -> LabelledImages:
        """The training images as read."""
        return self.data().train_labels()

    def check(self, decode: bool = False) -> CheckReport:
        """The report on the folder."""
        return check_data(self.data(), decode)

    @staticmethod
    def finding(report: CheckReport, kind: Kind, part: str = "train") -> Finding:
        """The one finding of that kind in that part."""
        found = [f for f in report.findings if f.kind is kind and f.part == part]
        assert len(found) == 1, [(f.part, f.kind) for f in report.findings]
        return found[0]


@pytest.fixture
def folder(tmp_path: Path) -> ContestFolder:
    """A fresh data set."""
    return ContestFolder(tmp_path / "data")

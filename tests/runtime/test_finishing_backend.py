"""A backend that letterboxes and suppresses itself gives the pipeline and the detector the same detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.runtime.backends.base import FinishingBackend
from parkdet.runtime.canvas_choice import fit_letterbox
from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray, ImageArray, Letterbox
from parkdet.runtime.heads import decode_candidates
from parkdet.runtime.loading import ImageItem
from parkdet.runtime.nms import NmsCounts, NmsSettings, suppress
from parkdet.runtime.pipeline import Pipeline, PipelineSettings
from parkdet.runtime.store import RunStore, read_predictions

SIZES = ((60, 90), (90, 60), (60, 90), (50, 50), (300, 40), (45, 96))


class HeadsBackend:
    """The tiny model in numpy."""

    name = "numpy"
    path = Path("tiny")
    precision = "fp32"
    parallel = 2
    fixed_input: tuple[int | None, int | None, int | None] = (None, None, None)

    def __init__(self, model: Any) -> None:
        self.model = model
        self.spec = model.spec

    def infer(self, canvases: ImageArray) -> list[FloatArray]:
        heads: list[FloatArray] = self.model.heads(canvases)
        return heads

    def close(self) -> None:
        pass


class DetectingBackend(HeadsBackend):
    """The same, with letterbox and NMS of its own."""

    canvases: tuple[tuple[int, int], ...] = ()

    def detect(
        self, images: Sequence[ImageArray], letterboxes: Sequence[Letterbox], nms: NmsSettings
    ) -> list[tuple[Detections, NmsCounts]]:
        assert len({letterbox.canvas_hw for letterbox in letterboxes}) == 1
        assert [image.shape[:2] for image in images] == [letterbox.image_hw for letterbox in letterboxes]
        canvases = np.stack([box.apply(image) for box, image in zip(letterboxes, images, strict=True)])
        return [suppress(one, nms) for one in decode_candidates(self.infer(canvases), self.spec, nms.conf)]


def test_the_protocol_tells_them_apart(tiny_model: Any) -> None:
    assert isinstance(DetectingBackend(tiny_model), FinishingBackend)
    assert not isinstance(HeadsBackend(tiny_model), FinishingBackend)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_pipeline_stores_the_same(
    tiny_model: Any, tmp_path: Path, picture: Callable[..., ImageArray], batch_size: int
) -> None:
    items = []
    for index, (height, width) in enumerate(SIZES):
        path = tmp_path / f"{index}.png"
        cv2.imwrite(str(path), picture(height, width, index))
        items.append(ImageItem(image_id=index, file_name=path.name, path=path))
    runs = []
    for backend in (HeadsBackend(tiny_model), DetectingBackend(tiny_model)):
        run = tmp_path / type(backend).__name__
        with RunStore(run, {"model": "m"}) as store:
            report = Pipeline(backend, PipelineSettings(imgsz=96, batch_size=batch_size)).run(items, store)
        assert report.done == len(SIZES)
        runs.append(read_predictions(run))
    assert len(runs[0]) > 50
    assert runs[0].equals(runs[1])


def test_an_image_goes_onto_its_own_canvas_or_the_one_that_shows_it_largest(tiny_model: Any) -> None:
    backend = DetectingBackend(tiny_model)
    assert fit_letterbox((60, 90), 96, backend) == Letterbox.fit((60, 90), 96, 16)
    backend.canvases = ((80, 112), (112, 112), (112, 80))
    assert fit_letterbox((60, 90), 96, backend).canvas_hw == (80, 112) == Letterbox.fit((60, 90), 96, 16).canvas_hw
    # 45 x 96 has a canvas of 64 x 112, which nobody runs; both wide ones show it as large.
    assert fit_letterbox((45, 96), 96, backend) == Letterbox.fit((45, 96), 96, 16, (80, 112))
    backend.canvases = ((48, 48), (80, 48))
    assert fit_letterbox((90, 45), 96, backend) == Letterbox.fit((90, 45), 80, 16, (80, 48))

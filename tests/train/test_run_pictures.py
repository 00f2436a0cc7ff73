"""What a run leaves to look at: which files, that failures are named and harm nothing, that it spares the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from parkdet.runtime.detections import Detections
from parkdet.runtime.evaluation import evaluate
from parkdet.runtime.model_spec import ModelSpec
from parkdet.train import run_pictures
from parkdet.train.data.loader import TrainingBatch
from parkdet.train.data.samples import Sample
from parkdet.train.lettering import Lettering
from parkdet.train.picture_grid import batch_picture, found_picture, truth_picture
from parkdet.train.run_log import EventsFile
from parkdet.train.run_pictures import RunPictures
from parkdet.train.validate import Validation

PLAIN = Lettering(("a", "b"), ("DejaVu Sans",), None, "")
SPEC = ModelSpec(
    class_names=("a", "b"), category_ids=(1, 2), strides=(8,), anchors=(((10.0, 13.0), (16.0, 30.0)),), imgsz=64
)


def make_samples(folder: Path, count: int) -> list[Sample]:
    samples = []
    for number in range(count):
        path = folder / f"{number}.png"
        cv2.imwrite(str(path), np.full((60, 80, 3), 40 + number, np.uint8))
        xyxy = np.array([[10, 10, 30, 40], [40, 20, 70, 50]], np.float32)[: number % 3]
        samples.append(Sample(number, path, (60, 80), np.arange(len(xyxy), dtype=np.int32), xyxy))
    return samples


def validation(samples: Sequence[Sample]) -> Validation:
    truth = {
        "images": [{"id": s.image_id} for s in samples],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": 10 * s.image_id + i, "image_id": s.image_id, "category_id": i + 1, "bbox": [10, 10, 20, 30]}
            for s in samples
            for i in range(len(s.xyxy))
        ],
    }
    rows = [{"image_id": s.image_id, "category_id": 1, "bbox": [10, 10, 20, 30], "score": 0.8} for s in samples]
    found = tuple((s, Detections.sorted([[10, 10, 30, 40]], [0.8], [0])) for s in samples)
    return Validation(evaluation=evaluate(rows, truth), losses=(0, 0, 0), unreadable=(), found=found)


def batch(count: int) -> TrainingBatch:
    images = torch.full((count, 3, 64, 64), 200, dtype=torch.uint8)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.25, 0.5]])
    return TrainingBatch(
        images=images, targets=targets, image_ids=tuple(range(count)), paths=tuple((f"{i}.png",) for i in range(count))
    )


def test_a_run_leaves_what_yolov5s_users_know(tmp_path: Path) -> None:
    samples, said = make_samples(tmp_path, 50), list[str]()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.csv").write_text("epoch,train/box_loss\n0,0.1\n")
    pictures = RunPictures(folder, SPEC, said.append)
    pictures.labels(samples)
    for number in range(5):
        pictures.training_batch(0, number, batch(2))
    pictures.epoch_ended(0, validation(samples))
    pictures.validation(validation(samples))
    expected = {"labels.jpg", "labels_correlogram.jpg", "confusion_matrix.png", "results.csv", "results.png"}
    expected |= {f"train_batch{i}.jpg" for i in range(3)}
    expected |= {f"val_batch{i}_{kind}.jpg" for i in range(3) for kind in ("labels", "pred")}
    expected |= {f"{name}_curve.png" for name in ("PR", "F1", "P", "R")}
    assert {path.name for path in folder.iterdir()} == expected
    assert said == []


def test_an_image_without_a_box_has_no_curves(tmp_path: Path) -> None:
    RunPictures(tmp_path, SPEC, pytest.fail).validation(validation(make_samples(tmp_path, 1)))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"0.png", "confusion_matrix.png", "val_batch0_labels.jpg", "val_batch0_pred.jpg"}


def test_boxes_stand_where_they_belong(tmp_path: Path) -> None:
    """Images are drawn three times as large, side by side; a box's outline is where the box is."""
    samples = make_samples(tmp_path, 3)
    picture = truth_picture(samples, PLAIN)
    assert picture.shape == (2 * 180 + 4, 2 * 240 + 4, 3)
    third = picture[184:, :240]
    assert (third[60, 210] != 42).any() and (third[105, 210] != 42).any()  # right edge of 40, 20, 70, 50
    assert (third[105, 150] == 42).all()  # inside of it
    assert (picture[:180, :240][30:] == 40).all()  # the first has no boxes, only its name
    found = found_picture(validation(samples).found, PLAIN)
    assert (found[60, 90] != 40).any()  # right edge of 10, 10, 30, 40 in the first


def test_a_training_batch_is_drawn_as_the_network_sees_it() -> None:
    picture = batch_picture(batch(1), PLAIN)
    assert picture.shape == (192, 192, 3)
    assert (picture[96, 72] != 200).any() and (picture[96, 96] == 200).all()


def test_an_image_that_cannot_be_read_leaves_its_place_grey(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 1)
    samples[0].path.write_bytes(b"")
    assert (truth_picture(samples, PLAIN)[60:] == 114).all()


def test_a_failure_is_named_once_and_nothing_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise ValueError("no ink")

    monkeypatch.setattr(run_pictures, "confusion_figure", broken)
    said: list[str] = []
    pictures = RunPictures(tmp_path, SPEC, said.append)
    for _ in range(2):
        pictures.validation(validation(make_samples(tmp_path, 3)))
    assert len(said) == 1
    assert "confusion_matrix.png could not be drawn (no ink)" in said[0]
    assert (tmp_path / "PR_curve.png").exists() and (tmp_path / "val_batch0_pred.jpg").exists()


def test_what_is_drawn_again_and_again_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []

    def slow(_path: Path) -> bytes:
        now[0] += 2
        drawn.append(now[0])
        return b"picture"

    monkeypatch.setattr(run_pictures, "results_figure", slow)
    monkeypatch.setattr("parkdet.train.run_pictures.time.monotonic", lambda: now[0])
    (tmp_path / "results.csv").write_text("epoch\n")
    pictures = RunPictures(tmp_path, SPEC, print)
    for epoch in range(1000):
        now[0] += 1
        pictures.epoch_ended(epoch, None)
    assert 2 * len(drawn) <= 0.02 * now[0]
    assert len(drawn) > 2
    pictures.results()  # at the end in any case
    assert drawn[-1] == now[0]


def test_nothing_is_drawn_where_it_is_not_wanted(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 3)
    before = set(tmp_path.iterdir())
    pictures = RunPictures(tmp_path, SPEC, print, wanted=False)
    pictures.labels(samples)
    pictures.training_batch(0, 0, batch(1))
    pictures.validation(validation(samples))
    assert set(tmp_path.iterdir()) == before


def test_the_events_hold_the_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = make_samples(tmp_path, 3)
    pictures = RunPictures(tmp_path, SPEC, print)
    pictures.events = EventsFile(tmp_path, 0, print)
    pictures.training_batch(0, 0, batch(2))
    pictures.epoch_ended(4, validation(samples))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["images"]) == {"train_batch0", "val_batch0_pred"}
    (image,) = events.Images("val_batch0_pred")
    assert image.step == 4
    shown = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None and shown.shape[:2] == (image.height, image.width)

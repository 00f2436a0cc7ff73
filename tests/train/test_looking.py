"""What `train` and `val` leave to look at, from a run that was stopped and resumed to another tool's figures."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from parkdet.runtime.errors import Interrupted
from parkdet.train.config import load_recipe
from parkdet.train.interrupt import StopSwitch
from parkdet.train.run import RunSettings, resume_run, start_run
from parkdet.train.run_pictures import RunPictures

TINY = ("imgsz=64", "batch_size=4", "nominal_batch=4", "epochs=3", "cache=none", "precision=fp32", "split.count=4")
PICTURES = {
    "labels.jpg", "labels_correlogram.jpg", "results.png", "confusion_matrix.png",
    *(f"{name}_curve.png" for name in ("PR", "F1", "P", "R")),
    *(f"train_batch{number}.jpg" for number in range(2)), "val_batch0_labels.jpg", "val_batch0_pred.jpg",
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images of one coloured square each; its colour is its class."""
    folder = tmp_path / "data" / "train"
    (folder / "images").mkdir(parents=True)
    (folder / "label").mkdir()
    images, annotations = [], []
    for number in range(12):
        pixels = np.full((48, 64, 3), 128, np.uint8)
        left, colour = 4 + 3 * (number % 8), ((255, 0, 0), (0, 0, 255))[number % 2]
        pixels[10:34, left : left + 24] = colour
        cv2.imwrite(str(folder / "images" / f"{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png"})
        box = {"bbox": [left, 10, 24, 24], "category_id": 7 + number % 2}
        annotations.append({"id": number + 1, "image_id": number, "area": 576, "iscrowd": 0, **box})
    categories = [{"id": 7, "name": "blue"}, {"id": 8, "name": "red"}]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / "label" / "Train.json").write_text(text)
    return folder.parent


def test_a_run_that_was_stopped_and_resumed_and_what_val_says_of_it(
    data: Path, tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = tmp_path / "run", list[str]()
    run.mkdir()
    settings = RunSettings(data=str(data), device="cpu", workers=0, recipe=load_recipe("small", TINY))
    with monkeypatch.context() as patch:
        # Ctrl-C in the second epoch, when two batches an epoch have been seen three times.
        seen: list[int] = []

        def stop_later(_pictures: RunPictures, *place: Any) -> None:
            seen.append(place[0])

        patch.setattr(RunPictures, "training_batch", stop_later)
        stop_asked = property(lambda _self: len(seen) == 3, lambda _self, _value: None)
        patch.setattr(StopSwitch, "asked", stop_asked, raising=False)
        with pytest.raises(Interrupted):
            start_run(run, settings, said.append)
    with (run / "results.csv").open("a") as file:
        file.write("1,0.5")  # what a kill leaves of a row
    best = resume_run(run, said.append)
    with (run / "results.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    # The pictures of the first epoch's batches were not drawn: this test stood in their way.
    assert {path.name for path in run.iterdir() if path.suffix in (".png", ".jpg")} == {
        name for name in PICTURES if not name.startswith("train_batch")
    }
    assert "mAP@.75" in "\n".join(said) and "101 recall points" in "\n".join(said)

    code, out, err = run_cli(
        "val", "--weights", best, "--data", data, "--conf-thres", "0.001", "--save-json", "--project", tmp_path / "val"
    )
    assert code == 0, err
    folder = tmp_path / "val" / "exp"
    assert err.splitlines()[0] == err.splitlines()[-1] == f"run folder: {folder}"
    drawn = {name for name in PICTURES if not name.startswith(("train", "labels", "results"))}
    assert {path.name for path in folder.iterdir()} == drawn | {"best_predictions.json", ".lock"}
    header, *rows, note = out.splitlines()
    assert header.split() == ["Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.75", "mAP@.5:.95"]
    assert [row.split()[0] for row in rows] == ["all", "blue", "red"]
    assert "101 recall points" in note
    for row, classes in zip(rows, ([7, 8], [7], [8]), strict=True):
        expected = pycocotools_figures(data / "train/label/Train.json", folder / "best_predictions.json", classes)
        assert [float(cell) for cell in row.split()[5:]] == [float(f"{value:.3g}") for value in expected]


def pycocotools_figures(truth: Path, found: Path, categories: list[int]) -> tuple[float, float, float]:
    """mAP@.5, mAP@.75 and mAP@.5:.95 of these categories on the images that have detections, by the public tool."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO(str(truth))
        evaluator = COCOeval(dataset, dataset.loadRes(str(found)), "bbox")
        evaluator.params.imgIds = sorted({row["image_id"] for row in json.loads(found.read_text())})
        evaluator.params.catIds = categories
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[1], evaluator.stats[2], evaluator.stats[0]


def test_pictures_are_not_drawn_where_they_are_not_wanted(data: Path, tmp_path: Path) -> None:
    recipe = load_recipe("small", (*TINY, "epochs=1"))
    settings = RunSettings(data=str(data), device="cpu", workers=0, plots=False, recipe=recipe)
    (tmp_path / "run").mkdir()
    start_run(tmp_path / "run", settings, lambda _line: None)
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.suffix in (".png", ".jpg")]

"""The figures: that they are drawn from what they are given, down to nothing, and that names can be read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from parkdet.runtime.evaluation import Evaluation, evaluate
from parkdet.runtime.geometry import ImageArray
from parkdet.train import plots
from parkdet.train.lettering import Lettering

KOREAN = ("세단", "SUV", "전동킥보드")


@pytest.fixture(autouse=True)
def _nothing_is_warned_of() -> Iterator[None]:
    """matplotlib warns of letters that its fonts lack, and numpy of means of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def decoded(content: bytes) -> ImageArray:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return np.asarray(image, np.uint8)


def measured(boxes: int, classes: int = 3) -> Evaluation:
    """Half of the boxes are found, and as many that are not there."""
    rng = np.random.default_rng(1)
    truth = [
        {"image_id": 1, "category_id": 1 + i % classes, "bbox": [20.0 * i, 5.0, 15.0, 15.0], "area": 225.0, "id": i + 1}
        for i in range(boxes)
    ]
    found = [{**row, "score": float(rng.uniform(0.1, 1))} for row in truth[::2]]
    found += [{**row, "bbox": [20.0 * i, 90.0, 9.0, 9.0]} for i, row in enumerate(found)]
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(classes)]
    return evaluate(found, {"images": [{"id": 1}], "categories": categories, "annotations": truth})


def latin(count: int = 3) -> Lettering:
    return Lettering(tuple(f"class {i}" for i in range(count)), ("DejaVu Sans",), None, "")


def test_results_are_drawn_with_and_without_validation(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    # YOLOv5 pads its columns; a cell is empty where an epoch was not validated.
    path.write_text("   epoch,  train/box_loss, metrics/mAP_0.5,x/lr2\n0,0.1,,0.01\n1,0.05,0.25,0.005\n")
    drawn = decoded(plots.results_figure(path))
    assert drawn.shape[1] > drawn.shape[0] > 500
    path.write_text("epoch,train/box_loss\n")
    assert (decoded(plots.results_figure(path)) != drawn).any()


@pytest.mark.parametrize("classes", [1, 25])
def test_curves_have_yolov5s_names(classes: int) -> None:
    figures = plots.curve_figures(measured(50, classes), latin(classes))
    assert set(figures) == {"PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png"}
    assert len(set(figures.values())) == 4
    for content in figures.values():
        decoded(content)


def test_without_truth_there_are_no_curves() -> None:
    found = measured(0)
    assert math.isnan(found.map50)
    assert plots.curve_figures(found, latin()) == {}
    # A class without truth is left out, the others are drawn.
    assert len(plots.curve_figures(measured(1), latin())) == 4


@pytest.mark.parametrize("classes", [0, 40])
def test_a_confusion_matrix_of_any_size(classes: int) -> None:
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    empty = decoded(plots.confusion_figure(counts, latin(classes)))
    counts[-1, 0] = 4
    assert (decoded(plots.confusion_figure(counts, latin(classes))) != empty).any()


@pytest.mark.parametrize("count", [0, 3000])
def test_label_statistics_of_any_number_of_boxes(count: int) -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 1, (count, 4)).astype(np.float32)
    class_ids = rng.integers(3, size=count).astype(np.int32)
    decoded(plots.labels_figure(class_ids, boxes, latin()))
    decoded(plots.correlogram_figure(boxes))


def test_names_that_matplotlibs_own_font_can_write_stay() -> None:
    assert Lettering.of(()).names == ()
    plain = Lettering.of(("van", "school bus"))
    assert (plain.names, plain.font, plain.note) == (("van", "school bus"), None, "")
    accented = Lettering.of(("véhicule",))
    assert accented.names == ("véhicule",) and accented.font is not None and not accented.note


def test_names_without_a_font_become_numbers_and_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [str(damaged)])
    found = Lettering.of(KOREAN)
    assert (found.names, found.font) == (("#0", "SUV", "#2"), None)
    assert "#0 세단, #2 전동킥보드" in found.note and "fonts-nanum" in found.note
    # Nothing is left that a font lacks: matplotlib would warn.
    plots.confusion_figure(np.ones((4, 4), np.int64), found)
    plots.curve_figures(measured(9), found)


def test_a_font_of_the_machine_writes_korean() -> None:
    found = Lettering.of(KOREAN)
    if found.font is None:
        pytest.skip("no font on this machine has Korean letters")
    assert found.names == KOREAN and not found.note
    plots.confusion_figure(np.ones((4, 4), np.int64), found)

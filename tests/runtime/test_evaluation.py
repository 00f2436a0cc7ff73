"""AP equals pycocotools'; P and R equal a plain loop over YOLOv5's rule; wrong content is told."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from parkdet.runtime.errors import UsageError
from parkdet.runtime.evaluation import Evaluation, display_width, evaluate, evaluation_note, evaluation_table, metric

Rows = list[dict[str, Any]]


def scene(
    seed: int, images: int = 8, classes: int = 4, truths: int = 60, detections: int = 400, crowds: float = 0.1
) -> tuple[dict[str, Any], Rows]:
    """Random truth, its last class without boxes, and detections around it with many equal scores."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:images] + 5
    annotations: Rows = []
    for number in range(truths):
        x, y, w, h = np.round([*rng.uniform(0, 400, 2), *rng.choice([6, 25, 70, 150], 2) * rng.uniform(0.7, 1.3, 2)], 1)
        annotations.append(
            {
                "id": number + 1,
                "image_id": int(rng.choice(ids)),
                "category_id": int(rng.integers(1, classes)),
                "bbox": [float(x), float(y), float(w), float(h)],
                "area": float(w * h),
                "iscrowd": int(rng.random() < crowds),
            }
        )
    results: Rows = []
    for _ in range(detections):
        near = annotations[rng.integers(len(annotations))]
        x, y, w, h = np.array(near["bbox"]) + rng.normal(0, 4, 4)
        results.append(
            {
                "image_id": near["image_id"],
                "category_id": near["category_id"] if rng.random() < 0.8 else int(rng.integers(1, classes + 1)),
                "bbox": [float(x), float(y), max(float(w), 0.5), max(float(h), 0.5)],
                "score": float(np.round(rng.random(), 1 + seed % 3)),
            }
        )
    truth = {
        "images": [{"id": int(number), "file_name": f"{number}.png"} for number in ids],
        "annotations": annotations,
        "categories": [{"id": number + 1, "name": f"class{number}"} for number in range(classes)],
    }
    return truth, results


def pycocotools_precision(truth: dict[str, Any], results: Rows, max_det: int) -> np.ndarray[Any, Any]:
    """(10 thresholds, 101 recalls, classes, 4 areas), as the public tool computes it."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = json.loads(json.dumps(truth))
        dataset.createIndex()
        evaluator = COCOeval(dataset, dataset.loadRes(json.loads(json.dumps(results))), "bbox")
        # The tool sorts the list, so a max_det under 10 must stand in it alone.
        evaluator.params.maxDets = [1, 10, max_det] if max_det >= 10 else [max_det]
        evaluator.evaluate()
        evaluator.accumulate()
    precision: np.ndarray[Any, Any] = evaluator.eval["precision"][..., -1]
    return precision


def mean(values: np.ndarray[Any, Any]) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan


def assert_is_pycocotools(found: Evaluation, precision: np.ndarray[Any, Any]) -> None:
    wanted = [mean(p) for p in (precision[..., 0], precision[0, ..., 0], precision[5, ..., 0])]
    wanted += [mean(precision[..., area]) for area in (1, 2, 3)]
    ours = [found.map, found.map50, found.map75, found.map_small, found.map_medium, found.map_large]
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    for index, entry in enumerate(found.per_class):
        own = precision[:, :, index, 0]
        np.testing.assert_allclose(
            [entry.ap, entry.ap50, entry.ap75], [mean(own), mean(own[0]), mean(own[5])], atol=1e-6
        )


def table_of(results: Rows) -> pl.DataFrame:
    columns: dict[str, Any] = {key: [row[key] for row in results] for key in ("image_id", "category_id")}
    columns |= {name: [row["bbox"][place] for row in results] for place, name in enumerate("xywh")}
    return pl.DataFrame(columns | {"score": [row["score"] for row in results]})


def test_no_detections_score_zero() -> None:
    truth, _ = scene(0)
    for found in (evaluate([], truth), evaluate(table_of([]), truth)):
        assert (found.map, found.map50, found.precision, found.recall) == (0, 0, 0, 0)
        assert metric(found) == 0


def test_without_truth_nothing_is_measured() -> None:
    truth, results = scene(0)
    for empty in (truth | {"annotations": []}, {"images": truth["images"], "annotations": []}):
        found = evaluate(results, empty)
        assert all(map(math.isnan, (found.map, found.map75, found.map_large, found.precision, found.recall)))
        assert math.isnan(metric(found))
        assert found.truths == 0
        assert {entry.category_id for entry in found.per_class} == {1, 2, 3, 4}
    nothing = evaluate([], {"images": [], "annotations": []})
    assert math.isnan(nothing.map)
    assert (nothing.images, nothing.per_class) == (0, ())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("max_det", [100, 50, 5])
def test_ap_equals_pycocotools(seed: int, max_det: int) -> None:
    truth, results = scene(seed)
    assert_is_pycocotools(evaluate(results, truth, max_det), pycocotools_precision(truth, results, max_det))


@pytest.mark.parametrize("max_det", [1, 20, 100, 300])
def test_ap_equals_pycocotools_with_hundreds_of_detections_an_image(max_det: int) -> None:
    truth, results = scene(3, images=1, classes=2, truths=40, detections=700)
    precision = pycocotools_precision(truth, results, max_det)
    found = evaluate(table_of(results), truth, max_det)
    assert_is_pycocotools(found, precision)
    assert found.max_det == max_det


def test_ap_equals_pycocotools_where_every_score_ties() -> None:
    truth, results = scene(5)
    tied = [row | {"score": 0.5} for row in results]
    assert_is_pycocotools(evaluate(table_of(tied), truth), pycocotools_precision(truth, tied, 100))


def test_files_lists_and_tables_give_the_same(tmp_path: Path) -> None:
    truth, results = scene(1)
    truth_file, results_file = tmp_path / "truth.json", tmp_path / "submission.json"
    truth_file.write_text(json.dumps(truth))
    results_file.write_text(json.dumps([row | {"segmentation": []} for row in results]))
    wanted = evaluate(results, truth)
    assert wanted.map > 0.1
    for found in (
        evaluate(results_file, truth_file),
        evaluate(table_of(results), truth),
        evaluate(str(results_file), truth),
    ):
        assert str(found) == str(wanted)  # NaN is not equal to itself


def test_absent_area_crowd_and_categories_are_filled_in() -> None:
    truth, results = scene(2, crowds=0)
    bare = [{key: row[key] for key in ("image_id", "category_id", "bbox")} for row in truth["annotations"]]
    found = evaluate(results, {"images": truth["images"], "annotations": bare})
    assert_is_pycocotools(found, pycocotools_precision(truth, results, 100))
    assert [entry.name for entry in found.per_class] == ["1", "2", "3", "4"]


def test_boxes_of_no_size_are_ignored() -> None:
    truth, results = scene(4)
    first = truth["annotations"][0]
    flat = [
        first | {"id": 900 + i, "bbox": [1, 1, w, h], "area": 0} for i, (w, h) in enumerate([(0, 9), (9, 0), (0, 0)])
    ]
    wanted = evaluate(results, truth)
    found = evaluate(results, truth | {"annotations": [*flat, *truth["annotations"]]})
    assert str(found) == str(wanted)


def test_image_ids_may_be_text() -> None:
    truth, results = scene(6)
    # Zeros in front keep the order of the numbers, and so pycocotools' order of ties.
    images = [row | {"id": f"{row['id']:04}"} for row in truth["images"]]
    annotations = [row | {"image_id": f"{row['image_id']:04}"} for row in truth["annotations"]]
    named = [row | {"image_id": f"{row['image_id']:04}"} for row in results]
    text_truth = truth | {"images": images, "annotations": annotations}
    for detections in (named, table_of(named)):
        assert str(evaluate(detections, text_truth)) == str(evaluate(results, truth))


def test_counts_are_of_images_and_boxes_that_count() -> None:
    def box(image: int, category: int, **more: int) -> dict[str, Any]:
        return {"image_id": image, "category_id": category, "bbox": [0, 0, 10, 10], **more}

    truth = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "categories": [{"id": 7, "name": "cart"}, {"id": 3, "name": "van"}],
        "annotations": [box(1, 3), box(1, 3), box(2, 3), box(2, 7, iscrowd=1)],
    }
    found = evaluate([], truth)
    assert (found.images, found.truths) == (3, 3)
    assert [(c.category_id, c.name, c.images, c.truths) for c in found.per_class] == [
        (3, "van", 2, 3),
        (7, "cart", 0, 0),
    ]
    assert math.isnan(found.per_class[1].ap)
    assert math.isnan(found.per_class[1].recall)


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def plain_precision_and_recall(truth: dict[str, Any], results: Rows) -> tuple[float, dict[int, tuple[float, float]]]:
    """YOLOv5's rule, one detection after the other: the confidence, and P and R by class."""
    grid = np.linspace(0, 1, 1000)
    curves: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    for category in sorted({row["category_id"] for row in truth["annotations"]}):
        boxes = [row for row in truth["annotations"] if row["category_id"] == category]
        own = sorted((row for row in results if row["category_id"] == category), key=lambda row: -row["score"])
        taken: set[int] = set()
        scores, precision, recall = [], [], []
        for row in own:
            overlaps = {box["id"]: iou(box["bbox"], row["bbox"]) for box in boxes if box["image_id"] == row["image_id"]}
            nearest = max(overlaps, key=lambda key: overlaps[key], default=None)
            if nearest is not None and overlaps[nearest] >= 0.5:
                taken.add(nearest)
            scores.append(-row["score"])
            precision.append(len(taken) / (len(scores)))
            recall.append(len(taken) / len(boxes))
        curves[category] = (
            (np.interp(-grid, scores, precision, left=1), np.interp(-grid, scores, recall, left=0))
            if own
            else (np.zeros(1000), np.zeros(1000))
        )
    f1 = np.mean([2 * p * r / np.maximum(p + r, 1e-16) for p, r in curves.values()], axis=0)
    smooth = [np.mean([f1[min(max(k, 0), 999)] for k in range(i - 50, i + 51)]) for i in range(1000)]
    at = int(np.argmax(smooth))
    return float(grid[at]), {category: (p[at], r[at]) for category, (p, r) in curves.items()}


@pytest.mark.parametrize("seed", range(6))
def test_precision_and_recall_are_read_as_yolov5_does(seed: int) -> None:
    truth, results = scene(seed, truths=150, detections=300, crowds=0)
    rng = np.random.default_rng(seed)
    # Better scores for better boxes, and no ties: among equal scores YOLOv5's own order is arbitrary.
    scored = [row | {"score": float(rng.beta(2, 2))} for row in results]
    confidence, by_class = plain_precision_and_recall(truth, scored)
    found = evaluate(scored, truth, max_det=1000)
    assert found.confidence == pytest.approx(confidence)
    for entry in found.per_class:
        if entry.truths:
            assert (entry.precision, entry.recall) == pytest.approx(by_class[entry.category_id])
        else:
            assert math.isnan(entry.precision)
    assert found.precision == pytest.approx(np.mean([p for p, _ in by_class.values()]))
    assert found.recall == pytest.approx(np.mean([r for _, r in by_class.values()]))
    assert 0.05 < found.precision < 1


def test_boxes_compared_in_many_small_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, results = scene(2)
    wanted = evaluate(results, truth)
    monkeypatch.setattr("parkdet.runtime.operating_point._PAIRS_AT_ONCE", 7)
    assert str(evaluate(results, truth)) == str(wanted)


def test_a_perfect_detector_has_precision_and_recall_1() -> None:
    truth, _ = scene(1, crowds=0)
    boxes = {json.dumps([row["image_id"], row["category_id"], row["bbox"]]): row for row in truth["annotations"]}
    perfect = [row | {"score": 0.9} for row in boxes.values()]
    found = evaluate(perfect, truth | {"annotations": list(boxes.values())})
    assert (found.map, found.precision, found.recall) == pytest.approx((1, 1, 1))


def test_detections_in_a_crowd_are_neither_right_nor_wrong() -> None:
    truth = {
        "images": [{"id": 1}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
            {"image_id": 1, "category_id": 1, "bbox": [100, 100, 200, 200], "iscrowd": 1},
        ],
    }
    right = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9}
    crowd = {"image_id": 1, "category_id": 1, "bbox": [120, 120, 20, 20], "score": 0.95}
    wrong = {"image_id": 1, "category_id": 1, "bbox": [50, 50, 20, 20], "score": 0.95}
    assert evaluate([right, crowd], truth).precision == pytest.approx(1)
    assert evaluate([right, wrong], truth).precision == pytest.approx(0.5)


def test_only_the_best_max_det_of_an_image_and_class_count() -> None:
    truth = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}]}
    wrong: dict[str, Any] = {"image_id": 1, "category_id": 1, "bbox": [50, 50, 20, 20], "score": 0.95}
    right = wrong | {"bbox": [0, 0, 10, 10], "score": 0.9}
    assert evaluate([right, wrong], truth, max_det=1).recall == 0
    assert evaluate([right, wrong], truth, max_det=2).recall == pytest.approx(1)


def test_the_metric_is_a_weighted_sum() -> None:
    truth, results = scene(1)
    found = evaluate(results, truth)
    assert metric(found) == pytest.approx(0.1 * found.map50 + 0.9 * found.map75)
    assert metric(found, {"map": 2.0}) == pytest.approx(2 * found.map)
    for weights in ({"map60": 1.0}, {}):
        with pytest.raises(UsageError, match="map, map50, map75"):
            metric(found, weights)


def test_the_table_is_yolov5s_with_korean_names_in_line() -> None:
    truth, results = scene(1, classes=3)
    truth["categories"] = [{"id": 1, "name": "전동킥보드"}, {"id": 2, "name": "SUV"}, {"id": 3, "name": "학원차량"}]
    found = evaluate(results, truth)
    header, everything, *rows = evaluation_table(found).splitlines()
    assert header.split() == ["Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.75", "mAP@.5:.95"]
    assert everything.split()[:3] == ["all", str(found.images), str(found.truths)]
    assert everything.split()[5:] == [f"{value:.3g}" for value in (found.map50, found.map75, found.map)]
    assert [row.split()[0] for row in rows] == ["전동킥보드", "SUV", "학원차량"]
    assert rows[2].split()[3:] == ["-"] * 5
    assert {display_width(line) for line in (header, everything, *rows)} == {22 + 7 * 11}
    assert evaluation_table(found, per_class=False).splitlines() == [header, everything]


def test_the_note_says_which_ap_and_where_precision_is_read() -> None:
    truth, results = scene(1)
    found = evaluate(results, truth, max_det=70)
    assert evaluation_note(found).startswith("mAP: COCO's, mean precision at 101 recall points, best 70 detections")
    assert f"at confidence {found.confidence:.3f}" in evaluation_note(found)
    assert "confidence" not in evaluation_note(evaluate([], truth | {"annotations": []}))


def test_the_curves_are_those_that_the_figures_are_read_from() -> None:
    truth, results = scene(1, classes=3)
    truth["categories"].append({"id": 9, "name": "nobody"})
    found = evaluate(results, truth)
    curves = found.curves
    assert curves is not None
    wanted = pycocotools_precision(truth, results, 100)[0, :, :, 0].T
    np.testing.assert_allclose(curves.precision, np.where(wanted < 0, np.nan, wanted), atol=1e-9)
    np.testing.assert_array_equal(curves.recall, np.linspace(0, 1, 101))
    over = curves.by_confidence
    at = int(np.argmin(np.abs(over.confidence - found.confidence)))
    entries = found.per_class[:3]
    np.testing.assert_allclose(over.precision[:3, at], [entry.precision for entry in entries])
    np.testing.assert_allclose(over.recall[:3, at], [entry.recall for entry in entries])
    p, r = np.array([entry.precision for entry in entries]), np.array([entry.recall for entry in entries])
    np.testing.assert_allclose(over.f1[:3, at], 2 / (1 / p + 1 / r))
    assert np.isnan(over.f1[3]).all() and np.isnan(curves.precision[3]).all()


def test_display_width_counts_columns_of_a_terminal() -> None:
    # The third is the same word decomposed into its letters, as some file systems give it.
    assert [display_width(text) for text in ("", "van", "세단", "\u1109\u1166\u1103\u1161\u11ab")] == [0, 3, 4, 4]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    truth, results = scene(1)
    evaluate(results, truth, max_det=50)
    assert capfd.readouterr() == ("", "")

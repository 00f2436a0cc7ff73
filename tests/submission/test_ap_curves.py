"""AP by threshold: every point of a curve is what `evaluate` (hotcoco) measures of those detections alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from parkdet.runtime.evaluation import evaluate, metric
from parkdet.runtime.evaluation_columns import evaluation_columns
from parkdet.submission.ap_curves import match, measured_curves, prefix_ap
from parkdet.submission.expected_ap import chances_right, expected_curves

World = Callable[..., tuple[pl.DataFrame, dict[str, Any]]]
CONTEST = {"map50": 0.1, "map75": 0.9}


@pytest.mark.parametrize("weights", [CONTEST, {"map": 1.0}, {"map": 0.5, "map50": 0.5}])
@pytest.mark.parametrize("max_det", [2, 50])
def test_the_ends_sum_to_the_metric(small_world: World, weights: dict[str, float], max_det: int) -> None:
    for seed in range(25):
        table, truth = small_world(seed)
        curves = measured_curves(match(*evaluation_columns(table, truth), weights, max_det))
        expected = metric(evaluate(table, truth, max_det=max_det), weights)
        assert sum(curve.values[-1] for curve in curves.values()) == pytest.approx(expected, abs=1e-12)


def test_boxes_that_overlap_equally_are_matched_as_in_coco() -> None:
    """On a coarse grid many IoUs are equal, to one another and to a threshold."""
    columns = ["image_id", "category_id", "x", "y", "w", "h", "score"]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth_boxes, boxes = (
            np.column_stack((rng.choice([0, 5, 10], (count, 2)), rng.choice([5, 10, 20], (count, 2))))
            for count in (8, 16)
        )
        annotations = [
            {"id": number, "image_id": 1 + number % 2, "category_id": 1, "bbox": box.tolist(),
             "area": float(box[2] * box[3]), "iscrowd": int(number == 7)}
            for number, box in enumerate(truth_boxes, start=1)
        ]  # fmt: skip
        rows = [(1 + n % 2, 1, *map(float, box), float(rng.choice([0.2, 0.5, 0.9]))) for n, box in enumerate(boxes)]
        table = pl.DataFrame(rows, schema=columns, orient="row")
        truth = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
        curves = measured_curves(match(*evaluation_columns(table, truth), {"map": 1.0}, 50))
        assert curves[1].values[-1] == pytest.approx(evaluate(table, truth, max_det=50).map, abs=1e-12)


def test_every_point_is_the_metric_of_those_detections(small_world: World) -> None:
    for seed in range(6):
        table, truth = small_world(seed)
        curves = measured_curves(match(*evaluation_columns(table, truth), CONTEST, 50))
        for category_id, curve in curves.items():
            for count, value in enumerate(curve.values):
                found = evaluate(table[np.sort(curve.rows[:count])], truth, max_det=50).per_class
                ap = next(entry for entry in found if entry.category_id == category_id)
                assert value == pytest.approx((0.1 * ap.ap50 + 0.9 * ap.ap75) / len(curves), abs=1e-12)


def test_matches_of_some_images_are_those_of_the_images_alone(small_world: World) -> None:
    table, truth = small_world(3, images=8)
    matches = match(*evaluation_columns(table, truth), CONTEST, 50)
    ids = [image["id"] for image in truth["images"]]
    part = matches.of_images(np.isin(ids, [2, 3, 7]))
    alone = {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in (2, 3, 7)],
        "annotations": [box for box in truth["annotations"] if box["image_id"] in (2, 3, 7)],
    }
    expected = evaluate(table.filter(pl.col("image_id").is_in([2, 3, 7])), alone, max_det=50)
    assert sum(curve.values[-1] for curve in measured_curves(part).values()) == pytest.approx(metric(expected, CONTEST))


def test_nothing_found_and_nothing_to_find() -> None:
    assert prefix_ap(np.zeros(0, np.int8), 5).tolist() == [0.0]
    assert prefix_ap(np.array([1], np.int8), 1).tolist() == [0.0, 1.0]
    assert prefix_ap(np.array([-1, 0, 1], np.int8), 1).tolist() == pytest.approx([0, 0, 0, 0.5])
    truth = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    matches = match(*evaluation_columns([], truth), CONTEST, 50)
    assert measured_curves(matches) == expected_curves(matches) == {}


def test_expected_curves_rise_and_end_near_the_measured(small_world: World) -> None:
    table, truth = small_world(1, images=300)
    matches = match(*evaluation_columns(table, truth), CONTEST, 50)
    measured, expected = measured_curves(matches), expected_curves(matches)
    for category_id, curve in expected.items():
        assert (np.diff(curve.values) >= 0).all()
        assert np.array_equal(curve.rows, measured[category_id].rows)
        # No envelope and no steps of recall: near, not equal.
        assert curve.values[-1] == pytest.approx(measured[category_id].values[-1], abs=0.02)


def test_chances_are_those_that_made_the_sample() -> None:
    rng = np.random.default_rng(0)
    scores, classes = rng.random(40_000), rng.integers(0, 3, 40_000)
    log_odds = np.log(scores / (1 - scores))
    true_chance = 1 / (1 + np.exp(-(np.array([-0.5, 0.3, 1.0])[classes] + 0.8 * log_odds)))
    outcome = (rng.random(40_000) < true_chance).astype(np.int8)
    found = chances_right(scores, classes, outcome, 3)
    assert np.abs(found - true_chance).max() < 0.05
    assert np.abs(found - true_chance).mean() < 0.01


def test_a_class_of_few_detections_is_taken_for_like_the_others() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate((rng.random(5000), [0.9, 0.8]))
    classes = np.concatenate((np.zeros(5000, np.int64), [1, 1]))
    outcome = np.concatenate((rng.random(5000) < 0.9 * scores[:5000], [False, False])).astype(np.int8)
    found = chances_right(scores, classes, outcome, 2)
    assert 0.4 < found[-2] < 0.8  # two misses pull it down from 0.81, not to 0


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_samples_of_one_kind_have_chances_too(value: int) -> None:
    scores = np.array([0.0, 0.5, 1.0])
    found = chances_right(scores, np.zeros(3, np.int64), np.full(3, value, np.int8), 1)
    assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()

"""Merging, held to a version that goes box by box, and to the authors' own where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest

from parkdet.runtime.errors import UsageError
from parkdet.submission.merge import MergeSettings, merge

SCHEMA = {
    "image_id": pl.Int64,
    "category_id": pl.Int32,
    **dict.fromkeys(("x", "y", "w", "h", "score"), pl.Float32),
}


def random_runs(seed: int, most: int = 40) -> list[pl.DataFrame]:
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(int(rng.integers(1, 5))):
        count = int(rng.integers(0, most))
        numbers = {
            "x": rng.random(count) * 60, "y": rng.random(count) * 60, "w": rng.random(count) * 60 + 20,
            "h": rng.random(count) * 60 + 20, "score": rng.random(count).clip(0.01),
        }  # fmt: skip
        ids = {"image_id": rng.integers(1, 4, count), "category_id": rng.integers(1, 3, count)}
        runs.append(pl.DataFrame(ids | numbers).cast(SCHEMA))  # type: ignore[arg-type]
    return runs


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    common = max(w, 0.0) * max(h, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def naive(runs: list[pl.DataFrame], method: str, threshold: float, weights: Sequence[float]) -> list[tuple[Any, ...]]:
    """(image, category, x1, y1, x2, y2, score), one box after the other."""
    boxes = [
        (row["image_id"], row["category_id"],
         [row["x"], row["y"], row["x"] + row["w"], row["y"] + row["h"]],
         row["score"] * (weight if method == "wbf" else weight / max(weights)))
        for run, weight in zip(runs, weights, strict=True) for row in run.iter_rows(named=True)
    ]  # fmt: skip
    clusters: list[dict[str, Any]] = []
    for image, category, box, score in sorted(boxes, key=lambda entry: -entry[3]):
        mine = [c for c in clusters if (c["image"], c["category"]) == (image, category)]
        best = max(mine, key=lambda c: iou(c["box"], box), default=None)
        if best is None or iou(best["box"], box) <= threshold:
            best = {"image": image, "category": category, "members": [], "box": box}
            clusters.append(best)
        elif method == "nms":
            continue
        best["members"].append((box, score))
        total = sum(s for _, s in best["members"])
        if method == "wbf":
            best["box"] = [sum(b[side] * s for b, s in best["members"]) / total for side in range(4)]
    found = []
    for cluster in clusters:
        scores = [score for _, score in cluster["members"]]
        score = scores[0]
        if method == "wbf":
            score = sum(scores) / len(scores) * min(len(scores), len(runs)) / sum(weights)
            score = min(score, 1.0)
        found.append((cluster["image"], cluster["category"], *cluster["box"], score))
    return found


def rows_of(table: pl.DataFrame) -> list[tuple[Any, ...]]:
    return [(i, c, x, y, x + w, y + h, s) for i, c, x, y, w, h, s in table.iter_rows()]


def assert_same(mine: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]]) -> None:
    """Equal up to the float32 in which tables hold boxes of some hundred pixels."""
    assert len(mine) == len(theirs)
    for one, other in zip(sorted(mine, key=lambda r: (*r[:2], round(r[6], 4), r[2])),
                          sorted(theirs, key=lambda r: (*r[:2], round(r[6], 4), r[2])), strict=True):  # fmt: skip
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=2e-4)


@pytest.mark.parametrize("method", ["wbf", "nms"])
@pytest.mark.parametrize("threshold", [0.3, 0.55, 0.8])
def test_merging_is_what_going_box_by_box_gives(method: Any, threshold: float) -> None:
    for seed in range(25):
        runs = random_runs(seed)
        weights = tuple((np.random.default_rng(seed).random(len(runs)) + 0.2).tolist())
        merged = merge(runs, MergeSettings(method=method, iou=threshold, weights=weights))
        assert_same(rows_of(merged), naive(runs, method, threshold, weights))


def test_fusion_is_that_of_its_authors() -> None:
    ensemble_boxes = pytest.importorskip("ensemble_boxes", reason="the oracle ensemble-boxes is not installed")
    for seed in range(10):
        runs = [run for run in random_runs(seed) if run.height]
        weights = tuple((np.random.default_rng(seed).random(len(runs)) + 0.2).tolist())
        merged = merge(runs, MergeSettings(iou=0.5, weights=weights)) if runs else pl.DataFrame(schema=SCHEMA)
        for image_id in (1, 2, 3):
            mine = [run.filter(pl.col("image_id") == image_id) for run in runs]
            corners = [[[x / 1000, y / 1000, (x + w) / 1000, (y + h) / 1000] for x, y, w, h in
                        run.select("x", "y", "w", "h").iter_rows()] for run in mine]  # fmt: skip
            if not any(corners):
                continue
            boxes, scores, labels = ensemble_boxes.weighted_boxes_fusion(
                corners, [run["score"].to_list() for run in mine], [run["category_id"].to_list() for run in mine],
                weights=list(weights), iou_thr=0.5, skip_box_thr=0.0,
            )  # fmt: skip
            theirs = [(image_id, int(label), *(box * 1000).tolist(), min(float(score), 1.0))
                      for box, score, label in zip(boxes, scores, labels, strict=True)]  # fmt: skip
            assert_same(rows_of(merged.filter(pl.col("image_id") == image_id)), theirs)


def test_no_detections_merge_to_none() -> None:
    empty = pl.DataFrame(schema=SCHEMA)
    assert merge([empty, empty], MergeSettings()).is_empty()


def test_one_model_fused_with_nothing_loses_half_its_scores_and_no_box() -> None:
    (run, *_) = [run for run in random_runs(3) if run.height]
    apart = run.with_columns(x=pl.int_range(pl.len()).cast(pl.Float32) * 1000)
    merged = merge([apart, pl.DataFrame(schema=SCHEMA)], MergeSettings())
    assert merged.height == run.height
    assert merged["score"].sort().to_list() == pytest.approx((run["score"].sort() / 2).to_list())


def test_scores_stay_in_range_and_equal_boxes_become_one() -> None:
    row = {"image_id": [1], "category_id": [2], "x": [3.0], "y": [4.0], "w": [5.0], "h": [6.0], "score": [1.0]}
    runs = [pl.DataFrame(row).cast(SCHEMA)] * 3  # type: ignore[arg-type]
    for method in ("wbf", "nms"):
        merged = merge(runs, MergeSettings(method=method, weights=(0.1, 0.7, 0.2)))
        assert merged.rows() == [(1, 2, 3.0, 4.0, 5.0, 6.0, 1.0)]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_weights_that_cannot_be_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="--merge-weights"):
        merge([pl.DataFrame(schema=SCHEMA)] * 2, MergeSettings(weights=weights))

"""Thresholds by price, against a search over every combination of thresholds, and on images held back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from parkdet.runtime.errors import UsageError
from parkdet.runtime.evaluation_columns import evaluation_columns
from parkdet.submission.ap_curves import match, measured_curves
from parkdet.submission.lines import SubmissionFormat
from parkdet.submission.tune import Validation, choose_prices, folds_of, parse_metric, scaled_limit, tune

World = Callable[..., tuple[pl.DataFrame, dict[str, Any]]]
CONTEST = {"map50": 0.1, "map75": 0.9}


def validation_of(table: pl.DataFrame, truth: dict[str, Any]) -> Validation:
    return Validation(table=table, truth=truth, weights=CONTEST, max_det=100, form=SubmissionFormat())


def every_choice(validation: Validation) -> list[tuple[int, float]]:
    """(bytes of the file, metric) of every combination of one threshold a class."""
    found, truths = evaluation_columns(validation.table, validation.truth)
    curves = measured_curves(match(found, truths, CONTEST, 100))
    line_bytes = validation.form.line_bytes(validation.table) + 1
    options = []
    for curve in curves.values():
        scores, sizes = found.score[curve.rows], np.cumsum(line_bytes[curve.rows])
        ends = [0, *(n for n in range(1, len(scores) + 1) if n == len(scores) or scores[n - 1] > scores[n])]
        options.append([(int(sizes[end - 1]) if end else 0, float(curve.values[end])) for end in ends])
    return [
        (max(1 + sum(size for size, _ in choice), 2), sum(value for _, value in choice))
        for choice in itertools.product(*options)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_at_every_price_no_other_choice_of_as_few_bytes_is_better(small_world: World, seed: int) -> None:
    table, truth = small_world(seed, images=4, classes=3)
    validation = validation_of(table, truth)
    choices = every_choice(validation)
    prices = choose_prices(validation, 10**6, "measured")
    slopes = sorted({price for steps in prices.steps.values() for price in steps.prices if np.isfinite(price)})
    assert slopes
    levels = prices.levels(table)
    for level in range(1, len(slopes) + 1):
        inside = table.filter(pl.Series(levels > level))
        size = len(b"".join(validation.form.file_chunks(inside)))
        best = max(value for bytes_, value in choices if bytes_ <= size)
        assert validation.metric_of(inside) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_under_any_limit_the_best_choice_is_missed_by_less_than_one_step(small_world: World, seed: int) -> None:
    table, truth = small_world(seed, images=4, classes=3)
    validation = validation_of(table, truth)
    choices = every_choice(validation)
    prices = choose_prices(validation, 10**6, "measured")
    whole = validation.cut(10**9).size_bytes
    for limit in np.linspace(60, whole + 1, 12).astype(int).tolist():
        cut = validation.cut(limit, prices)
        assert cut.size_bytes < limit
        best = max(value for size, value in choices if size < limit)
        mine = validation.metric_of(cut.kept)
        assert mine <= best + 1e-12
        step = max((float(np.max(curve_step)) for curve_step in _hull_steps(validation)), default=0.0)
        assert mine >= best - step - 1e-12


def _hull_steps(validation: Validation) -> list[np.ndarray[Any, Any]]:
    """By class what each corner of the hull gains over the one before."""
    found, truths = evaluation_columns(validation.table, validation.truth)
    curves = measured_curves(match(found, truths, CONTEST, 100))
    prices = choose_prices(validation, 10**6, "measured")
    gains = []
    for category_id, curve in curves.items():
        lower = prices.steps[category_id].lower_scores
        counts = [0, *(int((found.score[curve.rows] >= score).sum()) for score in lower)]
        gains.append(np.diff(curve.values[counts], append=curve.values[-1]))
    return gains


def test_thresholds_say_what_is_in(small_world: World) -> None:
    table, truth = small_world(5, images=30, classes=4)
    validation = validation_of(table, truth)
    prices = choose_prices(validation, 2000, "expected")
    for limit in (100, 1000, 3000, 6000):
        cut = validation.cut(limit, prices)
        for category_id, threshold in cut.class_thresholds.items():
            mine = table.filter(pl.col("category_id") == category_id)
            kept = cut.kept.filter(pl.col("category_id") == category_id)
            above = mine.filter(pl.col("score") > threshold).height
            at_it = mine.filter(pl.col("score") == threshold).height
            assert above <= kept.height <= above + at_it


def test_a_rare_class_outlives_a_common_one_on_images_held_back(small_world: World) -> None:
    frequencies = (0.9, 0.07, 0.03)
    table, truth = small_world(1, images=400, frequencies=frequencies)
    other_table, other_truth = small_world(2, images=400, frequencies=frequencies)
    held_back = validation_of(other_table, other_truth)
    limit = held_back.cut(10**9).size_bytes // 4
    tuning = tune(validation_of(table, truth), limit, 400)
    assert tuning.wins
    single, by_class = held_back.cut(limit), held_back.cut(limit, tuning.prices)
    assert by_class.size_bytes < limit
    assert held_back.metric_of(by_class.kept) > held_back.metric_of(single.kept) + 0.02
    # What was promised is what came.
    gain = held_back.metric_of(by_class.kept) - held_back.metric_of(single.kept)
    assert tuning.held_out[tuning.estimate] - tuning.single == pytest.approx(gain, abs=0.03)


def test_where_nothing_is_cut_no_threshold_wins(small_world: World) -> None:
    table, truth = small_world(1, images=20)
    tuning = tune(validation_of(table, truth), 10**9, 20)
    assert not tuning.is_cut
    assert not tuning.wins
    assert tuning.points[-1].single == tuning.points[-1].per_class


def test_chance_is_not_taken_for_a_win(small_world: World) -> None:
    """Where scores say nothing about the classes, thresholds by class cannot be better, and are not used."""
    wins = 0
    for seed in range(6):
        table, truth = small_world(seed, images=12, classes=6)
        scores = np.random.default_rng(seed).random(table.height).astype(np.float32)
        validation = validation_of(table.with_columns(score=pl.Series(scores)), truth)
        limit = validation.cut(10**9).size_bytes // 2
        tuning = tune(validation, limit, 12)
        wins += tuning.wins
        assert tuning.wins == (tuning.held_out[tuning.estimate] > tuning.single)
    assert wins <= 4


def test_a_class_without_truth_keeps_the_single_threshold(small_world: World) -> None:
    table, truth = small_world(4, images=30, classes=3)
    truth["annotations"] = [box for box in truth["annotations"] if box["category_id"] != 2]
    validation = validation_of(table, truth)
    limit = validation.cut(10**9).size_bytes // 2
    single = validation.cut(limit)
    cut = validation.cut(limit, choose_prices(validation, limit, "expected"))
    of_class = [found.kept.filter(pl.col("category_id") == 2).height for found in (single, cut)]
    assert of_class[0] - single.tied_kept_count <= of_class[1] <= of_class[0]


def test_too_little_truth_is_said(small_world: World) -> None:
    table, truth = small_world(1, images=5)
    with pytest.raises(UsageError, match="5 validation images with 0 true boxes"):
        tune(validation_of(table, {**truth, "annotations": []}), 1000, 5)


def test_folds_hold_every_image_once() -> None:
    for count in (2, 4, 5, 13):
        parts = folds_of(np.arange(count))
        assert sorted(np.concatenate(parts).tolist()) == list(range(count))
        assert len(parts) == min(count, 5)


def test_the_limit_is_shared_by_images() -> None:
    assert scaled_limit(20_000_000, 3000, 19_521) == 2 + (20_000_000 - 2) * 3000 // 19_521
    assert scaled_limit(100, 50, 50) == 100
    assert scaled_limit(3, 1, 1000) == 3


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("map50=0.1,map75=0.9", CONTEST),
        ("map", {"map": 1.0}),
        (" map50 = 2 , map = 1", {"map50": 2.0, "map": 1.0}),
    ],
)
def test_a_metric_is_read(text: str, weights: dict[str, float]) -> None:
    assert parse_metric(text) == weights


@pytest.mark.parametrize("text", ["", "ap", "map=x", "map=nan", "map=-1", "map,map", "map=0", "map50=0.1;map75=0.9"])
def test_another_metric_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match="--metric"):
        parse_metric(text)

"""One threshold a class instead of one for all, chosen on validation images and held to images kept back.

The metric is a sum over classes, and a class's share rises with every detection let in (`ap_curves`). Under a
limit of bytes the best thresholds are those at which the next byte buys the same in every class: a price.
Each class's curve of share against bytes is replaced by its upper hull, whose slopes are the prices; at every
price the hull's corners are the best choice of all that take as few bytes (Everett, 1963), and the exact cut
finds by binary search the price at which the file is full.

Curves come in two estimates: as measured on the validation images, and as expected of others like them
(`expected_ap`). Which of them is used, if any, is decided on images kept back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.errors import UsageError
from parkdet.runtime.evaluation import METRIC_KEYS, evaluate, metric
from parkdet.runtime.evaluation_columns import evaluation_columns
from parkdet.submission.ap_curves import ApCurve, Matches, match, measured_curves
from parkdet.submission.cut import Fit, fit_batches
from parkdet.submission.expected_ap import expected_curves
from parkdet.submission.lines import BRACKETS_BYTES, SubmissionFormat
from parkdet.submission.prices import Prices, PriceSteps

FOLDS = 5
_FOLD_SEED = 100
_LIMIT_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the limit: the sizes at which the metric is measured for the curve of AP against bytes."""

ESTIMATES: Mapping[str, Callable[[Matches], dict[int, ApCurve]]] = {
    "expected": expected_curves,
    "measured": measured_curves,
}
"""How a class's curve is made; of equals the first is taken."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Validation:
    """Predictions on images whose truth is known, and how they are measured."""

    table: pl.DataFrame
    """image_id, category_id, x, y, w, h, score."""
    truth: Mapping[str, Any]
    """COCO: the images that the predictions cover, with or without detections, and their boxes."""
    weights: Mapping[str, float]
    """Of the metric, as `parkdet.runtime.evaluation.metric` takes them."""
    max_det: int
    """Detections an image that the metric counts."""
    form: SubmissionFormat
    """How the lines of the submission are written: their bytes are the cost."""

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Ascending."""
        return np.array(sorted(image["id"] for image in self.truth["images"]), np.int64)

    def rows_of(self, image_ids: NDArray[np.int64]) -> pl.DataFrame:
        """The predictions on some of the images."""
        return self.table.filter(pl.Series(np.isin(self.table["image_id"].to_numpy(), image_ids)))

    def cut(self, limit_bytes: int, prices: Prices | None = None) -> Fit:
        """The file that these predictions would make."""
        return fit_batches(lambda: [self.table], limit_bytes, self.form, prices)

    def metric_of(self, kept: pl.DataFrame) -> float:
        """The metric of some of the detections; NaN without truth."""
        return metric(evaluate(kept, self.truth, max_det=self.max_det), self.weights)

    def require_truth(self) -> None:
        """UsageError where there is too little to choose anything by."""
        images, boxes = len(self.truth["images"]), len(self.truth["annotations"])
        if images < 2 or not boxes:
            raise UsageError(
                f"--tune: {images} validation images with {boxes} true boxes are too few to choose thresholds by; "
                "name a run over more of the labelled images ('parkdet infer --split val')"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SizePoint:
    """The metric of files of one size."""

    size_bytes: int
    """Of the submission: the images that are measured have their share of it."""
    single: float
    """One threshold for all classes."""
    per_class: float | None = None
    """Thresholds by price, chosen on the images that are measured; None where there are none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tuning:
    """What prices do for the metric, and whether they are to be used."""

    prices: Prices
    """Of the estimate that is best on images kept back."""
    estimate: str
    single: float
    """The metric on the validation images with one threshold for all classes, at the limit's share."""
    held_out: Mapping[str, float]
    """By estimate: with thresholds by price that were chosen without the images on which they are measured."""
    folds: int
    image_count: int
    limit_bytes: int
    """The share of the submission's limit that falls to the validation images."""
    is_cut: bool
    """Whether the limit leaves anything out at all: otherwise no threshold has a say."""
    points: Sequence[SizePoint]

    @property
    def wins(self) -> bool:
        """Whether the thresholds by price are better on images that were kept back."""
        return self.is_cut and self.held_out[self.estimate] > self.single


def parse_metric(text: str) -> dict[str, float]:
    """Weights of `map50=0.1,map75=0.9`, or `map` alone. Raises UsageError with the forms."""
    weights: dict[str, float] = {}
    for term in text.split(","):
        key, _, number = (part.strip() for part in term.partition("="))
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            weight = np.nan
        if key not in METRIC_KEYS or key in weights or not (np.isfinite(weight) and weight >= 0):
            raise UsageError(
                f"--metric {text!r}: write weights, none below 0, of {', '.join(METRIC_KEYS)}, "
                "such as map50=0.1,map75=0.9 or map"
            )
        weights[key] = weight
    if not sum(weights.values()):
        raise UsageError(f"--metric {text!r}: all weights are 0")
    return weights


def scaled_limit(limit_bytes: int, images: int, of_images: int) -> int:
    """The share of a file's limit that falls to `images` of its `of_images`: so many bytes an image."""
    return BRACKETS_BYTES + max(1, (limit_bytes - BRACKETS_BYTES) * images // max(of_images, 1))


def tune(validation: Validation, limit_bytes: int, test_image_count: int) -> Tuning:
    """Prices from the validation images, and what they are worth on images kept back.

    `limit_bytes` is that of the submission of `test_image_count` images. Raises UsageError where there is no truth
    to measure by, or fewer than two images.
    """
    validation.require_truth()
    count = len(validation.image_ids)
    share = scaled_limit(limit_bytes, count, test_image_count)
    single = validation.cut(share)
    source = _PriceSource.of(validation, share)
    held_out = {
        estimate: validation.metric_of(pl.concat([part.kept for part in _held_out_cuts(source, estimate, share)]))
        for estimate in ESTIMATES
    }
    best = max(held_out, key=lambda estimate: held_out[estimate])
    prices = source.prices(best)
    return Tuning(
        prices=prices,
        estimate=best,
        single=validation.metric_of(single.kept),
        held_out=held_out,
        folds=min(FOLDS, count),
        image_count=count,
        limit_bytes=share,
        is_cut=single.cut_count > 0,
        points=metric_by_size(validation, limit_bytes, test_image_count, prices),
    )


def metric_by_size(
    validation: Validation, limit_bytes: int, of_images: int, prices: Prices | None = None
) -> list[SizePoint]:
    """The metric for files from an eighth to twice the limit, which is that of `of_images` images."""
    points = []
    for part in _LIMIT_SHARES:
        size = int(limit_bytes * part)
        share = scaled_limit(size, len(validation.image_ids), of_images)
        single = validation.metric_of(validation.cut(share).kept)
        per_class = None if prices is None else validation.metric_of(validation.cut(share, prices).kept)
        points.append(SizePoint(size_bytes=size, single=single, per_class=per_class))
    return points


def choose_prices(validation: Validation, limit_bytes: int, estimate: str) -> Prices:
    """Every class's prices by one of `ESTIMATES`; `limit_bytes` is that of the validation images' own file.

    A class without truth gives no evidence: it keeps the single threshold of the limit.
    """
    return _PriceSource.of(validation, limit_bytes).prices(estimate)


def folds_of(image_ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The images in up to FOLDS parts of about equal size, by a fixed shuffle."""
    shuffled = np.random.default_rng(_FOLD_SEED).permutation(image_ids)
    count = min(FOLDS, len(image_ids))
    return [shuffled[number::count] for number in range(count)]


@dataclass(frozen=True, slots=True, eq=False)
class _PriceSource:
    """What prices are made of: the matches are made once and then serve all parts of the images."""

    validation: Validation
    matches: Matches
    line_bytes: NDArray[np.int64]
    """(rows of the table,) with the comma."""
    single_threshold: float

    @classmethod
    def of(cls, validation: Validation, limit_bytes: int) -> _PriceSource:
        found, truths = evaluation_columns(validation.table, validation.truth)
        return cls(
            validation,
            match(found, truths, validation.weights, validation.max_det),
            validation.form.line_bytes(validation.table) + 1,
            validation.cut(limit_bytes).threshold,
        )

    def prices(self, estimate: str, without: NDArray[np.int64] | None = None) -> Prices:
        """From all images, or all but some."""
        matches = self.matches
        if without is not None:
            matches = matches.of_images(~np.isin(self.validation.image_ids, without))
        scores = self.validation.table["score"].to_numpy().astype(np.float64)
        steps = {
            category_id: price_steps(scores[curve.rows], self.line_bytes[curve.rows], curve.values)
            for category_id, curve in ESTIMATES[estimate](matches).items()
        }
        above = np.nextafter(np.float32(self.single_threshold), np.float32(2))
        always = PriceSteps(np.array([above], np.float64), np.array([np.inf]))
        unmeasured = set(matches.category_ids) - set(steps)
        return Prices(steps | dict.fromkeys(unmeasured, always))


def _held_out_cuts(source: _PriceSource, estimate: str, limit_bytes: int) -> Iterator[Fit]:
    """Every part of the images, cut to its share of the limit with prices from the others."""
    validation = source.validation
    images = validation.image_ids
    for part in folds_of(images):
        share = scaled_limit(limit_bytes, len(part), len(images))
        rows = validation.rows_of(part)
        yield fit_batches(lambda rows=rows: [rows], share, validation.form, source.prices(estimate, without=part))  # type: ignore[misc]


def price_steps(scores: NDArray[np.float64], line_bytes: NDArray[np.int64], values: NDArray[np.float64]) -> PriceSteps:
    """The upper hull of a class's share (N + 1,) over the bytes of its N best detections, as steps of score.

    A threshold cannot part detections of equal score: corners lie where the score falls.
    """
    ends = np.flatnonzero(np.append(scores[:-1] > scores[1:], True)) + 1 if len(scores) else np.zeros(0, np.int64)
    size = np.concatenate(([0], np.cumsum(line_bytes)))
    # Only where the share has risen can a corner be; the first of equal shares takes the fewest bytes.
    ends = ends[np.diff(values[ends], prepend=values[0]) > 0]
    corners, slopes = [0], [np.inf]
    for end in ends.tolist():
        slope = (values[end] - values[corners[-1]]) / (size[end] - size[corners[-1]])
        while slope >= slopes[-1]:
            corners.pop()
            slopes.pop()
            slope = (values[end] - values[corners[-1]]) / (size[end] - size[corners[-1]])
        corners.append(end)
        slopes.append(slope)
    last = np.array(corners[1:], np.int64) - 1
    return PriceSteps(scores[last], np.array(slopes[1:], np.float64))

"""One threshold a class instead of one for all, chosen on validation images and held to images kept back.

The metric is a sum over classes, and a class's share rises with every detection let in (`ap_curves`). Under a
limit of bytes the best thresholds are those at which the next byte buys the same in every class: a price.
Each class's curve of share against bytes is replaced by its upper hull, whose slopes are the prices; at every
price the hull's corners are the best choice of all that take as few bytes (Everett, 1963), and the exact cut
finds the price at which the file is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.errors import UsageError
from parkdet.runtime.evaluation import METRIC_KEYS, evaluate, metric
from parkdet.runtime.evaluation_columns import evaluation_columns
from parkdet.submission.ap_curves import ap_curves
from parkdet.submission.cut import Fit, fit_batches
from parkdet.submission.lines import BRACKETS_BYTES, SubmissionFormat
from parkdet.submission.prices import Prices, PriceSteps

FOLDS = 5
_FOLD_SEED = 100
_LIMIT_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the limit: the sizes at which the metric is measured for the curve of AP against bytes."""


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
    def image_ids(self) -> list[int]:
        """In the order of the truth."""
        return [image["id"] for image in self.truth["images"]]

    def part(self, image_ids: set[int]) -> Validation:
        """The same on some of the images."""
        truth = {
            **self.truth,
            "images": [image for image in self.truth["images"] if image["id"] in image_ids],
            "annotations": [box for box in self.truth["annotations"] if box["image_id"] in image_ids],
        }
        table = self.table.filter(self.table["image_id"].is_in(pl.Series(sorted(image_ids), dtype=pl.Int64).implode()))
        return Validation(
            table=table, truth=truth, weights=self.weights, max_det=self.max_det, form=self.form
        )

    def cut(self, limit_bytes: int, prices: Prices | None = None) -> Fit:
        """The file that these predictions would make."""
        return fit_batches(lambda: [self.table], limit_bytes, self.form, prices)

    def metric_of(self, kept: pl.DataFrame) -> float:
        """The metric of some of the detections; NaN without truth."""
        return metric(evaluate(kept, self.truth, max_det=self.max_det), self.weights)


@dataclass(frozen=True, slots=True)
class SizePoint:
    """The metric of validation files of one size."""

    size_bytes: int
    """Of the submission's limit that the size stands for."""
    single: float
    """One threshold for all classes."""
    per_class: float
    """Thresholds by price, which were chosen on the same images."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tuning:
    """What prices do for the metric, and whether they are to be used."""

    prices: Prices
    single: float
    """The metric on the validation images with one threshold for all classes, at the limit's share."""
    held_out: float
    """With thresholds by price that were chosen without the images on which they are measured."""
    in_sample: float
    """With thresholds by price chosen on the same images: what the held-out figure must not be taken for."""
    folds: int
    image_count: int
    limit_bytes: int
    """The share of the submission's limit that falls to the validation images."""
    is_cut: bool
    """Whether the limit leaves anything out at all: otherwise no threshold has a say."""
    points: Sequence[SizePoint]

    @property
    def wins(self) -> bool:
        """Whether the thresholds by price are better on images that were held back."""
        return self.is_cut and self.held_out > self.single


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
    """Prices from the validation images, and what they are worth on images held back.

    `limit_bytes` is that of the submission of `test_image_count` images. Raises UsageError where there is no truth
    to measure by, or fewer than two images.
    """
    ids = validation.image_ids
    if len(ids) < 2 or not validation.truth["annotations"]:
        raise UsageError(
            f"{len(ids)} validation images with {len(validation.truth['annotations'])} true boxes are too few to "
            "choose thresholds by; name a run over more of the labelled images with --tune"
        )
    share = scaled_limit(limit_bytes, len(ids), test_image_count)
    single = validation.cut(share)
    prices = choose_prices(validation, share)
    folds = min(FOLDS, len(ids))
    kept = [held.cut(scaled_limit(share, len(held.image_ids), len(ids)), choose_prices(rest, share)).kept
            for rest, held in _folds(validation, folds)]  # fmt: skip
    return Tuning(
        prices=prices,
        single=validation.metric_of(single.kept),
        held_out=validation.metric_of(pl.concat(kept)),
        in_sample=validation.metric_of(validation.cut(share, prices).kept),
        folds=folds,
        image_count=len(ids),
        limit_bytes=share,
        is_cut=single.cut_count > 0,
        points=[
            SizePoint(
                int(limit_bytes * part),
                validation.metric_of(validation.cut(scaled_limit(int(limit_bytes * part), len(ids), test_image_count)).kept),
                validation.metric_of(
                    validation.cut(scaled_limit(int(limit_bytes * part), len(ids), test_image_count), prices).kept
                ),
            )
            for part in _LIMIT_SHARES
        ],
    )


def choose_prices(validation: Validation, limit_bytes: int) -> Prices:
    """Every class's prices. One without truth gives no evidence and keeps the single threshold of the limit."""
    found, truths = evaluation_columns(validation.table, validation.truth)
    curves = ap_curves(found, truths, validation.weights, validation.max_det)
    line_bytes = validation.form.line_bytes(validation.table) + 1
    steps = {
        category_id: price_steps(found.score[curve.rows], line_bytes[curve.rows], curve.values)
        for category_id, curve in curves.items()
    }
    unmeasured = set(validation.table["category_id"].unique().to_list()) | set(truths.category_ids)
    unmeasured -= set(steps)
    if unmeasured:
        threshold = validation.cut(limit_bytes).threshold
        always = PriceSteps(np.array([np.nextafter(np.float32(threshold), np.float32(2))], np.float64), np.array([np.inf]))
        steps |= dict.fromkeys(unmeasured, always)
    return Prices(steps)


def price_steps(
    scores: NDArray[np.float64], line_bytes: NDArray[np.int64], values: NDArray[np.float64]
) -> PriceSteps:
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


def _folds(validation: Validation, folds: int) -> Iterator[tuple[Validation, Validation]]:
    """(the others, one part) of the images, each part once."""
    ids = np.array(validation.image_ids)
    shuffled = np.random.default_rng(_FOLD_SEED).permutation(ids)
    for number in range(folds):
        held = set(shuffled[number::folds].tolist())
        yield validation.part(set(ids.tolist()) - held), validation.part(held)

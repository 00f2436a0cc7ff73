"""COCO average precision of detections, and the table that YOLOv5 prints of it.

The module is called evaluation because a submodule `evaluate` would hide `parkdet.runtime.evaluate`, the function.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.errors import UsageError
from parkdet.runtime.evaluation_columns import DetectionColumns, TruthColumns, evaluation_columns
from parkdet.runtime.operating_point import ConfidenceCurves, OperatingPoint, best_f1_point

if TYPE_CHECKING:
    import polars as pl

CONTEST_METRIC: Mapping[str, float] = {"map50": 0.1, "map75": 0.9}
"""By which the reference chose its best checkpoint; the contest's own metric is not in our sources."""
METRIC_KEYS = ("map", "map50", "map75")
_IOU_50, _IOU_75 = 0, 5
"""Places of .5 and .75 in COCO's thresholds .5, .55, ... .95."""
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_NAME_WIDTH, _NUMBER_WIDTH = 22, 11


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassAP:
    """What was measured of one class; NaN where it has no truth."""

    category_id: int
    name: str
    images: int
    """Images that show the class."""
    truths: int
    """Boxes of the class that count: of some size, no crowd."""
    ap: float
    """AP@[.5:.95], 101 recall points."""
    ap50: float
    ap75: float
    precision: float
    """At the confidence `Evaluation.confidence`, IoU .5."""
    recall: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curves:
    """What can be drawn of an evaluation at IoU .5; classes by category id."""

    recall: NDArray[np.float64]
    """COCO's (101,) recall points."""
    precision: NDArray[np.float64]
    """(classes, 101), whose mean is the class's `ap50`; NaN for classes without truth."""
    by_confidence: ConfidenceCurves


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """COCO AP, means over the classes that have truth; NaN where none has."""

    map: float
    """AP@[.5:.95]."""
    map50: float
    map75: float
    map_small: float
    """Truth under 32 x 32 pixels; medium up to 96 x 96; large above."""
    map_medium: float
    map_large: float
    precision: float
    """Mean over classes at `confidence`, IoU .5."""
    recall: float
    confidence: float
    """Where the mean F1 over classes, smoothed, is best: the one threshold at which P and R are read."""
    images: int
    truths: int
    max_det: int
    """Best detections counted, for each image and class."""
    per_class: tuple[ClassAP, ...]
    """By category id, classes without truth too."""
    curves: Curves | None = field(default=None, compare=False, repr=False)
    """None only where an evaluation was made by hand."""


def evaluate(
    detections: Path | str | Sequence[Mapping[str, Any]] | pl.DataFrame,
    truth: Path | str | Mapping[str, Any],
    max_det: int = 100,
) -> Evaluation:
    """COCO AP as pycocotools computes it with `maxDets=[1, 10, max_det]`, read at `max_det`.

    `detections`: a submission JSON, its content, or a table with the columns image_id, category_id, x, y, w, h,
    score. `truth`: a COCO JSON or its content; boxes of no size are ignored, `categories` may be absent. Boxes
    are x, y of the upper left corner, width, height in original-image pixels.
    Raises UsageError for a file that does not exist, DataError for content that is wrong: not finite, an image
    or category that the truth does not have.
    """
    if max_det < 1:
        raise UsageError(f"max_det must be at least 1, not {max_det}")
    found, truths = evaluation_columns(detections, truth)
    precision = _precision_curves(found, truths, max_det)
    point = best_f1_point(found, truths, max_det)
    at_50 = precision[_IOU_50, ..., _ALL].T
    return Evaluation(
        map=_mean(precision[..., _ALL]),
        map50=_mean(precision[_IOU_50, ..., _ALL]),
        map75=_mean(precision[_IOU_75, ..., _ALL]),
        map_small=_mean(precision[..., _SMALL]),
        map_medium=_mean(precision[..., _MEDIUM]),
        map_large=_mean(precision[..., _LARGE]),
        precision=_mean_of_numbers(point.precision),
        recall=_mean_of_numbers(point.recall),
        confidence=point.confidence,
        images=len(truths.image_ids),
        truths=int(np.count_nonzero(~truths.is_crowd)),
        max_det=max_det,
        per_class=_per_class(precision[..., _ALL], point, truths),
        curves=Curves(
            recall=np.linspace(0, 1, precision.shape[1]),
            precision=np.where(at_50 > -1, at_50, math.nan),
            by_confidence=point.curves,
        ),
    )


def metric(evaluation: Evaluation, weights: Mapping[str, float] = CONTEST_METRIC) -> float:
    """The weighted sum by which checkpoints are chosen; NaN where there was no truth to measure by."""
    unknown = sorted(set(weights) - set(METRIC_KEYS))
    if unknown or not weights:
        found = ", ".join(unknown) or "nothing"
        raise UsageError(f"metric: weights are for {', '.join(METRIC_KEYS)}, not for {found}")
    return math.fsum(weight * float(getattr(evaluation, key)) for key, weight in weights.items())


def evaluation_table(evaluation: Evaluation, per_class: bool = True) -> str:
    """The table as YOLOv5's users know it, `all` first; `-` where there was no truth to measure by."""
    everything = (evaluation.precision, evaluation.recall, evaluation.map50, evaluation.map75, evaluation.map)
    rows = [("all", evaluation.images, evaluation.truths, everything)]
    if per_class:
        rows += [
            (entry.name, entry.images, entry.truths, (entry.precision, entry.recall, entry.ap50, entry.ap75, entry.ap))
            for entry in evaluation.per_class
        ]
    width = max(_NAME_WIDTH, *(display_width(name) for name, *_ in rows))
    lines = [_table_row("Class", ("Images", "Labels", "P", "R", "mAP@.5", "mAP@.75", "mAP@.5:.95"), width)]
    for name, images, truths, figures in rows:
        cells = (str(images), str(truths), *("-" if math.isnan(value) else f"{value:.3g}" for value in figures))
        lines.append(_table_row(name, cells, width))
    return "\n".join(lines)


def evaluation_note(evaluation: Evaluation) -> str:
    """What the table's figures are: which AP, and where P and R are read."""
    ap = f"mAP: COCO's, mean precision at 101 recall points, best {evaluation.max_det} detections an image and class"
    if math.isnan(evaluation.confidence):
        return ap
    return f"{ap}; P and R: at confidence {evaluation.confidence:.3f}, where the mean F1 at IoU .5 is best"


def display_width(text: str) -> int:
    """Columns a terminal gives the text: two for a Korean syllable, none for a combining mark."""
    composed = unicodedata.normalize("NFC", text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in composed
    )


def _table_row(name: str, cells: Sequence[str], width: int) -> str:
    return " " * (width - display_width(name)) + name + "".join(cell.rjust(_NUMBER_WIDTH) for cell in cells)


def _precision_curves(found: DetectionColumns, truths: TruthColumns, max_det: int) -> NDArray[np.float64]:
    """Precision (10 IoU thresholds, 101 recalls, classes, 4 area ranges), -1 where there is no truth."""
    import hotcoco

    # Images are numbered from 1 in ascending order of their ids, the order in which pycocotools breaks ties.
    dataset = hotcoco.COCO.from_arrays(
        [{"id": number + 1} for number in range(len(truths.image_ids))],
        [{"id": number + 1, "name": name} for number, name in enumerate(truths.class_names)],
        truths.image + 1,
        truths.category + 1,
        truths.xywh,
        area=truths.area,
        iscrowd=truths.is_crowd.astype(np.int64),
    )
    rows = np.column_stack((found.image + 1, found.xywh, found.score, found.category + 1))
    evaluator = hotcoco.COCOeval(dataset, dataset.load_res(rows.astype(np.float64)), "bbox")
    # Alone in the list it is the last: pycocotools sorts [1, 10, 5], and its last is 10.
    evaluator.params.max_dets = [max_det]
    evaluator.evaluate()
    evaluator.accumulate()
    accumulated = evaluator.eval
    assert accumulated is not None
    return np.asarray(accumulated["precision"], np.float64)[..., -1]


def _per_class(precision: NDArray[np.float64], point: OperatingPoint, truths: TruthColumns) -> tuple[ClassAP, ...]:
    """`precision`: (10, 101, classes)."""
    counted = ~truths.is_crowd
    boxes = np.bincount(truths.category[counted], minlength=len(truths.category_ids))
    shown = np.unique(np.stack((truths.category, truths.image))[:, counted], axis=1)
    images = np.bincount(shown[0], minlength=len(truths.category_ids))
    return tuple(
        ClassAP(
            category_id=category_id,
            name=truths.class_names[index],
            images=int(images[index]),
            truths=int(boxes[index]),
            ap=_mean(precision[:, :, index]),
            ap50=_mean(precision[_IOU_50, :, index]),
            ap75=_mean(precision[_IOU_75, :, index]),
            precision=float(point.precision[index]),
            recall=float(point.recall[index]),
        )
        for index, category_id in enumerate(truths.category_ids)
    )


def _mean(precision: NDArray[np.float64]) -> float:
    """The mean of what was measured, COCO's -1 left out."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else math.nan


def _mean_of_numbers(values: NDArray[np.float64]) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if measured.size else math.nan

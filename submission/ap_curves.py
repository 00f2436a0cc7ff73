"""Average precision as a function of the threshold: what each class gains as its detections are let in.

COCO matches an image's detections best score first, so a detection changes nothing for those before it:
the AP of a class's n best detections, for every n, comes from one matching. It never falls with n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.evaluation_columns import DetectionColumns, TruthColumns

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's."""
RECALLS = np.linspace(0.0, 1.0, 101)
_PAIRS_AT_ONCE = 2_000_000
_RISES_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class ApCurve:
    """One class's share of the metric, by how many of its best detections are in."""

    rows: NDArray[np.int64]
    """(N,) its detections as rows of the table, best score first; those in crowds too."""
    values: NDArray[np.float64]
    """(N + 1,) the share for the first n of them, n from 0: it never falls."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matches:
    """Which detections are right, by IoU threshold. All (M,) arrays are in one order: best score first."""

    rows: NDArray[np.int64]
    """(M,) rows of the table: of every image and class the best `max_det`."""
    scores: NDArray[np.float64]
    images: NDArray[np.int64]
    """(M,) places in the truth's ascending image ids, as `truth_images`."""
    classes: NDArray[np.int64]
    """(M,) places in `category_ids`, as `truth_classes`."""
    outcomes: Mapping[float, NDArray[np.int8]]
    """(M,) by IoU threshold: 1 right, 0 wrong, -1 neither (in a crowd)."""
    weights: Mapping[float, float]
    """What the AP at each threshold weighs in the metric."""
    truth_images: NDArray[np.int64]
    """(T,) of the true boxes that are no crowds."""
    truth_classes: NDArray[np.int64]
    category_ids: tuple[int, ...]

    @property
    def truth_counts(self) -> NDArray[np.int64]:
        """True boxes of each class."""
        return np.bincount(self.truth_classes, minlength=len(self.category_ids))

    def of_images(self, is_in: NDArray[np.bool_]) -> Matches:
        """Those of some images: a mask by place. An image's matches do not depend on other images."""
        mine, truths = is_in[self.images], is_in[self.truth_images]
        return Matches(
            rows=self.rows[mine],
            scores=self.scores[mine],
            images=self.images[mine],
            classes=self.classes[mine],
            outcomes={threshold: outcome[mine] for threshold, outcome in self.outcomes.items()},
            weights=self.weights,
            truth_images=self.truth_images[truths],
            truth_classes=self.truth_classes[truths],
            category_ids=self.category_ids,
        )


def match(found: DetectionColumns, truths: TruthColumns, weights: Mapping[str, float], max_det: int) -> Matches:
    """Matches as pycocotools makes them with `maxDets=[max_det]`.

    `weights` as `parkdet.runtime.evaluation.metric` takes them.
    """
    by_threshold = _threshold_weights(weights)
    best = _best_first(found, max_det)
    pairs = _Pairs.of(found, best, truths)
    counted = ~truths.is_crowd
    return Matches(
        rows=best,
        scores=found.score[best],
        images=found.image[best],
        classes=found.category[best],
        outcomes={threshold: pairs.matched(threshold, len(best), truths.is_crowd) for threshold in by_threshold},
        weights=by_threshold,
        truth_images=truths.image[counted],
        truth_classes=truths.category[counted],
        category_ids=truths.category_ids,
    )


def measured_curves(matches: Matches) -> dict[int, ApCurve]:
    """The curves by category id, of the classes that have truth; their ends sum to the metric."""
    counts = matches.truth_counts
    measured = np.flatnonzero(counts)
    curves = {}
    for index in measured:
        own = np.flatnonzero(matches.classes == index)
        values = np.zeros(len(own) + 1)
        for threshold, outcome in matches.outcomes.items():
            values += matches.weights[threshold] / len(measured) * prefix_ap(outcome[own], int(counts[index]))
        curves[matches.category_ids[index]] = ApCurve(matches.rows[own], values)
    return curves


def prefix_ap(outcome: NDArray[np.int8], truth_count: int) -> NDArray[np.float64]:
    """AP over 101 recalls of the first n detections, n from 0 to N: (N + 1,).

    `outcome` (N,), best score first: 1 right, 0 wrong, -1 neither (in a crowd).
    """
    values = np.zeros(len(outcome) + 1)
    right = np.flatnonzero(outcome == 1)
    hits = np.arange(1, len(right) + 1)
    precision = hits / np.cumsum(outcome >= 0)[right]
    # As COCO reads the curve: a recall level is reached where the recall is not under it.
    reached = np.searchsorted(RECALLS, hits / truth_count, side="right")
    envelope = np.zeros(len(RECALLS))
    for start in range(0, len(right), _RISES_AT_ONCE):
        part = slice(start, start + _RISES_AT_ONCE)
        levels = np.where(np.arange(len(RECALLS)) < reached[part, None], precision[part, None], 0.0)
        levels[0] = np.maximum(levels[0], envelope)
        levels = np.maximum.accumulate(levels, axis=0)
        envelope = levels[-1]
        values[right[part] + 1] = levels.mean(axis=1)
    return np.maximum.accumulate(values)


def _threshold_weights(weights: Mapping[str, float]) -> dict[float, float]:
    """The weight of every IoU threshold."""
    places = {"map": IOU_THRESHOLDS, "map50": IOU_THRESHOLDS[:1], "map75": IOU_THRESHOLDS[5:6]}
    totals: dict[float, float] = {}
    for key, weight in weights.items():
        for threshold in places[key]:
            totals[float(threshold)] = totals.get(float(threshold), 0.0) + weight / len(places[key])
    return {threshold: weight for threshold, weight in totals.items() if weight}


def _best_first(found: DetectionColumns, max_det: int) -> NDArray[np.int64]:
    """Rows of the best `max_det` of every image and class, all by falling score, ties by image, then as given."""
    order = np.lexsort((np.arange(len(found.score)), found.image, -found.score))
    group = found.image[order] * (found.category.max(initial=0) + 1) + found.category[order]
    by_group = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    kept = np.zeros(len(order), np.bool_)
    kept[by_group] = rank < max_det
    return order[kept].astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Detections and true boxes of one image and class that overlap by 0.5 or more."""

    place: NDArray[np.int64]
    """(P,) of the detection among the best, ascending."""
    truth: NDArray[np.int64]
    overlap: NDArray[np.float64]
    """IoU; with a crowd the share of the detection that lies in it."""

    @classmethod
    def of(cls, found: DetectionColumns, best: NDArray[np.int64], truths: TruthColumns) -> _Pairs:
        classes = len(truths.category_ids)
        groups = truths.image * classes + truths.category
        # As pycocotools goes through an image's boxes: as given, crowds last.
        truth_order = np.lexsort((np.arange(len(groups)), truths.is_crowd, groups))
        wanted = found.image[best] * classes + found.category[best]
        first = np.searchsorted(groups[truth_order], wanted, side="left")
        count = np.searchsorted(groups[truth_order], wanted, side="right") - first
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
        ends = np.cumsum(count)
        start = 0
        while start < len(best):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + _PAIRS_AT_ONCE, side="right")))
            owner = np.repeat(np.arange(start, stop), count[start:stop])
            within = np.arange(len(owner)) - np.repeat(ends[start:stop] - count[start:stop] - before, count[start:stop])
            truth = truth_order[first[owner] + within]
            overlap = _overlaps(found.xywh[best[owner]], truths.xywh[truth], truths.is_crowd[truth])
            near = overlap >= IOU_THRESHOLDS[0] - 1e-9
            parts.append((owner[near], truth[near], overlap[near]))
            start = stop
        none = np.zeros(0, np.int64)
        return cls(
            np.concatenate([none, *(part[0] for part in parts)]),
            np.concatenate([none, *(part[1] for part in parts)]),
            np.concatenate([np.zeros(0), *(part[2] for part in parts)]),
        )

    def matched(self, threshold: float, count: int, is_crowd: NDArray[np.bool_]) -> NDArray[np.int8]:
        """For `count` detections: 1 right, 0 wrong, -1 in a crowd. Greedy, best score first, as pycocotools does it."""
        outcome = np.zeros(count, np.int8)
        near = self.overlap >= threshold
        place, truth, overlap = self.place[near], self.truth[near], self.overlap[near]
        taken: set[int] = set()
        current, best_truth, best_overlap = -1, -1, threshold

        def settle() -> None:
            if best_truth >= 0:
                crowd = bool(is_crowd[best_truth])
                outcome[current] = -1 if crowd else 1
                if not crowd:
                    taken.add(best_truth)

        for row, candidate, value in zip(place.tolist(), truth.tolist(), overlap.tolist(), strict=True):
            if row != current:
                settle()
                current, best_truth, best_overlap = row, -1, threshold
            if candidate in taken or value < best_overlap:
                continue
            if best_truth >= 0 and is_crowd[candidate] and not is_crowd[best_truth]:
                continue
            best_truth, best_overlap = candidate, value
        settle()
        return outcome


def _overlaps(
    xywh: NDArray[np.float64], truth_xywh: NDArray[np.float64], is_crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """IoU row by row of (N, 4) and (N, 4); with a crowd the intersection over the first's area."""
    (x, y, w, h), (x2, y2, w2, h2) = xywh.T, truth_xywh.T
    width = np.minimum(x + w, x2 + w2) - np.maximum(x, x2)
    height = np.minimum(y + h, y2 + h2) - np.maximum(y, y2)
    common = np.maximum(width, 0) * np.maximum(height, 0)
    area = w * h
    union = np.where(is_crowd, area, area + w2 * h2 - common)
    overlaps: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return overlaps

"""Precision and recall at the one confidence that YOLOv5 reads them at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.evaluation_columns import DetectionColumns, TruthColumns

_IOU = 0.5
_GRID = 1000
"""Confidences 0 to 1 at which the curves are read."""
_SMOOTHED_SHARE = 0.1
"""Share of the grid over which F1 is averaged before its maximum is sought."""
_PAIRS_AT_ONCE = 2_000_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConfidenceCurves:
    """Precision and recall over the confidence threshold, at IoU .5; rows of classes without truth are NaN."""

    confidence: NDArray[np.float64]
    """(1000,), from 0 to 1."""
    precision: NDArray[np.float64]
    """(classes, 1000); 1 where nothing is that confident."""
    recall: NDArray[np.float64]
    """(classes, 1000)."""

    @property
    def f1(self) -> NDArray[np.float64]:
        """(classes, 1000): the harmonic mean of both."""
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-16)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OperatingPoint:
    """Where the mean F1 over classes is best."""

    confidence: float
    """NaN without truth."""
    precision: NDArray[np.float64]
    """(classes,), NaN for those without truth."""
    recall: NDArray[np.float64]
    """(classes,), NaN for those without truth."""
    curves: ConfidenceCurves
    """What it was read from."""


def best_f1_point(found: DetectionColumns, truths: TruthColumns, max_det: int) -> OperatingPoint:
    """As YOLOv5 prints them: IoU .5, curves over confidence, F1 averaged over classes, one threshold for all.

    A detection is matched with the truth of its class that it overlaps most; of several that do, the one with
    the best score is right. Counted are the best `max_det` of an image and class. Detections in a crowd are
    neither right nor wrong.
    """
    classes = len(truths.category_ids)
    counts = np.bincount(truths.category[~truths.is_crowd], minlength=classes)
    precision = np.full((classes, _GRID), math.nan)
    recall = np.full((classes, _GRID), math.nan)
    best = _best_first(found, max_det)
    is_right, is_ignored = _matched(found, best, truths)
    best, is_right = best[~is_ignored], is_right[~is_ignored]
    category, score = found.category[best], found.score[best]
    grid = np.linspace(0, 1, _GRID)
    for index in np.flatnonzero(counts):
        own = category == index
        right = np.cumsum(is_right[own])
        if not len(right):
            precision[index] = recall[index] = 0
            continue
        # Above the best score there are no detections: precision 1, recall 0.
        confidence = -score[own]
        precision[index] = np.interp(-grid, confidence, right / np.arange(1, len(right) + 1), left=1)
        recall[index] = np.interp(-grid, confidence, right / counts[index], left=0)
    curves = ConfidenceCurves(confidence=grid, precision=precision, recall=recall)
    if not counts.any():
        return OperatingPoint(confidence=math.nan, precision=precision[:, 0], recall=recall[:, 0], curves=curves)
    at = int(smoothed(curves.f1[counts > 0].mean(axis=0)).argmax())
    return OperatingPoint(confidence=float(grid[at]), precision=precision[:, at], recall=recall[:, at], curves=curves)


def smoothed(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average over `_SMOOTHED_SHARE` twice, an odd number of points, the ends repeated."""
    points = round(len(curve) * _SMOOTHED_SHARE * 2) // 2 + 1
    padded = np.pad(curve, points // 2, mode="edge")
    return np.convolve(padded, np.full(points, 1 / points), mode="valid")


def _best_first(found: DetectionColumns, max_det: int) -> NDArray[np.intp]:
    """Indices of the best `max_det` of every image and class, all by falling score, ties as given."""
    order = np.argsort(-found.score, kind="stable")
    group = found.image[order] * (found.category.max(initial=0) + 1) + found.category[order]
    by_group = np.argsort(group, kind="stable")
    ordered = group[by_group]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(starts, append=len(ordered)))
    kept = np.zeros(len(order), bool)
    kept[by_group] = rank < max_det
    return order[kept]


def _matched(
    found: DetectionColumns, best: NDArray[np.intp], truths: TruthColumns
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For the detections `best`, by falling score: whether each is right, whether it lies in a crowd."""
    classes = len(truths.category_ids)
    truth_order = np.argsort(truths.image * classes + truths.category, kind="stable")
    truth_groups = (truths.image * classes + truths.category)[truth_order]
    groups = found.image[best] * classes + found.category[best]
    first = np.searchsorted(truth_groups, groups, side="left")
    count = np.searchsorted(truth_groups, groups, side="right") - first
    target = np.full(len(best), -1)
    in_crowd = np.zeros(len(best), bool)
    for chunk in _chunks(count):
        owner = np.repeat(np.arange(chunk.start, chunk.stop), count[chunk])
        if not len(owner):
            continue
        within = np.arange(len(owner)) - np.repeat(np.cumsum(count[chunk]) - count[chunk], count[chunk])
        truth = truth_order[first[owner] + within]
        overlap, share = _overlaps(found.xywh[best[owner]], truths.xywh[truth])
        crowd = truths.is_crowd[truth]
        in_crowd[owner[crowd & (share >= _IOU)]] = True
        near = np.flatnonzero(~crowd & (overlap >= _IOU))
        starts = np.flatnonzero(np.diff(owner[near], prepend=-1))
        if len(starts):
            largest = np.maximum.reduceat(overlap[near], starts)
            near = near[overlap[near] == np.repeat(largest, np.diff(starts, append=len(near)))]
            target[owner[near]] = truth[near]
    is_right = np.zeros(len(best), bool)
    pointing = np.flatnonzero(target >= 0)
    # np.unique gives the first of each: the best score.
    is_right[pointing[np.unique(target[pointing], return_index=True)[1]]] = True
    return is_right, in_crowd & ~is_right


def _chunks(count: NDArray[np.intp]) -> list[slice]:
    """Slices of the detections with about `_PAIRS_AT_ONCE` pairs each."""
    number = np.cumsum(count) // _PAIRS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(count)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _overlaps(box: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU of two columns of boxes (N, 4) xywh, row by row, and the share of the first that the second covers."""
    (x, y, w, h), (x2, y2, w2, h2) = box.T, other.T
    width = np.minimum(x + w, x2 + w2) - np.maximum(x, x2)
    height = np.minimum(y + h, y2 + h2) - np.maximum(y, y2)
    common = np.maximum(width, 0) * np.maximum(height, 0)
    area, other_area = w * h, w2 * h2
    return common / np.maximum(area + other_area - common, 1e-300), common / np.maximum(area, 1e-300)

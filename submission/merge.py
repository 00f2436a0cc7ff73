"""Several models' predictions made one: weighted box fusion, or NMS over all of them.

Both go through an image's boxes of one class, best first, and hold each against the clusters so far. The loop
runs over the rank of a box in its image and class, all images and classes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.errors import UsageError

Method = Literal["wbf", "nms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSettings:
    """How several runs become one."""

    method: Method = "wbf"
    iou: float = 0.55
    """A box joins a cluster (or goes, in NMS) when its IoU with it is larger."""
    weights: tuple[float, ...] = ()
    """One a run; equal ones when empty."""

    def weights_of(self, run_count: int) -> NDArray[np.float64]:
        """Raises UsageError unless there is one a run."""
        if self.weights and len(self.weights) != run_count:
            raise UsageError(f"--merge-weights: {len(self.weights)} weights for {run_count} runs; give one for each")
        weights = np.array(self.weights or (1.0,) * run_count, np.float64)
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise UsageError(f"--merge-weights: {self.weights} must all be larger than 0")
        return weights


def merge(tables: Sequence[pl.DataFrame], settings: MergeSettings) -> pl.DataFrame:
    """One table of detections from one of each model; by image, best score first.

    Weighted box fusion (Solovyev, Wang, Gabruseva, 2021): a box joins the cluster of its image and class whose
    fused box it overlaps most, if by more than `iou`; the fused box is the mean of its members weighted by
    score times model weight; its score is the mean of those products, times min(members, models) / sum of the
    weights and at most 1. NMS keeps the best box of each cluster; its score is weighted by the model's weight over
    the largest.
    """
    weights = settings.weights_of(len(tables))
    if settings.method == "nms":
        weights = weights / weights.max()
    rows = pl.concat(
        [
            table.select(
                pl.col("image_id", "category_id").cast(pl.Int64),
                pl.col("x", "y", "w", "h", "score").cast(pl.Float64),
                weighted=pl.col("score").cast(pl.Float64) * weight,
            )
            for table, weight in zip(tables, weights.tolist(), strict=True)
        ]
    ).sort(["image_id", "category_id", "weighted"], descending=[False, False, True], maintain_order=True)
    if rows.is_empty():
        return tables[0]
    xywh = rows.select("x", "y", "w", "h").to_numpy()
    xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    scores = rows["weighted"].to_numpy()
    clusters = _Clusters(xyxy, scores, _starts(rows), settings)
    merged = clusters.boxes()
    score = scores[clusters.firsts]
    if settings.method == "wbf":
        members = clusters.counts
        score = clusters.score_sums / members * np.minimum(members, len(tables)) / weights.sum()
    columns = {
        "image_id": rows["image_id"].to_numpy()[clusters.firsts],
        "category_id": rows["category_id"].to_numpy()[clusters.firsts].astype(np.int32),
        "x": merged[:, 0],
        "y": merged[:, 1],
        "w": merged[:, 2] - merged[:, 0],
        "h": merged[:, 3] - merged[:, 1],
        # Fusion's rule passes 1 where the model of the larger weight has several boxes in a cluster.
        "score": np.minimum(score, 1.0),
    }
    table = pl.DataFrame(columns).with_columns(pl.col("x", "y", "w", "h", "score").cast(pl.Float32))
    return table.sort(["image_id", "score"], descending=[False, True], maintain_order=True)


def _starts(rows: pl.DataFrame) -> NDArray[np.int64]:
    """Where each image and class begins in the sorted rows, and their end."""
    ids = rows.select("image_id", "category_id").to_numpy()
    changes = (ids[1:] != ids[:-1]).any(axis=1)
    return np.concatenate(([0], np.flatnonzero(changes) + 1, [len(ids)])).astype(np.int64)


class _Clusters:
    """The clusters of all groups, a group being the boxes of one image and class, best first.

    Cluster number c of a group lies at the group's start + c in every array while they grow.
    """

    def __init__(
        self,
        xyxy: NDArray[np.float64],
        scores: NDArray[np.float64],
        starts: NDArray[np.int64],
        settings: MergeSettings,
    ) -> None:
        self._fuses = settings.method == "wbf"
        self._sums = np.zeros((len(xyxy), 4))
        self._score_sums = np.zeros(len(xyxy))
        self._counts = np.zeros(len(xyxy), np.int64)
        self._firsts = np.zeros(len(xyxy), np.int64)
        self._boxes = np.zeros((len(xyxy), 4))
        sizes = np.diff(starts)
        # Largest first: the groups that have a box of some rank are then the first ones.
        order = np.argsort(-sizes, kind="stable")
        begin, sizes = starts[:-1][order], sizes[order]
        filled = np.zeros(len(order), np.int64)
        for rank in range(int(sizes[0])):
            active = int(np.searchsorted(-sizes, -rank, side="left"))
            box = begin[:active] + rank
            joined = self._nearest(xyxy[box], begin[:active], filled[:active], settings.iou)
            is_new = joined < 0
            place = np.where(is_new, begin[:active] + filled[:active], joined)
            filled[:active] += is_new
            self._firsts[place[is_new]] = box[is_new]
            if not self._fuses:
                place, box = place[is_new], box[is_new]
            # A rank holds one box a group: no place is there twice.
            self._sums[place] += xyxy[box] * scores[box, None]
            self._score_sums[place] += scores[box]
            self._counts[place] += 1
            weight = self._score_sums[place, None]
            fused = np.divide(self._sums[place], weight, out=xyxy[box].copy(), where=weight > 0)
            self._boxes[place] = fused if self._fuses else xyxy[box]
        self._used = np.flatnonzero(self._counts)

    @property
    def firsts(self) -> NDArray[np.int64]:
        """(C,) row of each cluster's best box."""
        return self._firsts[self._used]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(C,) members."""
        return self._counts[self._used]

    @property
    def score_sums(self) -> NDArray[np.float64]:
        """(C,) of the members' weighted scores."""
        return self._score_sums[self._used]

    def boxes(self) -> NDArray[np.float64]:
        """(C, 4) xyxy."""
        return self._boxes[self._used]

    def _nearest(
        self, xyxy: NDArray[np.float64], begin: NDArray[np.int64], filled: NDArray[np.int64], iou: float
    ) -> NDArray[np.int64]:
        """For one box a group the place of the cluster that it overlaps most, -1 where none by more than `iou`."""
        nearest = np.full(len(xyxy), -1, np.int64)
        ends = np.cumsum(filled)
        if not len(ends) or not ends[-1]:
            return nearest
        owner = np.repeat(np.arange(len(xyxy)), filled)
        place = np.arange(ends[-1]) - np.repeat(ends - filled, filled) + begin[owner]
        overlaps = _iou(xyxy[owner], self._boxes[place])
        has = np.flatnonzero(filled)
        largest = np.maximum.reduceat(overlaps, (ends - filled)[has])
        at_most = overlaps == np.repeat(largest, filled[has])
        # Written in reverse, so that the first of equal ones stays.
        nearest[owner[at_most][::-1]] = place[at_most][::-1]
        nearest[has[largest <= iou]] = -1
        return nearest


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row of (N, 4) and (N, 4) xyxy."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    common = np.maximum(sides, 0).prod(axis=1)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - common
    overlaps: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return overlaps

"""From raw heads straight to detections: what `decode_candidates`, `rank` and `suppress_ranked` give, for less.

Scores come first, a stretch of anchors at a time that a processor's cache holds; only the best candidates get boxes.
Shapes as in `heads`; K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray, cxcywh_to_xyxy
from parkdet.runtime.heads import HeadGeometry, RawHead, check_heads, decode_boxes, geometries, sigmoid
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import MAX_CANDIDATES, NmsCounts, NmsSettings, RankedCandidates, highest, suppress_ranked

_FIRST_LOOK = 2048
"""Candidates that are ranked at first: the boxes wanted are nearly always found among them."""
_STRETCH = 80_000
"""Numbers of a head that are worked on together."""


def suppress_heads(
    heads: Sequence[RawHead], spec: ModelSpec, settings: NmsSettings
) -> list[tuple[Detections, NmsCounts]]:
    """Each image's detections in canvas pixels, and what the caps did. ValueError where the heads do not fit."""
    return [_suppress(image, settings) for image in _images(heads, spec, settings)]


def rank_heads(heads: Sequence[RawHead], spec: ModelSpec, settings: NmsSettings) -> list[RankedCandidates]:
    """All that enters each image's greedy pass. ValueError where the heads do not fit the spec."""
    return [image.ranked(MAX_CANDIDATES) for image in _images(heads, spec, settings)]


def _suppress(image: _Image, settings: NmsSettings) -> tuple[Detections, NmsCounts]:
    ranked = image.ranked(min(_FIRST_LOOK, MAX_CANDIDATES))
    detections, counts = suppress_ranked(ranked, settings)
    if counts.at_max_det or len(ranked.scores) == min(ranked.found, MAX_CANDIDATES):
        return detections, counts
    return suppress_ranked(image.ranked(MAX_CANDIDATES), settings)


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """One image's part of a head."""

    raw: RawHead
    """(na * h * w, 5 + nc)"""
    geometry: HeadGeometry
    first: int
    """Anchors in the heads before it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Image:
    """One image's heads, and how its candidates are chosen."""

    heads: list[_Head]
    settings: NmsSettings

    def ranked(self, limit: int) -> RankedCandidates:
        """Its `limit` best candidates."""
        classes = self.heads[0].raw.shape[1] - 5
        best = _Best(limit, self.settings.conf)
        for head in self.heads:
            for index, scores in self._scores(head):
                best.add(scores, (head.first + index) * classes)
        scores, keys = best.in_order()
        anchor, class_ids = np.divmod(keys, classes)
        return RankedCandidates(
            xyxy=np.asarray(cxcywh_to_xyxy(self._boxes(anchor)), np.float32),
            scores=scores,
            class_ids=class_ids.astype(np.int32),
            keys=keys,
            found=best.found,
        )

    def _scores(self, head: _Head) -> Iterator[tuple[NDArray[np.int64], FloatArray]]:
        """Anchors (S,) whose objectness passes and their scores (S, nc), 0 where there is no candidate."""
        passing = np.flatnonzero(sigmoid(head.raw[:, 4]) > np.float32(self.settings.conf))
        length = max(_STRETCH // head.raw.shape[1], 1)
        for start in range(0, len(passing), length):
            index = passing[start : start + length]
            values = sigmoid(head.raw.take(index, axis=0))
            scores = values[:, 5:] * values[:, 4:5]
            if np.isnan(values.max()):
                scores[np.isnan(values[:, :4]).any(axis=1)] = 0
                scores[np.isnan(scores)] = 0
            if not self.settings.multi_label:
                best = scores.argmax(axis=1)[:, None]
                of_best = np.take_along_axis(scores, best, axis=1)
                scores[...] = 0
                np.put_along_axis(scores, best, of_best, axis=1)
            yield index, scores

    def _boxes(self, anchor: NDArray[np.int64]) -> FloatArray:
        """Boxes (K, 4), cxcywh, of anchors (K,) that are counted through all heads."""
        boxes = np.empty((len(anchor), 4), np.float32)
        for head in self.heads:
            here = np.flatnonzero((anchor >= head.first) & (anchor < head.first + len(head.raw)))
            index = anchor[here] - head.first
            values = sigmoid(head.raw[index, :4])
            decode_boxes(values, index, head.geometry)
            boxes[here] = values
        return boxes


class _Best:
    """The highest scores of those that come by, which are in the order of their keys."""

    def __init__(self, limit: int, conf: float) -> None:
        self.found = 0
        """Scores that passed, kept or not."""
        self._limit = limit
        self._conf = self._floor = np.float32(conf)
        self._scores: list[FloatArray] = []
        self._keys: list[NDArray[np.int64]] = []
        self._kept = 0

    def add(self, scores: FloatArray, keys: NDArray[np.int64]) -> None:
        """Take scores (S, nc) of anchors whose first class has these keys (S,)."""
        flat, classes = scores.reshape(-1), scores.shape[1]
        passing = int(np.count_nonzero(flat > self._conf))
        if not passing:
            return
        self.found += passing
        chosen = np.flatnonzero(flat > self._floor)
        # A key is that of the anchor and the class; written so that there is one division and no remainder.
        steps = keys - np.arange(len(keys)) * classes
        self._scores.append(flat[chosen])
        self._keys.append(chosen + steps[chosen // classes])
        self._kept += len(chosen)
        if self._kept > 2 * self._limit:
            # Of equal scores the first stay, so one that comes later must be higher than the lowest of these.
            self._floor = self._cut()[0].min()

    def in_order(self) -> tuple[FloatArray, NDArray[np.int64]]:
        """Scores, descending, and keys; of equal scores the lower key first."""
        scores, keys = self._cut()
        order = np.argsort(-scores, kind="stable")
        return scores[order], keys[order]

    def _cut(self) -> tuple[FloatArray, NDArray[np.int64]]:
        """Forget all but the best; these."""
        scores = np.concatenate((np.zeros(0, np.float32), *self._scores))
        keys = np.concatenate((np.zeros(0, np.int64), *self._keys))
        kept = highest(scores, self._limit)
        self._kept = len(kept)
        scores, keys = scores[kept], keys[kept]
        self._scores, self._keys = [scores], [keys]
        return scores, keys


def _images(heads: Sequence[RawHead], spec: ModelSpec, settings: NmsSettings) -> Iterator[_Image]:
    """Image by image of a batch."""
    arrays = [np.asarray(head) for head in heads]
    check_heads(arrays, spec)
    where = geometries(arrays, spec)
    sizes = [int(np.prod(head.shape[1:4])) for head in arrays]
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    for image in range(arrays[0].shape[0]):
        yield _Image(
            [
                _Head(head[image].reshape(-1, spec.num_outputs), geometry, first)
                for head, geometry, first in zip(arrays, where, firsts, strict=True)
            ],
            settings,
        )

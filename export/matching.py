"""Detections of two sides brought together, output by output of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.geometry import FloatArray, areas
from parkdet.runtime.heads import Candidates, decode_candidates
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings, RankedCandidates, greedy, rank

MATCH_SCORE = 0.1
"""Detections from this score on must have a partner."""
MATCH_IOU = 0.9
FLOOR = 0.05
"""Partners may be as low as this, so that a score on the threshold's two sides is a score difference, no more."""

_NMS = NmsSettings(conf=FLOOR, iou=0.7, max_det=300, multi_label=True)

Outputs = Sequence[NDArray[np.floating[Any]]]
"""What a graph returns for a batch: raw heads in the order of its spec, or decoded boxes (B, N, 5 + nc) alone."""


def candidates_of(outputs: Outputs, spec: ModelSpec) -> list[Candidates]:
    """Candidates of score FLOOR and more of each image. ValueError where the outputs do not fit the spec."""
    if spec.head != "decoded":
        return decode_candidates(outputs, spec, FLOOR)
    (decoded,) = outputs
    if decoded.ndim != 3 or decoded.shape[2] != spec.num_outputs:
        raise ValueError(f"decoded boxes are (B, N, {spec.num_outputs}), not {decoded.shape}")
    rows = [np.flatnonzero(image[:, 4] > np.float32(FLOOR)) for image in decoded]
    return [Candidates(np.asarray(image[index], np.float32), index) for image, index in zip(decoded, rows, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side's candidates of an image, and which of them its NMS keeps."""

    ranked: RankedCandidates
    kept: NDArray[np.int64]

    @classmethod
    def of(cls, candidates: Candidates) -> Side:
        """Candidates of one image."""
        ranked = rank(candidates, _NMS)
        return cls(ranked, greedy(ranked, _NMS)[0])


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """Detections of both sides brought together: rows of the checkpoint's candidates and of the artifact's."""

    wanted: NDArray[np.int64]
    found: NDArray[np.int64]
    unmatched_wanted: NDArray[np.int64]
    unmatched_found: NDArray[np.int64]
    reordered: int
    """Pairs of which only one side's NMS kept its half: a near-tie that fell the other way."""


def pair(wanted: Side, found: Side) -> Pairing:
    """Match one to one: the same output of the network (anchor and class), boxes of IoU MATCH_IOU or more.

    A detection's partner need not have survived NMS: NMS is the runtime's on both sides and not what is under
    test, and of two near-equal candidates it may keep the other one for a difference in the last digit. Those
    pairs are compared like all others and counted as reordered.
    """
    _, row_w, row_f = np.intersect1d(wanted.ranked.keys, found.ranked.keys, return_indices=True)
    kept_w, kept_f = np.isin(row_w, wanted.kept), np.isin(row_f, found.kept)
    scores = np.maximum(
        np.where(kept_w, wanted.ranked.scores[row_w], 0), np.where(kept_f, found.ranked.scores[row_f], 0)
    )
    overlap = pairwise_iou(wanted.ranked.xyxy[row_w], found.ranked.xyxy[row_f])
    paired = (overlap >= MATCH_IOU) & (scores >= MATCH_SCORE)

    def left_over(side: Side, partnered: NDArray[np.int64]) -> NDArray[np.int64]:
        alone = np.setdiff1d(side.kept, partnered)
        return alone[side.ranked.scores[alone] >= MATCH_SCORE]

    return Pairing(
        wanted=row_w[paired],
        found=row_f[paired],
        unmatched_wanted=left_over(wanted, row_w[paired]),
        unmatched_found=left_over(found, row_f[paired]),
        reordered=int((paired & (kept_w != kept_f)).sum()),
    )


def pairwise_iou(a_xyxy: FloatArray, b_xyxy: FloatArray) -> FloatArray:
    """IoU (N,) of boxes (N, 4) row by row."""
    sides = np.minimum(a_xyxy[:, 2:], b_xyxy[:, 2:]) - np.maximum(a_xyxy[:, :2], b_xyxy[:, :2])
    intersection = np.maximum(sides, 0).prod(axis=1)
    union = areas(a_xyxy) + areas(b_xyxy) - intersection
    return np.asarray(np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0))

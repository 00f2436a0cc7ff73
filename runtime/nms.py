"""Candidates and greedy non-maximum suppression: the first implementation of the specification's 'NMS'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray, cxcywh_to_xyxy
from parkdet.runtime.heads import Candidates

MAX_CANDIDATES = 30_000
"""Candidates of one image that enter the greedy pass, best first."""
_BLOCK = 1024
"""Ranks that the greedy pass looks at together."""
_SQUARE = 128
"""Of these, how many are compared each with each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsSettings:
    """How candidates are chosen and suppressed. The defaults are the contest's."""

    conf: float = 0.01
    """A candidate's objectness, and its score, must be larger."""
    iou: float = 0.7
    """A box goes when its IoU with a kept one is larger."""
    max_det: int = 50
    """Detections kept an image."""
    multi_label: bool = True
    """One candidate for every class that passes, or for the best class only."""
    agnostic: bool = False
    """Whether boxes of different classes suppress one another."""

    def __post_init__(self) -> None:
        if not 0 <= self.conf <= 1 or not 0 <= self.iou <= 1:
            raise ValueError(f"conf and iou must be from 0 to 1, not {self.conf} and {self.iou}")
        if self.max_det < 1:
            raise ValueError(f"max_det must be at least 1, not {self.max_det}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsCounts:
    """What the caps did to one image."""

    candidates: int
    over_limit: int
    """Candidates beyond the best MAX_CANDIDATES, never looked at."""
    at_max_det: bool
    """Whether the greedy pass stopped at `max_det` with candidates left."""


def non_max_suppression(
    decoded: FloatArray,
    conf: float = 0.01,
    iou: float = 0.7,
    max_det: int = 50,
    multi_label: bool = True,
    agnostic: bool = False,
) -> Detections:
    """Detections in canvas pixels from one image's decoded heads (N, 5 + nc) as `decode_heads` gives them.

    Candidates have objectness > conf and objectness * class score > conf; the best 30,000 by score (ties by
    `anchor * nc + class`) are kept greedily; one goes when its IoU with a kept one of its class (of any class
    when `agnostic`) is > iou. What is not finite is never a candidate. There is no time limit.
    """
    rows = np.asarray(decoded, np.float32)
    if rows.ndim != 2 or rows.shape[1] < 6:
        raise ValueError(f"one image's decoded heads are (N, 5 + nc), not {rows.shape}")
    index = np.flatnonzero(rows[:, 4] > np.float32(conf))
    settings = NmsSettings(conf=conf, iou=iou, max_det=max_det, multi_label=multi_label, agnostic=agnostic)
    return suppress(Candidates(rows[index], index), settings)[0]


@dataclass(frozen=True, slots=True, eq=False)
class RankedCandidates:
    """What enters the greedy pass: one row a candidate, best score first, at most MAX_CANDIDATES."""

    xyxy: FloatArray
    """(K, 4) canvas pixels."""
    scores: FloatArray
    class_ids: NDArray[np.int32]
    keys: NDArray[np.int64]
    """(K,) `anchor * nc + class`: which output of the network this is."""
    found: int
    """Candidates before the limit."""


def suppress(candidates: Candidates, settings: NmsSettings) -> tuple[Detections, NmsCounts]:
    """Detections in canvas pixels of one image's candidates, and what the caps did."""
    return suppress_ranked(rank(candidates, settings), settings)


def suppress_ranked(ranked: RankedCandidates, settings: NmsSettings) -> tuple[Detections, NmsCounts]:
    """The greedy pass alone: detections in canvas pixels, and what the caps did."""
    kept, stopped = greedy(ranked, settings)
    counts = NmsCounts(candidates=ranked.found, over_limit=max(ranked.found - MAX_CANDIDATES, 0), at_max_det=stopped)
    return Detections(ranked.xyxy[kept], ranked.scores[kept], ranked.class_ids[kept]), counts


def rank(candidates: Candidates, settings: NmsSettings) -> RankedCandidates:
    """The candidates that pass, best score first, ties by key."""
    rows, class_ids, scores = _scored(candidates, settings)
    best = highest(scores, MAX_CANDIDATES)
    order = best[np.argsort(-scores[best], kind="stable")]
    rows, class_ids = rows[order], class_ids[order]
    num_classes = candidates.decoded.shape[1] - 5
    return RankedCandidates(
        xyxy=np.asarray(cxcywh_to_xyxy(candidates.decoded[rows, :4]), np.float32),
        scores=scores[order],
        class_ids=class_ids,
        keys=candidates.anchor_index[rows] * num_classes + class_ids,
        found=len(scores),
    )


def highest(scores: FloatArray, limit: int) -> NDArray[np.int64]:
    """Indices of the `limit` highest scores, ascending; of equal ones the first ones are taken."""
    spare = len(scores) - limit
    if spare <= 0:
        return np.arange(len(scores))
    lowest = np.partition(scores, spare)[spare]
    kept = scores > lowest
    kept[np.flatnonzero(scores == lowest)[: limit - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


def _scored(candidates: Candidates, settings: NmsSettings) -> tuple[NDArray[np.int64], NDArray[np.int32], FloatArray]:
    """Row, class and score of every candidate that passes, ordered by `anchor * nc + class`."""
    decoded = candidates.decoded
    with np.errstate(invalid="ignore", over="ignore"):
        scores = decoded[:, 5:] * decoded[:, 4:5]
    finite = np.logical_and.reduce(np.isfinite(decoded[:, :5]), axis=1, keepdims=True)
    passes = (decoded[:, 4:5] > np.float32(settings.conf)) & (scores > np.float32(settings.conf))
    passes &= finite & np.isfinite(scores)
    if not settings.multi_label and len(scores):
        ranked = np.where(np.isfinite(scores), scores, -np.inf)
        best = np.zeros_like(passes)
        best[np.arange(len(scores)), ranked.argmax(axis=1)] = True
        passes &= best
    rows, class_ids = np.nonzero(passes)
    return rows, class_ids.astype(np.int32), scores[rows, class_ids]


def greedy(ranked: RankedCandidates, settings: NmsSettings) -> tuple[NDArray[np.int64], bool]:
    """Indices of the candidates kept, in order, and whether `max_det` was met with candidates left.

    Block after block of the ranks: where the boxes wanted are found among the first few hundred, the tens of
    thousands behind them are not looked at. What the survivors before a block leave of it is compared in small
    squares, each candidate with each.
    """
    suppresses = _suppression(ranked, settings)
    survivors: list[int] = []
    for start in range(0, len(ranked.scores), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(ranked.scores)))
        remaining = block[~suppresses(np.array(survivors, np.int64), block).any(axis=0)]
        while len(remaining):
            square, remaining = remaining[:_SQUARE], remaining[_SQUARE:]
            overlaps = suppresses(square, square)
            alive = np.ones(len(square), bool)
            first_new = len(survivors)
            for row, candidate in enumerate(square.tolist()):
                if not alive[row]:
                    continue
                if len(survivors) == settings.max_det:
                    return np.array(survivors, np.int64), True
                survivors.append(candidate)
                alive &= ~overlaps[row]
            if len(remaining):
                new = np.array(survivors[first_new:], np.int64)
                remaining = remaining[~suppresses(new, remaining).any(axis=0)]
    return np.array(survivors, np.int64), False


def _suppression(
    ranked: RankedCandidates, settings: NmsSettings
) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]:
    """Whether each of the first candidates (S,), once kept, suppresses each of the second ones (K,): (S, K)."""
    x1, y1, x2, y2 = ranked.xyxy.T
    area = (x2 - x1) * (y2 - y1)
    class_ids, threshold = ranked.class_ids, np.float32(settings.iou)

    def suppresses(kept: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        of = kept[:, None]
        width = np.minimum(x2[others], x2[of]) - np.maximum(x1[others], x1[of])
        height = np.minimum(y2[others], y2[of]) - np.maximum(y1[others], y1[of])
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            overlaps: NDArray[np.bool_] = intersection / (area[others] + area[of] - intersection) > threshold
        return overlaps if settings.agnostic else overlaps & (class_ids[others] == class_ids[of])

    return suppresses

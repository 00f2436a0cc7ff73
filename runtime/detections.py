"""The one type in which detections travel: columns, validated, sorted by score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parkdet.runtime.geometry import FloatArray, areas


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The detections of one image, best score first. The frame (image or canvas pixels) is the producer's."""

    xyxy: FloatArray
    """Boxes (N, 4), two corners in pixels."""
    scores: FloatArray
    """Scores (N,), 0 to 1, descending."""
    class_ids: NDArray[np.int32]
    """Classes (N,), counted from 0 in the model's order."""

    def __post_init__(self) -> None:
        count = len(self.scores)
        for name, shape, dtype in (("xyxy", (count, 4), np.float32), ("scores", (count,), np.float32),
                                   ("class_ids", (count,), np.int32)):  # fmt: skip
            column = getattr(self, name)
            if column.shape != shape or column.dtype != dtype:
                raise ValueError(f"{name} must be {shape} {np.dtype(dtype)}, not {column.shape} {column.dtype}")
        if count > 1 and not np.all(self.scores[:-1] >= self.scores[1:]):
            raise ValueError("scores must descend and be numbers")

    @classmethod
    def sorted(cls, xyxy: ArrayLike, scores: ArrayLike, class_ids: ArrayLike) -> Detections:
        """Detections from columns in any order; equal scores keep theirs."""
        score_column = np.asarray(scores, np.float32).reshape(-1)
        order = np.argsort(-score_column, kind="stable")
        return cls(
            np.asarray(xyxy, np.float32).reshape(-1, 4)[order],
            score_column[order],
            np.asarray(class_ids, np.int32).reshape(-1)[order],
        )

    @classmethod
    def empty(cls) -> Detections:
        """No detections."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[FloatArray, float, int]]:
        """One (box (4,), score, class id) after the other."""
        for box, score, class_id in zip(self.xyxy, self.scores, self.class_ids, strict=True):
            yield box, float(score), int(class_id)

    def select(self, which: NDArray[Any] | slice) -> Detections:
        """The rows of a mask, a slice, or ascending indices."""
        return Detections(self.xyxy[which], self.scores[which], self.class_ids[which])

    def moved(self, xyxy: FloatArray) -> tuple[Detections, int]:
        """The same detections with boxes of another frame; those of no area there are dropped and counted."""
        has_area = areas(xyxy) > 0
        moved = Detections(xyxy[has_area], self.scores[has_area], self.class_ids[has_area])
        return moved, len(self) - len(moved)

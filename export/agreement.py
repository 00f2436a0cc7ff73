"""Average precision of two sides' detections: of one against the other, and of each against the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.export.matching import Side
from parkdet.runtime.evaluation import Evaluation, evaluate
from parkdet.runtime.geometry import FloatArray, xyxy_to_xywh

TRUTH_SCORE = 0.25
"""One side's detections from this score on are the truth that the other's AP is measured against."""
_MAX_DET = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """AP of one side's boxes and scores with the other's detections as truth; NaN where there is none."""

    ap: float
    """AP@[.5:.95]."""
    ap50: float
    ap75: float
    ap_small: float
    """AP@[.5:.95] of boxes under 32 x 32 canvas pixels; medium up to 96 x 96; large above."""
    ap_medium: float
    ap_large: float
    per_class: dict[str, float]
    """AP@[.5:.95] by class name, of the classes that the truth side found."""


@dataclass(slots=True)
class _Columns:
    truth: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(self, image: int, truth_side: Side, other: Side) -> None:
        ranked = truth_side.ranked
        for row in truth_side.kept[ranked.scores[truth_side.kept] >= TRUTH_SCORE]:
            self.truth.append(_truth(image, int(ranked.class_ids[row]), ranked.xyxy[row], len(self.truth)))
        # The other side's own box and score wherever the truth side keeps a detection; its own detections elsewhere:
        # which of two near-equal candidates NMS keeps says nothing about the graph.
        of_truth = np.isin(other.ranked.keys, ranked.keys[truth_side.kept])
        own = np.zeros(len(other.ranked.keys), np.bool_)
        own[other.kept] = ~np.isin(other.ranked.keys[other.kept], ranked.keys)
        self.results += [_result(image, other, row) for row in np.flatnonzero(of_truth | own)]


class AgreementTally:
    """Gathers images; `agreement` and `reverse` then compare the artifact with the checkpoint and back."""

    def __init__(self, class_names: Sequence[str]):
        self._class_names = class_names
        self._forward, self._back = _Columns(), _Columns()
        self._images = 0
        self._labels: list[dict[str, Any]] = []
        self._of_wanted: list[dict[str, Any]] = []
        self._of_found: list[dict[str, Any]] = []
        self._labelled: set[int] = set()

    def add(self, wanted: Side, found: Side, labels: tuple[FloatArray, NDArray[np.int64]] | None) -> None:
        """One image. `labels`: boxes (M, 4) xyxy in canvas pixels and class ids (M,), where the image has some."""
        self._images += 1
        self._forward.add(self._images, wanted, found)
        self._back.add(self._images, found, wanted)
        if labels is None:
            return
        self._labelled.add(self._images)
        for box, class_id in zip(*labels, strict=True):
            self._labels.append(_truth(self._images, int(class_id), box, len(self._labels)))
        self._of_wanted += [_result(self._images, wanted, row) for row in wanted.kept]
        self._of_found += [_result(self._images, found, row) for row in found.kept]

    def agreement(self) -> Agreement:
        """The artifact's detections against the checkpoint's as truth."""
        return self._agreement(self._forward)

    def reverse(self) -> Agreement:
        """The checkpoint's against the artifact's."""
        return self._agreement(self._back)

    def map_of_labels(self) -> tuple[float, float]:
        """mAP@[.5:.95] against the labels, of the checkpoint and of the artifact; NaN where no image has labels."""
        if not self._labels:
            return math.nan, math.nan
        truth = self._document(self._labels, [*self._of_wanted, *self._of_found], sorted(self._labelled))
        return evaluate(self._of_wanted, truth, _MAX_DET).map, evaluate(self._of_found, truth, _MAX_DET).map

    def _agreement(self, columns: _Columns) -> Agreement:
        if not columns.truth:
            nan = math.nan
            return Agreement(ap=nan, ap50=nan, ap75=nan, ap_small=nan, ap_medium=nan, ap_large=nan, per_class={})
        images = list(range(1, self._images + 1))
        found: Evaluation = evaluate(
            columns.results, self._document(columns.truth, columns.results, images), max_det=_MAX_DET
        )
        return Agreement(
            ap=found.map,
            ap50=found.map50,
            ap75=found.map75,
            ap_small=found.map_small,
            ap_medium=found.map_medium,
            ap_large=found.map_large,
            per_class={one.name: one.ap for one in found.per_class if one.truths},
        )

    def _document(
        self, truth: list[dict[str, Any]], results: list[dict[str, Any]], images: list[int]
    ) -> dict[str, Any]:
        classes = sorted({entry["category_id"] for entry in (*truth, *results)})
        return {
            "images": [{"id": number} for number in images],
            "categories": [{"id": number, "name": self._class_names[number - 1]} for number in classes],
            "annotations": truth,
        }


def _truth(image: int, class_id: int, xyxy: FloatArray, count: int) -> dict[str, Any]:
    box = [float(side) for side in xyxy_to_xywh(xyxy)]
    return {
        "id": count + 1, "image_id": image, "category_id": class_id + 1, "bbox": box, "area": box[2] * box[3],
        "iscrowd": 0,
    }  # fmt: skip


def _result(image: int, side: Side, row: Any) -> dict[str, Any]:
    ranked = side.ranked
    return {
        "image_id": image,
        "category_id": int(ranked.class_ids[row]) + 1,
        "bbox": [float(side) for side in xyxy_to_xywh(ranked.xyxy[row])],
        "score": float(ranked.scores[row]),
    }

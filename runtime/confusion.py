"""Which class is taken for which: the confusion matrix of detections and truth, as YOLOv5's users know it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray, iou_matrix

CONFUSION_CONF = 0.25
CONFUSION_IOU = 0.45
"""At which YOLOv5 draws it."""


def confusion_matrix(
    images: Iterable[tuple[Detections, FloatArray, NDArray[np.integer]]],
    num_classes: int,
    conf: float = CONFUSION_CONF,
    iou: float = CONFUSION_IOU,
) -> NDArray[np.int64]:
    """Counts (nc + 1, nc + 1): rows are what was detected, columns what is there, the last of both is background.

    `images` gives detections, true boxes (n, 4) xyxy in the same frame, and their classes (n,). Detections of a
    score over `conf` are paired with truth of any class, one to one, the largest IoU over `iou` first (of equal
    ones the better score). What found no partner counts against the background.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for detections, true_xyxy, true_classes in images:
        found = detections.select(detections.scores > conf)
        overlap = iou_matrix(found.xyxy, true_xyxy)
        detection, truth = np.nonzero(overlap > iou)
        # Detections come best score first, and a stable sort leaves equals so.
        order = np.argsort(-overlap[detection, truth], kind="stable")
        partner = np.full(len(found), -1)
        is_found = np.zeros(len(true_xyxy), bool)
        for one, other in zip(detection[order].tolist(), truth[order].tolist(), strict=True):
            if partner[one] < 0 and not is_found[other]:
                partner[one], is_found[other] = other, True
        classes = np.asarray(true_classes, np.int64)
        as_class = np.append(classes, num_classes)[partner]
        np.add.at(counts, (found.class_ids, as_class), 1)
        counts[num_classes] += np.bincount(classes[~is_found], minlength=num_classes + 1)
    return counts

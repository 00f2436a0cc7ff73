"""The gate: an artifact's detections against the checkpoint's, on real letterboxed images, box by box."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parkdet.runtime.detections import Detections
from parkdet.runtime.evaluation import evaluate
from parkdet.runtime.geometry import FloatArray, ImageArray, iou_matrix, xyxy_to_xywh
from parkdet.runtime.heads import decode_candidates
from parkdet.runtime.nms import NmsSettings, suppress
from parkdet.train.model.network import Yolov5

MATCH_SCORE = 0.1
"""Detections from this score on must have a partner."""
TRUTH_SCORE = 0.25
"""The checkpoint's detections from this score on are the truth that AP is measured against."""
MATCH_IOU = 0.9
_FLOOR = 0.05
"""Partners may be as low as this, so that a score on the threshold's two sides is a score difference, no more."""

Heads = Callable[[ImageArray], Sequence[NDArray[np.floating[Any]]]]
"""Canvases (B, H, W, 3) uint8 BGR to raw heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityLimits:
    """How far an artifact may be from the checkpoint. Source: specification, 'Parity limits'."""

    unmatched: float
    """Largest share of detections without a partner."""
    iou_p1: float
    """Smallest first percentile of the partners' IoU."""
    score_p99: float
    """Largest 99th percentile of the partners' score difference."""
    ap75: float
    """Smallest AP@.75 of the artifact's detections with the checkpoint's as truth."""


LIMITS = {
    "fp32": ParityLimits(unmatched=0, iou_p1=0.999, score_p99=0.001, ap75=0.999),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """What the gate measured."""

    images: int
    detections: int
    """The checkpoint's detections of MATCH_SCORE and more."""
    unmatched: int
    """Detections of either side without a partner of the same class at MATCH_IOU."""
    iou_p1: float
    iou_median: float
    iou_min: float
    score_p99: float
    score_median: float
    score_max: float
    ap75: float
    head_max: float
    """Largest difference between raw head values, which no limit is set for."""

    def findings(self, limits: ParityLimits) -> list[str]:
        """What is outside the limits, one sentence each."""
        found = []
        share = self.unmatched / max(self.detections, 1)
        if share > limits.unmatched:
            found.append(f"{self.unmatched} of {self.detections} detections have no partner")
        if not math.isnan(self.iou_p1) and self.iou_p1 < limits.iou_p1:
            found.append(f"the 1st percentile of IoU is {self.iou_p1:.4f}, below {limits.iou_p1}")
        if not math.isnan(self.score_p99) and self.score_p99 > limits.score_p99:
            found.append(f"the 99th percentile of score differences is {self.score_p99:.4f}, over {limits.score_p99}")
        if not math.isnan(self.ap75) and self.ap75 < limits.ap75:
            found.append(f"AP@.75 against the checkpoint is {self.ap75:.4f}, below {limits.ap75}")
        if not math.isfinite(self.head_max):
            found.append("raw heads are not finite")
        return found

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: NaN, where there was nothing to measure, becomes null."""
        values = dataclasses.asdict(self)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


def torch_heads(network: Yolov5) -> Heads:
    """The checkpoint's own forward pass in float32, from the pixels that OpenCV decodes."""
    model = network.float().eval()

    @torch.no_grad()
    def heads(canvases: ImageArray) -> list[FloatArray]:
        rgb = np.ascontiguousarray(canvases[..., ::-1].transpose(0, 3, 1, 2))
        return [head.numpy() for head in model(torch.from_numpy(rgb).float() / 255)]

    return heads


def compare(network: Yolov5, candidate: Heads, canvases: Iterator[ImageArray] | Sequence[ImageArray]) -> ParityReport:
    """Run both over the canvases (H, W, 3), match their detections one to one, and report."""
    reference = torch_heads(network)
    pairs = _Pairs()
    for canvas in canvases:
        wanted, found = reference(canvas[None]), candidate(canvas[None])
        pairs.add(
            _detect(wanted, network),
            _detect(found, network),
            max(_difference(np.asarray(a), np.asarray(b)) for a, b in zip(wanted, found, strict=True)),
        )
    return pairs.report()


def _difference(wanted: NDArray[np.floating[Any]], found: NDArray[np.floating[Any]]) -> float:
    if wanted.shape != found.shape:
        raise ValueError(f"the artifact's head is {found.shape}, the checkpoint's {wanted.shape}")
    largest = float(np.abs(wanted.astype(np.float32) - found.astype(np.float32)).max())
    return largest if math.isfinite(largest) else math.inf


def _detect(heads: Sequence[NDArray[np.floating[Any]]], network: Yolov5) -> Detections:
    settings = NmsSettings(conf=_FLOOR, iou=0.7, max_det=300, multi_label=True)
    (candidates,) = decode_candidates(heads, network.spec, _FLOOR)
    return suppress(candidates, settings)[0]


class _Pairs:
    def __init__(self) -> None:
        self.ious: list[float] = []
        self.score_differences: list[float] = []
        self.unmatched = 0
        self.detections = 0
        self.head_max = 0.0
        self.truth: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.images = 0

    def add(self, wanted: Detections, found: Detections, head_difference: float) -> None:
        self.images += 1
        self.head_max = max(self.head_max, head_difference)
        partners = match(wanted, found)
        partnered = {j for _, j in partners}
        self.detections += int((wanted.scores >= MATCH_SCORE).sum())
        of_wanted = {i for i, _ in partners}
        self.unmatched += sum(
            1 for i, score in enumerate(wanted.scores) if score >= MATCH_SCORE and i not in of_wanted
        ) + sum(1 for j, score in enumerate(found.scores) if score >= MATCH_SCORE and j not in partnered)
        for i, j in partners:
            if max(wanted.scores[i], found.scores[j]) >= MATCH_SCORE:
                self.ious.append(float(iou_matrix(wanted.xyxy[i : i + 1], found.xyxy[j : j + 1])[0, 0]))
                self.score_differences.append(abs(float(wanted.scores[i]) - float(found.scores[j])))
        truth = wanted.select(wanted.scores >= TRUTH_SCORE)
        for box, _, class_id in truth:
            x, y, w, h = (float(v) for v in xyxy_to_xywh(box))
            self.truth.append(
                {"id": len(self.truth) + 1, "image_id": self.images, "category_id": class_id + 1,
                 "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
        for box, score, class_id in found:
            self.results.append(
                {"image_id": self.images, "category_id": class_id + 1, "score": score,
                 "bbox": [float(v) for v in xyxy_to_xywh(box)]}
            )  # fmt: skip

    def report(self) -> ParityReport:
        ious, differences = np.array(self.ious), np.array(self.score_differences)

        def figure(values: NDArray[Any], share: float) -> float:
            return float(np.percentile(values, share)) if len(values) else math.nan

        return ParityReport(
            images=self.images,
            detections=self.detections,
            unmatched=self.unmatched,
            iou_p1=figure(ious, 1),
            iou_median=figure(ious, 50),
            iou_min=figure(ious, 0),
            score_p99=figure(differences, 99),
            score_median=figure(differences, 50),
            score_max=figure(differences, 100),
            ap75=self._ap75(),
            head_max=self.head_max,
        )

    def _ap75(self) -> float:
        if not self.truth:
            return math.nan
        classes = sorted({entry["category_id"] for entry in (*self.truth, *self.results)})
        truth = {
            "images": [{"id": number} for number in range(1, self.images + 1)],
            "categories": [{"id": number, "name": str(number)} for number in classes],
            "annotations": self.truth,
        }
        return evaluate(self.results, truth, max_det=300).map75


def match(wanted: Detections, found: Detections) -> list[tuple[int, int]]:
    """Partners (index in wanted, index in found): same class, IoU of MATCH_IOU or more, best pairs first."""
    iou = iou_matrix(wanted.xyxy, found.xyxy)
    iou = np.where(wanted.class_ids[:, None] == found.class_ids[None, :], iou, 0)
    partners: list[tuple[int, int]] = []
    rows, columns = np.nonzero(iou >= MATCH_IOU)
    taken_i: set[int] = set()
    taken_j: set[int] = set()
    for place in np.argsort(-iou[rows, columns], kind="stable"):
        i, j = int(rows[place]), int(columns[place])
        if i not in taken_i and j not in taken_j:
            taken_i.add(i)
            taken_j.add(j)
            partners.append((i, j))
    return partners

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

from parkdet.runtime.evaluation import evaluate
from parkdet.runtime.geometry import FloatArray, ImageArray, areas, xyxy_to_xywh
from parkdet.runtime.heads import decode_candidates
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings, RankedCandidates, greedy, rank
from parkdet.train.model.network import Yolov5
from parkdet.train.model.tta import view_heads

MATCH_SCORE = 0.1
"""Detections from this score on must have a partner."""
TRUTH_SCORE = 0.25
"""The checkpoint's detections from this score on are the truth that AP is measured against."""
MATCH_IOU = 0.9
_FLOOR = 0.05
"""Partners may be as low as this, so that a score on the threshold's two sides is a score difference, no more."""

_NMS = NmsSettings(conf=_FLOOR, iou=0.7, max_det=300, multi_label=True)

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
    head: float
    """Largest difference of raw heads where there are no detections to compare: all that tells a wrong graph."""


LIMITS = {
    "fp32": ParityLimits(unmatched=0, iou_p1=0.999, score_p99=0.001, ap75=0.999, head=0.01),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """What the gate measured."""

    images: int
    detections: int
    """The checkpoint's detections of MATCH_SCORE and more."""
    unmatched: int
    """Detections of either side without a partner of the same class at MATCH_IOU."""
    reordered: int
    """Pairs of which one side's NMS kept only its half, after a near-tie; no limit is set for them."""
    iou_p1: float
    iou_median: float
    iou_min: float
    score_p99: float
    score_median: float
    score_max: float
    ap75: float
    head_max: float
    """Largest difference between raw head values, limited where nothing was detected."""

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
        elif self.detections == 0 and self.head_max > limits.head:
            found.append(f"raw heads differ by {self.head_max:.2g}, over {limits.head}, and nothing was detected")
        return found

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: NaN, where there was nothing to measure, becomes null."""
        values = dataclasses.asdict(self)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


def torch_heads(network: Yolov5, tta: bool = False) -> Heads:
    """The checkpoint's own forward pass in float32, from the pixels that OpenCV decodes; of each view with `tta`."""
    model = network.float().eval()

    @torch.no_grad()
    def heads(canvases: ImageArray) -> list[FloatArray]:
        rgb = np.ascontiguousarray(canvases[..., ::-1].transpose(0, 3, 1, 2))
        images = torch.from_numpy(rgb).float() / 255
        return [head.numpy() for head in (view_heads(model, images) if tta else model(images))]

    return heads


def compare(
    network: Yolov5, candidate: Heads, canvases: Iterator[ImageArray] | Sequence[ImageArray], tta: bool = False
) -> ParityReport:
    """Run both over the canvases (H, W, 3), match their detections one to one, and report."""
    reference = torch_heads(network, tta)
    spec = dataclasses.replace(network.spec, tta=tta)
    tally = _Tally()
    for canvas in canvases:
        wanted, found = reference(canvas[None]), candidate(canvas[None])
        tally.add(
            Side.of(wanted, spec),
            Side.of(found, spec),
            max(_difference(np.asarray(a), np.asarray(b)) for a, b in zip(wanted, found, strict=True)),
        )
    return tally.report()


def _difference(wanted: NDArray[np.floating[Any]], found: NDArray[np.floating[Any]]) -> float:
    if wanted.shape != found.shape:
        raise ValueError(f"the artifact's head is {found.shape}, the checkpoint's {wanted.shape}")
    largest = float(np.abs(wanted.astype(np.float32) - found.astype(np.float32)).max())
    return largest if math.isfinite(largest) else math.inf


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side's candidates of an image, and which of them its NMS keeps."""

    ranked: RankedCandidates
    kept: NDArray[np.int64]

    @classmethod
    def of(cls, heads: Sequence[NDArray[np.floating[Any]]], spec: ModelSpec) -> Side:
        """Candidates of one image's raw heads."""
        (candidates,) = decode_candidates(heads, spec, _FLOOR)
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


class _Tally:
    def __init__(self) -> None:
        self.ious: list[FloatArray] = []
        self.score_differences: list[FloatArray] = []
        self.unmatched = self.detections = self.reordered = self.images = 0
        self.head_max = 0.0
        self.truth: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def add(self, wanted: Side, found: Side, head_difference: float) -> None:
        self.images += 1
        self.head_max = max(self.head_max, head_difference)
        pairing = pair(wanted, found)
        a, b = wanted.ranked, found.ranked
        self.detections += int((a.scores[wanted.kept] >= MATCH_SCORE).sum())
        self.unmatched += len(pairing.unmatched_wanted) + len(pairing.unmatched_found)
        self.reordered += pairing.reordered
        self.ious.append(pairwise_iou(a.xyxy[pairing.wanted], b.xyxy[pairing.found]))
        self.score_differences.append(np.abs(a.scores[pairing.wanted] - b.scores[pairing.found]))
        for row in wanted.kept[a.scores[wanted.kept] >= TRUTH_SCORE]:
            entry = self._entry(a, row)
            area = entry["bbox"][2] * entry["bbox"][3]
            self.truth.append({"id": len(self.truth) + 1, "iscrowd": 0, "area": area, **entry})
        # The artifact's own box and score wherever the checkpoint keeps a detection; its own detections elsewhere.
        of_checkpoint = np.isin(b.keys, a.keys[wanted.kept])
        own = np.zeros(len(b.keys), np.bool_)
        own[found.kept] = ~np.isin(b.keys[found.kept], a.keys)
        for row in np.flatnonzero(of_checkpoint | own):
            self.results.append({**self._entry(b, row), "score": float(b.scores[row])})

    def _entry(self, ranked: RankedCandidates, row: Any) -> dict[str, Any]:
        return {
            "image_id": self.images,
            "category_id": int(ranked.class_ids[row]) + 1,
            "bbox": [float(v) for v in xyxy_to_xywh(ranked.xyxy[row])],
        }

    def report(self) -> ParityReport:
        none = [np.zeros(0, np.float32)]
        ious = np.concatenate(none + self.ious)
        differences = np.concatenate(none + self.score_differences)

        def figure(values: NDArray[Any], share: float) -> float:
            return float(np.percentile(values, share)) if len(values) else math.nan

        return ParityReport(
            images=self.images,
            detections=self.detections,
            unmatched=self.unmatched,
            reordered=self.reordered,
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

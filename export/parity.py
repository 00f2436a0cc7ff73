"""The gate: an artifact's detections against the checkpoint's, on real letterboxed images, box by box."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parkdet.export.agreement import Agreement, AgreementTally
from parkdet.export.canvases import GateImage
from parkdet.export.matching import MATCH_SCORE, Outputs, Side, candidates_of, pair, pairwise_iou
from parkdet.runtime.geometry import FloatArray, ImageArray
from parkdet.runtime.heads import Candidates
from parkdet.runtime.model_spec import ModelSpec
from parkdet.train.model.network import Yolov5
from parkdet.train.model.tta import view_heads

Infer = Callable[[ImageArray], Outputs]
"""Canvases (B, H, W, 3) uint8 BGR to a graph's outputs."""
Tell = Callable[[str, int], None]
"""Called with whose turn it is and how many images it has done."""
CHECKPOINT = "the checkpoint in torch"
"""Whose turn is first."""
_OF_THE_CHECKPOINT = (
    "class_names", "category_ids", "strides", "anchors", "imgsz", "conf", "iou", "max_det", "split_seed", "split_count",
    "tta", "checkpoint_sha256",
)  # fmt: skip
"""Fields of a model spec that no export changes."""
_VALUES_KEPT = 1_000_000
"""Of one raw head of one image: 4 MB."""

DECODE_ERROR = 0.01
"""Pixels: a float32 coordinate of 2,000 has a step of 0.0001, a float16 one of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityLimits:
    """How far an artifact may be from the checkpoint. Source: specification, 'Parity limits'."""

    unmatched: float = math.inf
    """Largest share of detections without a partner."""
    iou_p1: float = 0
    """Smallest first percentile of the partners' IoU."""
    score_p99: float = math.inf
    """Largest 99th percentile of the partners' score difference."""
    ap75: float
    """Smallest AP@.75 of the artifact's detections with the checkpoint's as truth."""
    map_lost: float
    """Largest loss of mAP@[.5:.95] against the labels, where the images have some."""
    head: float
    """Largest difference of outputs where there are no detections to compare: all that tells a wrong graph."""


LIMITS = {
    "fp32": ParityLimits(unmatched=0, iou_p1=0.999, score_p99=0.001, ap75=0.999, map_lost=0.0005, head=0.01),
    "fp16": ParityLimits(unmatched=0.005, iou_p1=0.97, score_p99=0.02, ap75=0.99, map_lost=0.001, head=0.2),
    "bf16": ParityLimits(unmatched=0.02, iou_p1=0.93, score_p99=0.05, ap75=0.98, map_lost=0.003, head=1.0),
    "int8": ParityLimits(ap75=0.95, map_lost=0.005, head=math.inf),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that computes the detections of a graph, to be held against the checkpoint."""

    name: str
    """What runs what, in words."""
    precision: str
    """Key of LIMITS."""
    infer: Infer
    spec: ModelSpec
    note: str = ""
    """What the reader of its figures should know."""
    refuses: bool = True
    """Whether figures outside the limits refuse the artifact."""
    decode: Callable[[Outputs], list[Candidates]] | None = None
    """Another way from outputs to candidates than the spec's: the plugin node's."""
    decode_error: Callable[[], float] | None = None
    """For decoded boxes: how far, in pixels, they were from the graph's own raw heads decoded in float32."""
    overflowed: Callable[[], list[str]] | None = None
    """For FP16: the blocks whose output was the first of an image to go beyond float16."""
    faults: tuple[str, ...] = ()
    """What is wrong with it before it has run, one sentence each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """What the gate measured of one contender."""

    name: str
    precision: str
    note: str
    refuses: bool
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
    agreement: Agreement
    """AP of the artifact's detections with the checkpoint's as truth,"""
    reverse: Agreement
    """and the other way round."""
    map_checkpoint: float
    """mAP@[.5:.95] against the labels; NaN without labels."""
    map_artifact: float
    head_max: float
    """Largest difference between output values, limited where nothing was detected."""
    decode_error: float
    """Pixels between boxes that the graph decodes and its raw heads decoded outside; NaN where it decodes none."""
    faults: tuple[str, ...] = ()
    """What is wrong whatever the figures are, one sentence each."""

    @property
    def map_lost(self) -> float:
        return self.map_checkpoint - self.map_artifact

    def findings(self, limits: ParityLimits | None = None) -> list[str]:
        """What is outside the limits, its precision's own unless told otherwise; one sentence each."""
        limits = limits or LIMITS[self.precision]
        found = []
        if self.unmatched > limits.unmatched * max(self.detections, 1):
            share = self.unmatched / max(self.detections, 1)
            found.append(
                f"{self.unmatched} of {self.detections} detections have no partner ({share:.2%}, limit "
                f"{limits.unmatched:.2%})"
            )
        if not math.isnan(self.iou_p1) and self.iou_p1 < limits.iou_p1:
            found.append(f"the 1st percentile of IoU is {self.iou_p1:.4f}, below {limits.iou_p1}")
        if not math.isnan(self.score_p99) and self.score_p99 > limits.score_p99:
            found.append(f"the 99th percentile of score differences is {self.score_p99:.4f}, over {limits.score_p99}")
        ap75 = self.agreement.ap75
        if not math.isnan(ap75) and ap75 < limits.ap75:
            found.append(f"AP@.75 against the checkpoint is {ap75:.4f}, below {limits.ap75}")
        if not math.isnan(self.map_lost) and self.map_lost > limits.map_lost:
            found.append(
                f"mAP@[.5:.95] falls from {self.map_checkpoint:.4f} to {self.map_artifact:.4f}, by more than "
                f"{limits.map_lost}"
            )
        if self.decode_error > DECODE_ERROR:
            found.append(
                f"boxes are up to {self.decode_error:.3g} px from what its raw heads say, over {DECODE_ERROR}: "
                "they are not decoded in float32"
            )
        found += self.faults
        if not math.isfinite(self.head_max):
            found.append("outputs are not finite")
        elif self.detections == 0 and math.isinf(limits.head):
            found.append("nothing was detected, so nothing is proven; name a folder of your images with --calibration")
        elif self.detections == 0 and self.head_max > limits.head:
            found.append(f"outputs differ by {self.head_max:.2g}, over {limits.head}, and nothing was detected")
        return found


def reference_heads(network: Yolov5, tta: bool = False) -> Infer:
    """The checkpoint's own forward pass in float32, from the pixels that OpenCV decodes; of each view with `tta`."""
    model = network.float().eval()

    @torch.no_grad()
    def heads(canvases: ImageArray) -> list[FloatArray]:
        rgb = np.ascontiguousarray(canvases[..., ::-1].transpose(0, 3, 1, 2))
        images = torch.from_numpy(rgb).float() / 255
        return [head.numpy() for head in (view_heads(model, images) if tta else model(images))]

    return heads


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """What the checkpoint finds on one image."""

    image: GateImage
    side: Side
    shapes: list[tuple[int, ...]]
    """Of its raw heads,"""
    values: list[FloatArray]
    """and these, thinned."""


def compare(
    network: Yolov5,
    contenders: Iterable[AbstractContextManager[Contender]],
    images: Iterable[GateImage],
    tta: bool = False,
    tell: Tell = lambda *_: None,
) -> list[ParityReport]:
    """Run the checkpoint and all contenders over the images, match their detections one to one, and report on each.

    One after the other: a contender is opened when its turn comes and closed behind it, so that no more than one lies
    in memory beside the checkpoint. Contenders see two images at a time where two have the same canvas, so that a graph
    that mixes up its batch shows.
    """
    reference = reference_heads(network, tta)
    spec = dataclasses.replace(network.spec, tta=tta)
    groups: list[list[_Wanted]] = []
    done = 0
    for pair_of in _pairs(images):
        groups.append([])
        for image in pair_of:
            heads = reference(image.canvas[None])
            side = Side.of(candidates_of(heads, spec)[0])
            values = [_thinned(head[0]).copy() for head in heads]
            groups[-1].append(_Wanted(image, side, [head.shape[1:] for head in heads], values))
            done += 1
            tell(CHECKPOINT, done)
    reports = []
    for opened in contenders:
        with opened as contender:
            tally = _Tally(spec, contender)
            done = 0
            for group in groups:
                tally.add(group)
                done += len(group)
                tell(contender.name, done)
            reports.append(tally.report())
    return reports


def _thinned(head: NDArray[Any]) -> NDArray[Any]:
    """Values (N, 5 + nc) of a raw head of one image; of a large one those of every k-th anchor, and all classes.

    The heads of all images wait in memory for the contenders.
    """
    anchors = head.reshape(-1, head.shape[-1])
    return anchors[:: math.ceil(anchors.size / _VALUES_KEPT) or 1]


def _pairs(images: Iterable[GateImage]) -> Iterator[list[GateImage]]:
    """Groups of two of one canvas; what is left over alone."""
    waiting: dict[tuple[int, ...], GateImage] = {}
    for image in images:
        other = waiting.pop(image.canvas.shape, None)
        if other is None:
            waiting[image.canvas.shape] = image
        else:
            yield [other, image]
    yield from ([image] for image in waiting.values())


class _Tally:
    def __init__(self, spec: ModelSpec, contender: Contender):
        self.spec, self.contender = spec, contender
        self.ious: list[FloatArray] = []
        self.score_differences: list[FloatArray] = []
        self.unmatched = self.detections = self.reordered = self.images = 0
        self.head_max = 0.0
        self.agreement = AgreementTally(spec.class_names)
        self.misfits: dict[str, None] = {}
        """Sentences about outputs of other shapes, in order, each once."""

    def add(self, group: list[_Wanted]) -> None:
        outputs = self.contender.infer(np.stack([wanted.image.canvas for wanted in group]))
        if misfit := self._misfit(outputs, group):
            self.misfits.setdefault(misfit)
            return
        decode = self.contender.decode or (lambda found: candidates_of(found, self.contender.spec))
        of_images = decode(outputs)
        for index, wanted in enumerate(group):
            self._add(wanted.side, Side.of(of_images[index]), wanted.image)
            if self.contender.spec.head != "decoded":
                for values, head in zip(wanted.values, outputs, strict=True):
                    self.head_max = max(self.head_max, _difference(values, head[index]))
            elif not np.isfinite(outputs[0][index]).all():
                self.head_max = math.inf

    def _misfit(self, outputs: Outputs, group: list[_Wanted]) -> str:
        """Where the outputs have other shapes than the checkpoint's: heads of another canvas, or in another order."""
        batch, shapes = len(group), group[0].shapes
        wanted: list[tuple[int, ...]] = [(batch, *shape) for shape in shapes]
        if self.contender.spec.head == "decoded":
            wanted = [(batch, sum(math.prod(shape[:3]) for shape in shapes), self.spec.num_outputs)]
        found = [tuple(output.shape) for output in outputs]
        return "" if found == wanted else f"its outputs are {found}, the checkpoint's {wanted}"

    def _add(self, wanted: Side, found: Side, image: GateImage) -> None:
        self.images += 1
        pairing = pair(wanted, found)
        a, b = wanted.ranked, found.ranked
        self.detections += int((a.scores[wanted.kept] >= MATCH_SCORE).sum())
        self.unmatched += len(pairing.unmatched_wanted) + len(pairing.unmatched_found)
        self.reordered += pairing.reordered
        self.ious.append(pairwise_iou(a.xyxy[pairing.wanted], b.xyxy[pairing.found]))
        self.score_differences.append(np.abs(a.scores[pairing.wanted] - b.scores[pairing.found]))
        self.agreement.add(wanted, found, image.labels)

    def report(self) -> ParityReport:
        none = [np.zeros(0, np.float32)]
        ious = np.concatenate(none + self.ious)
        differences = np.concatenate(none + self.score_differences)
        map_checkpoint, map_artifact = self.agreement.map_of_labels()

        def figure(values: NDArray[Any], share: float) -> float:
            return float(np.percentile(values, share)) if len(values) else math.nan

        return ParityReport(
            name=self.contender.name,
            precision=self.contender.precision,
            note=self.contender.note,
            refuses=self.contender.refuses,
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
            agreement=self.agreement.agreement(),
            reverse=self.agreement.reverse(),
            map_checkpoint=map_checkpoint,
            map_artifact=map_artifact,
            head_max=self.head_max,
            decode_error=self.contender.decode_error() if self.contender.decode_error else math.nan,
            faults=(
                *self.contender.faults,
                *self.misfits,
                *self._overflow(),
                *_spec_differences(self.contender.spec, self.spec),
            ),
        )

    def _overflow(self) -> list[str]:
        blocks = self.contender.overflowed() if self.contender.overflowed else []
        if not blocks:
            return []
        return [f"values go beyond float16 first in {', '.join(blocks[:5])}; export with --precision fp32"]


def _spec_differences(found: ModelSpec, wanted: ModelSpec) -> list[str]:
    """Where an artifact's description of itself is not the checkpoint's."""
    return [
        f"its model spec has {name} {getattr(found, name)}, the checkpoint {getattr(wanted, name)}"
        for name in _OF_THE_CHECKPOINT
        if getattr(found, name) != getattr(wanted, name)
    ]


def _difference(wanted: NDArray[np.floating[Any]], found: NDArray[np.floating[Any]]) -> float:
    """Largest difference of a raw head (na, h, w, 5 + nc) from thinned values; infinite where one is not finite."""
    largest = float(np.abs(wanted - _thinned(found).astype(np.float32)).max())
    return largest if math.isfinite(largest) and np.isfinite(found).all() else math.inf

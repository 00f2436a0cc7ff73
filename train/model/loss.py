"""The training loss of YOLOv5: CIoU, objectness and class terms over anchors matched by shape.

Shapes: B images, na anchors a cell, h x w cells, nc classes, M targets, K matches on one level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parkdet.runtime.model_spec import ModelSpec

_BALANCE_OF_THREE = (4.0, 1.0, 0.4)
_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
_NEIGHBOUR_OFFSET = 0.5


def scaled_gains(
    spec: ModelSpec, imgsz: int, box: float = 0.05, cls: float = 0.5, obj: float = 1.0
) -> dict[str, float]:
    """The recipe's gains, stated for 3 levels, 80 classes and 640 px, scaled to this model and image size."""
    levels = 3 / len(spec.strides)
    return {
        "box": box * levels,
        "cls": cls * spec.num_classes / 80 * levels,
        "obj": obj * (imgsz / 640) ** 2 * levels,
    }


class DetectionLoss:
    """Loss of raw heads against targets. The gains are those that are applied; `scaled_gains` gives them.

    Without gains, the recipe's defaults scaled to the spec are taken. `cls_pw` and `obj_pw` are the weights of
    positives, `anchor_t` the largest ratio of a box's side to its anchor's (or the reverse), `fl_gamma` the
    focusing parameter of the focal loss (0: none), `label_smoothing` the share taken from the true class.
    """

    def __init__(
        self,
        spec: ModelSpec,
        box: float | None = None,
        cls: float | None = None,
        obj: float | None = None,
        cls_pw: float = 1.0,
        obj_pw: float = 1.0,
        anchor_t: float = 4.0,
        fl_gamma: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        if len(spec.strides) > len(_BALANCE):
            raise ValueError(f"the loss is defined for at most {len(_BALANCE)} levels, not {len(spec.strides)}")
        defaults = scaled_gains(spec, spec.imgsz)
        self.spec = spec
        self.box_gain = defaults["box"] if box is None else box
        self.cls_gain = defaults["cls"] if cls is None else cls
        self.obj_gain = defaults["obj"] if obj is None else obj
        self.anchor_t = anchor_t
        self.balance = _BALANCE_OF_THREE if len(spec.strides) == 3 else _BALANCE[: len(spec.strides)]
        self.positive, self.negative = 1 - label_smoothing / 2, label_smoothing / 2
        self._class_bce = _BinaryLoss(cls_pw, fl_gamma)
        self._objectness_bce = _BinaryLoss(obj_pw, fl_gamma)
        # In cells of their level, as boxes are when they are matched.
        self._anchors = [
            torch.tensor(level, dtype=torch.float32) / stride
            for level, stride in zip(spec.anchors, spec.strides, strict=True)
        ]

    def __call__(
        self, heads: Sequence[Tensor], targets: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss (1,), summed over its parts times the batch size, and the parts (3,): box, objectness, class.

        `heads`: raw heads (B, na, h, w, 5 + nc) of every level. `targets` (M, 6): image index, class id, cx, cy,
        w, h normalised to the canvas. The parts are detached and not multiplied by the batch size.

        Where several processes hold a share of the batch each, `sum_over_ranks` sums a tensor over them. Means are
        then over the matches and images of all, and what is returned is this process's share of the whole
        batch's loss: the shares, and the gradients of them, are to be summed.
        """
        device = heads[0].device
        targets = targets.to(device)
        matches = [self._match(targets, level, (head.shape[2], head.shape[3])) for level, head in enumerate(heads)]
        images = heads[0].shape[0]
        counts = [images, *(len(match.image) for match in matches)]
        if sum_over_ranks is not None:
            counts = [int(count) for count in sum_over_ranks(torch.tensor(counts)).tolist()]
        all_images, *all_matches = counts
        box, objectness, classes = (torch.zeros(1, device=device) for _ in range(3))
        for level, (head, match) in enumerate(zip(heads, matches, strict=True)):
            raw = head.float()
            wanted = torch.zeros_like(raw[..., 0])
            if len(match.image):
                chosen = raw[match.image, match.anchor, match.row, match.column]
                iou = complete_iou(self._boxes(chosen, match), match.boxes)
                box += (1 - iou).sum() / all_matches[level]
                wanted[match.image, match.anchor, match.row, match.column] = iou.detach().clamp(0)
                if self.spec.num_classes > 1:
                    labels = torch.full_like(chosen[:, 5:], self.negative)
                    labels[torch.arange(len(labels), device=device), match.class_id] = self.positive
                    summed = self._class_bce(chosen[:, 5:], labels)
                    classes += summed / (all_matches[level] * self.spec.num_classes)
            cells = wanted.numel() // images * all_images
            objectness += self._objectness_bce(raw[..., 4], wanted) / cells * self.balance[level]
        parts = torch.cat((box * self.box_gain, objectness * self.obj_gain, classes * self.cls_gain))
        return parts.sum(dim=0, keepdim=True) * all_images, parts.detach()

    @staticmethod
    def _boxes(chosen: Tensor, match: _Match) -> Tensor:
        centre = chosen[:, 0:2].sigmoid() * 2 - 0.5
        size = (chosen[:, 2:4].sigmoid() * 2) ** 2 * match.anchor_wh
        return torch.cat((centre, size), 1)

    def _match(self, targets: Tensor, level: int, grid_hw: tuple[int, int]) -> _Match:
        """Targets to anchors of like shape, in their own cell and the two nearest neighbours."""
        height, width = grid_hw
        anchors = self._anchors[level] = self._anchors[level].to(targets.device)
        cells = targets[:, 2:6] * targets.new_tensor([width, height, width, height])
        ratio = cells[None, :, 2:4] / anchors[:, None]
        fits = torch.maximum(ratio, 1 / ratio).amax(2) < self.anchor_t  # (na, M)
        anchor, target = fits.nonzero(as_tuple=True)
        centre = cells[target, 0:2]
        to_far_edge = centre.new_tensor([width, height]) - centre
        near_low = (centre % 1 < _NEIGHBOUR_OFFSET) & (centre > 1)
        near_high = (to_far_edge % 1 < _NEIGHBOUR_OFFSET) & (to_far_edge > 1)
        # Own cell, left, above, right, below. Where matches meet in one cell the last one's IoU is kept, so
        # the order is part of the definition.
        takes = (torch.ones_like(near_low[:, 0]), near_low[:, 0], near_low[:, 1], near_high[:, 0], near_high[:, 1])
        shifts = centre.new_tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]) * _NEIGHBOUR_OFFSET
        which = torch.cat([take.nonzero()[:, 0] for take in takes])
        shift = torch.cat([s.expand(int(take.sum()), 2) for s, take in zip(shifts, takes, strict=True)])
        centre, anchor, target = centre[which], anchor[which], target[which]
        cell = (centre - shift).long()
        column, row = cell[:, 0].clamp(0, width - 1), cell[:, 1].clamp(0, height - 1)
        offset = centre - torch.stack((column, row), 1)
        return _Match(
            image=targets[target, 0].long(),
            anchor=anchor,
            row=row,
            column=column,
            boxes=torch.cat((offset, cells[target, 2:4]), 1),
            anchor_wh=anchors[anchor],
            class_id=targets[target, 1].long(),
        )


@dataclass(frozen=True, slots=True)
class _Match:
    """K matches: index columns (K,); boxes (K, 4) as centre offset and size in cells; anchors (K, 2) in cells."""

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    boxes: Tensor
    anchor_wh: Tensor
    class_id: Tensor


class _BinaryLoss:
    """Summed binary cross-entropy with a weight on positives, focused on hard examples where gamma is positive.

    Source of the focal weight: arXiv 1708.02002, equation 5, with alpha 0.25.
    """

    def __init__(self, positive_weight: float, gamma: float):
        self.gamma = gamma
        self._bce = nn.BCEWithLogitsLoss(
            pos_weight=torch.tensor([positive_weight]), reduction="none" if gamma > 0 else "sum"
        )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self._bce.to(logits.device)(logits, labels)
        if self.gamma <= 0:
            return loss
        probability = logits.sigmoid()
        truth = labels * probability + (1 - labels) * (1 - probability)
        alpha = labels * 0.25 + (1 - labels) * 0.75
        return (loss * alpha * (1 - truth) ** self.gamma).sum()


def complete_iou(a_cxcywh: Tensor, b_cxcywh: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU (K,) of boxes (K, 4) pair by pair. Source: arXiv 1911.08287."""
    a_low, a_high = a_cxcywh[:, :2] - a_cxcywh[:, 2:] / 2, a_cxcywh[:, :2] + a_cxcywh[:, 2:] / 2
    b_low, b_high = b_cxcywh[:, :2] - b_cxcywh[:, 2:] / 2, b_cxcywh[:, :2] + b_cxcywh[:, 2:] / 2
    sides = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(0)
    intersection = sides.prod(1)
    union = a_cxcywh[:, 2:].prod(1) + b_cxcywh[:, 2:].prod(1) - intersection + eps
    iou = intersection / union
    hull = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    centre_distance = ((b_low + b_high - a_low - a_high) ** 2).sum(1) / 4
    distance = centre_distance / ((hull**2).sum(1) + eps)
    aspect_a = torch.atan(a_cxcywh[:, 2] / (a_cxcywh[:, 3] + eps))
    aspect_b = torch.atan(b_cxcywh[:, 2] / (b_cxcywh[:, 3] + eps))
    aspect = (4 / math.pi**2) * (aspect_b - aspect_a) ** 2
    with torch.no_grad():
        weight = aspect / (aspect - iou + (1 + eps))
    return iou - (distance + weight * aspect)

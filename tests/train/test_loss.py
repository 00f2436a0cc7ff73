"""The loss against a version made of loops, and its parts against torchvision's definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from parkdet.runtime.model_spec import ModelSpec
from parkdet.train.model.loss import DetectionLoss, complete_iou, scaled_gains

SPEC = ModelSpec(
    class_names=("a", "b", "c"),
    strides=(8, 16, 32),
    anchors=(
        ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
        ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
        ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
    ),
    imgsz=640,
)


def heads_of(seed: int, batch: int = 2, height: int = 64, width: int = 96) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, height // s, width // s, 8, generator=generator) for s in SPEC.strides]


def targets_of(seed: int, count: int, batch: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rows = np.empty((count, 6), np.float32)
    rows[:, 0] = rng.integers(0, batch, count)
    rows[:, 1] = rng.integers(0, 3, count)
    rows[:, 2:4] = rng.random((count, 2))
    rows[:, 4:6] = rng.uniform(0.05, 0.9, (count, 2))
    return torch.from_numpy(rows)


def loop_ciou(p: list[float], t: list[float]) -> float:
    """Complete IoU of two cxcywh boxes, by the formulas of its paper in Python's floats."""
    px1, px2, py1, py2 = p[0] - p[2] / 2, p[0] + p[2] / 2, p[1] - p[3] / 2, p[1] + p[3] / 2
    tx1, tx2, ty1, ty2 = t[0] - t[2] / 2, t[0] + t[2] / 2, t[1] - t[3] / 2, t[1] + t[3] / 2
    inter = max(min(px2, tx2) - max(px1, tx1), 0) * max(min(py2, ty2) - max(py1, ty1), 0)
    iou = inter / (p[2] * p[3] + t[2] * t[3] - inter)
    diagonal = (max(px2, tx2) - min(px1, tx1)) ** 2 + (max(py2, ty2) - min(py1, ty1)) ** 2
    distance = (p[0] - t[0]) ** 2 + (p[1] - t[1]) ** 2
    v = 4 / math.pi**2 * (math.atan(t[2] / t[3]) - math.atan(p[2] / p[3])) ** 2
    alpha = v / (1 - iou + v)
    return iou - distance / diagonal - alpha * v


def bce(logit: float, label: float, weight: float = 1.0) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -(weight * label * math.log(probability) + (1 - label) * math.log(1 - probability))


def loop_loss(heads: list[torch.Tensor], targets: torch.Tensor, anchor_t: float, cls_pw: float, obj_pw: float) -> float:
    """The specification's sentences one by one; unit gains."""
    total = 0.0
    for level, head in enumerate(heads):
        _, _, rows, columns, _ = head.shape
        stride = SPEC.strides[level]
        matches: list[tuple[int, int, int, int, int, float]] = []
        for offset_x, offset_y in ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1)):
            for a, (aw, ah) in enumerate(SPEC.anchors[level]):
                for image, class_id, cx, cy, w, h in targets.tolist():
                    gx, gy, gw, gh = cx * columns, cy * rows, w * columns, h * rows
                    rw, rh = gw / (aw / stride), gh / (ah / stride)
                    if max(rw, 1 / rw, rh, 1 / rh) >= anchor_t:
                        continue
                    if offset_x == 1 and not (gx % 1 < 0.5 and gx > 1):
                        continue
                    if offset_y == 1 and not (gy % 1 < 0.5 and gy > 1):
                        continue
                    if offset_x == -1 and not ((columns - gx) % 1 < 0.5 and columns - gx > 1):
                        continue
                    if offset_y == -1 and not ((rows - gy) % 1 < 0.5 and rows - gy > 1):
                        continue
                    j = min(max(int(gx - offset_x * 0.5), 0), columns - 1)
                    i = min(max(int(gy - offset_y * 0.5), 0), rows - 1)
                    raw = head[int(image), a, i, j].tolist()
                    s = [1 / (1 + math.exp(-value)) for value in raw[:4]]
                    predicted = [
                        2 * s[0] - 0.5,
                        2 * s[1] - 0.5,
                        (2 * s[2]) ** 2 * aw / stride,
                        (2 * s[3]) ** 2 * ah / stride,
                    ]
                    ciou = loop_ciou(predicted, [gx - j, gy - i, gw, gh])
                    matches.append((int(image), a, i, j, int(class_id), ciou))
        wanted = torch.zeros(head.shape[:4])
        if matches:
            total += sum(1 - m[5] for m in matches) / len(matches)
            class_terms = [
                bce(head[m[0], m[1], m[2], m[3], 5 + c].item(), float(c == m[4]), cls_pw)
                for m in matches
                for c in range(3)
            ]
            total += sum(class_terms) / len(class_terms)
            for m in matches:
                wanted[m[:4]] = max(m[5], 0)
        terms = [
            bce(x, y, obj_pw) for x, y in zip(head[..., 4].flatten().tolist(), wanted.flatten().tolist(), strict=True)
        ]
        total += sum(terms) / len(terms) * (4.0, 1.0, 0.4)[level]
    return total * heads[0].shape[0]


@pytest.mark.parametrize(
    ("count", "anchor_t", "cls_pw", "obj_pw"), [(0, 4, 1, 1), (1, 4, 1, 1), (12, 2.91, 0.631, 0.911)]
)
def test_the_loss_is_the_specifications(count: int, anchor_t: float, cls_pw: float, obj_pw: float) -> None:
    heads, targets = heads_of(count), targets_of(count, count)
    loss, parts = DetectionLoss(SPEC, box=1, cls=1, obj=1, anchor_t=anchor_t, cls_pw=cls_pw, obj_pw=obj_pw)(
        heads, targets
    )
    assert loss.shape == (1,)
    assert parts.shape == (3,)
    assert loss.item() == pytest.approx(loop_loss(heads, targets, anchor_t, cls_pw, obj_pw), rel=1e-4)
    assert parts.sum().item() * 2 == pytest.approx(loss.item(), rel=1e-6)


def test_gains_weigh_the_parts() -> None:
    heads, targets = heads_of(5), targets_of(5, 8)
    _, unit = DetectionLoss(SPEC, box=1, cls=1, obj=1)(heads, targets)
    _, weighed = DetectionLoss(SPEC, box=0.5, cls=0.25, obj=2)(heads, targets)
    torch.testing.assert_close(weighed, unit * torch.tensor([0.5, 2, 0.25]))


def test_gains_are_scaled_by_levels_classes_and_size() -> None:
    assert scaled_gains(SPEC, 640) == pytest.approx({"box": 0.05, "cls": 0.5 * 3 / 80, "obj": 1.0})
    four = ModelSpec(
        class_names=("x",) * 1, strides=(8, 16, 32, 64), anchors=SPEC.anchors + SPEC.anchors[:1], imgsz=256
    )
    assert scaled_gains(four, 1280, 0.0296, 0.243, 0.301) == pytest.approx(
        {"box": 0.0296 * 0.75, "cls": 0.243 / 80 * 0.75, "obj": 0.301 * 4 * 0.75}
    )


def test_no_targets_still_train_the_objectness() -> None:
    heads = [head.requires_grad_() for head in heads_of(3)]
    loss, parts = DetectionLoss(SPEC)(heads, torch.zeros(0, 6))
    loss.backward()  # type: ignore[no-untyped-call]
    assert parts[0] == parts[2] == 0
    assert all(head.grad is not None and head.grad[..., 4].abs().sum() > 0 for head in heads)


def test_one_class_has_no_class_loss() -> None:
    spec = ModelSpec(class_names=("x",), strides=SPEC.strides, anchors=SPEC.anchors, imgsz=640)
    heads = [head[..., :6] for head in heads_of(4)]
    targets = targets_of(4, 6)
    targets[:, 1] = 0
    assert DetectionLoss(spec)(heads, targets)[1][2] == 0


def test_focusing_lowers_the_loss_of_what_is_known() -> None:
    heads, targets = heads_of(6), targets_of(6, 8)
    plain = DetectionLoss(SPEC, box=0, cls=0, obj=1)(heads, targets)[0].item()
    focused = DetectionLoss(SPEC, box=0, cls=0, obj=1, fl_gamma=1.5)(heads, targets)[0].item()
    assert 0 < focused < plain


def test_label_smoothing_moves_the_labels() -> None:
    heads, targets = heads_of(7), targets_of(7, 8)
    smoothed = DetectionLoss(SPEC, box=0, cls=1, obj=0, label_smoothing=0.2)(heads, targets)[0].item()
    plain = DetectionLoss(SPEC, box=0, cls=1, obj=0)(heads, targets)[0].item()
    assert smoothed != pytest.approx(plain, rel=1e-3)


def test_ciou_of_equal_and_distant_boxes() -> None:
    box = torch.tensor([[5.0, 5.0, 4.0, 2.0]])
    assert complete_iou(box, box).item() == pytest.approx(1, abs=1e-6)
    far = torch.tensor([[50.0, 5.0, 4.0, 2.0]])
    assert complete_iou(box, far).item() == pytest.approx(loop_ciou(box[0].tolist(), far[0].tolist()), abs=1e-6)

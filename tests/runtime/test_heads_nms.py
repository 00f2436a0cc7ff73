"""Decoding and suppression against the fixture and against loops that follow the specification word by word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from parkdet.runtime import Detections, ModelSpec, decode_heads, nms, non_max_suppression
from parkdet.runtime.heads import Candidates, decode_candidates
from parkdet.runtime.nms import MAX_CANDIDATES, NmsSettings, suppress

P6_ANCHORS = (
    ((19.0, 27.0), (44.0, 40.0), (38.0, 94.0)),
    ((96.0, 68.0), (86.0, 152.0), (180.0, 137.0)),
    ((140.0, 301.0), (303.0, 264.0), (238.0, 542.0)),
    ((436.0, 615.0), (739.0, 380.0), (925.0, 792.0)),
)


def spec_of(num_classes: int, levels: int = 4) -> ModelSpec:
    return ModelSpec(
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        strides=(8, 16, 32, 64)[:levels],
        anchors=P6_ANCHORS[:levels],
        imgsz=256,
    )


def random_heads(rng: np.random.Generator, spec: ModelSpec, batch: int = 2, cells: int = 2) -> list[NDArray[Any]]:
    levels = len(spec.strides)
    return [
        rng.normal(
            0, 2, (batch, 3, cells << (levels - 1 - i), (cells + 1) << (levels - 1 - i), spec.num_outputs)
        ).astype(np.float32)
        for i in range(levels)
    ]


def test_decoding_follows_the_formulas_entry_by_entry() -> None:
    spec = spec_of(3, levels=3)
    heads = random_heads(np.random.default_rng(0), spec, batch=1, cells=1)
    decoded = decode_heads(heads, spec)[0]
    row = 0
    for level, head in enumerate(heads):
        for anchor in range(3):
            for i in range(head.shape[2]):
                for j in range(head.shape[3]):
                    s = [1 / (1 + math.exp(-float(v))) for v in head[0, anchor, i, j]]
                    width, height = spec.anchors[level][anchor]
                    stride = spec.strides[level]
                    expected = [
                        (2 * s[0] - 0.5 + j) * stride,
                        (2 * s[1] - 0.5 + i) * stride,
                        (2 * s[2]) ** 2 * width,
                        (2 * s[3]) ** 2 * height,
                        *s[4:],
                    ]
                    np.testing.assert_allclose(decoded[row], expected, rtol=2e-6, atol=1e-6)
                    row += 1
    assert row == len(decoded)


def test_candidates_are_rows_of_the_full_decoding() -> None:
    spec = spec_of(5)
    heads = random_heads(np.random.default_rng(1), spec, batch=3)
    full = decode_heads(heads, spec)
    for image, candidates in enumerate(decode_candidates(heads, spec, 0.3)):
        assert np.array_equal(candidates.anchor_index, np.flatnonzero(full[image, :, 4] > np.float32(0.3)))
        assert np.array_equal(candidates.decoded, full[image, candidates.anchor_index])


def test_half_precision_heads_are_decoded_in_float32() -> None:
    spec = spec_of(2)
    heads = [head.astype(np.float16) for head in random_heads(np.random.default_rng(2), spec)]
    decoded = decode_heads(heads, spec)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, decode_heads([head.astype(np.float32) for head in heads], spec))


def test_heads_that_do_not_fit_the_spec_are_refused() -> None:
    spec = spec_of(2)
    heads = random_heads(np.random.default_rng(3), spec)
    with pytest.raises(ValueError, match="4 levels"):
        decode_heads(heads[:3], spec)
    with pytest.raises(ValueError, match="head 1"):
        decode_heads([heads[0], heads[1][..., :6], *heads[2:]], spec)


def brute_force_nms(
    decoded: NDArray[np.float32], conf: float, iou: float, max_det: int, multi_label: bool, agnostic: bool
) -> list[tuple[int, int]]:
    """(anchor, class) of the survivors in order, by the words of the specification."""
    nc = decoded.shape[1] - 5
    found: list[tuple[float, int, int, int]] = []
    for anchor, row in enumerate(decoded):
        if not np.isfinite(row[:5]).all() or not row[4] > np.float32(conf):
            continue
        scores = [(np.float32(row[4] * row[5 + c]), c) for c in range(nc) if np.isfinite(row[4] * row[5 + c])]
        if not multi_label and scores:
            scores = [max(scores, key=lambda pair: (pair[0], -pair[1]))]
        found += [(float(s), anchor * nc + c, anchor, c) for s, c in scores if s > np.float32(conf)]
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    kept: list[tuple[int, int]] = []
    for _, _, anchor, class_id in found[:MAX_CANDIDATES]:
        if len(kept) == max_det:
            break
        if all(
            pair_iou(decoded[anchor], decoded[other]) <= iou or (not agnostic and class_id != other_class)
            for other, other_class in kept
        ):
            kept.append((anchor, class_id))
    return kept


def pair_iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    corners = [(r[0] - r[2] / 2, r[1] - r[3] / 2, r[0] + r[2] / 2, r[1] + r[3] / 2) for r in (a, b)]
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = corners
    inter = max(min(ax2, bx2) - max(ax1, bx1), np.float32(0)) * max(min(ay2, by2) - max(ay1, by1), np.float32(0))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return float(inter / union) if union > 0 else 0.0


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 60),
    st.sampled_from([1, 2, 14]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 5, 300]),
    st.sampled_from([1, 7, 1024]),
    st.sampled_from([1, 4, 128]),
)
def test_suppression_is_the_specifications(
    seed: int, rows: int, num_classes: int, multi_label: bool, agnostic: bool, max_det: int, block: int, square: int
) -> None:
    rng = np.random.default_rng(seed)
    decoded = np.empty((rows, 5 + num_classes), np.float32)
    # Whole numbers make ties and repeated boxes common.
    decoded[:, :4] = rng.integers(4, 30, (rows, 4))
    decoded[:, 4:] = rng.integers(0, 9, (rows, 1 + num_classes)) / 8
    if rows > 3:
        decoded[rng.integers(rows), rng.integers(decoded.shape[1])] = rng.choice([np.nan, np.inf, -np.inf])
    chosen = NmsSettings(conf=0.1, iou=0.45, max_det=max_det, multi_label=multi_label, agnostic=agnostic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "_BLOCK", block)
        patch.setattr(nms, "_SQUARE", square)
        found, counts = suppress(Candidates(decoded, np.arange(rows)), chosen)
    expected = brute_force_nms(decoded, 0.1, 0.45, max_det, multi_label, agnostic)
    unlimited = brute_force_nms(decoded, 0.1, 0.45, rows * num_classes + 1, multi_label, agnostic)
    assert counts.at_max_det == (len(unlimited) > max_det)
    assert found.class_ids.tolist() == [class_id for _, class_id in expected]
    for (box, score, class_id), (anchor, _) in zip(found, expected, strict=True):
        x, y, w, h = decoded[anchor, :4]
        assert box.tolist() == [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        assert score == decoded[anchor, 4] * decoded[anchor, 5 + class_id]


def test_nothing_gives_nothing() -> None:
    assert len(non_max_suppression(np.zeros((0, 7), np.float32))) == 0
    assert len(non_max_suppression(np.zeros((50, 7), np.float32))) == 0
    assert len(Detections.empty()) == 0


def test_an_iou_of_exactly_the_threshold_is_kept() -> None:
    # Two boxes of 4 x 2 that share 2 x 2: IoU 4 / 12.
    decoded = np.array([[2, 1, 4, 2, 1, 0.9], [4, 1, 4, 2, 1, 0.8]], np.float32)
    third = float(np.float32(4) / np.float32(12))
    assert len(non_max_suppression(decoded, iou=third)) == 2
    assert len(non_max_suppression(decoded, iou=third - 1e-6)) == 1


def test_the_caps_are_counted() -> None:
    rows = MAX_CANDIDATES + 7
    decoded = np.zeros((rows, 6), np.float32)
    decoded[:, 0] = np.arange(rows) * 10
    decoded[:, 2:4] = 1
    decoded[:, 4:] = 1
    decoded[-1, 5] = 1.0
    found, counts = suppress(Candidates(decoded, np.arange(rows)), NmsSettings(max_det=3))
    assert (counts.candidates, counts.over_limit, counts.at_max_det) == (rows, 7, True)
    assert found.xyxy[:, 0].tolist() == [-0.5, 9.5, 19.5]


def test_over_the_limit_the_first_of_equal_scores_stay() -> None:
    rows = MAX_CANDIDATES + 5
    decoded = np.zeros((rows, 6), np.float32)
    decoded[:, 0] = np.arange(rows) * 10
    decoded[:, 2:4] = 1
    decoded[:, 4:] = 0.5
    decoded[-2:, 4] = 0.9
    found = non_max_suppression(decoded, max_det=MAX_CANDIDATES)
    assert len(found) == MAX_CANDIDATES
    assert found.xyxy[:2, 0].tolist() == [(rows - 2) * 10 - 0.5, (rows - 1) * 10 - 0.5]
    assert found.xyxy[-1, 0] == (MAX_CANDIDATES - 3) * 10 - 0.5


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize(
    ("key", "source", "options"),
    [
        ("nms_conf0p01_iou0p7_multi_max50_img", "decoded", {}),
        (
            "nms_conf0p25_iou0p45_agnostic_max300_img",
            "decoded",
            {"conf": 0.25, "iou": 0.45, "max_det": 300, "multi_label": False, "agnostic": True},
        ),
        ("nms_tta_img", "tta", {}),
    ],
)
def test_the_fixtures_survivors(shared: Path, image: int, key: str, source: str, options: dict[str, Any]) -> None:
    fixture = np.load(shared / "fixtures" / "yolov5n6_nc14_official.npz")
    expected = fixture[f"{key}{image}"]
    found = non_max_suppression(fixture[source][image], **options)
    assert found.class_ids.tolist() == expected[:, 5].astype(int).tolist()
    np.testing.assert_allclose(found.xyxy, expected[:, :4], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.scores, expected[:, 4], rtol=1e-3, atol=1e-4)


def test_the_fixtures_decoding(shared: Path) -> None:
    fixture = np.load(shared / "fixtures" / "yolov5n6_nc14_official.npz")
    decoded = decode_heads([fixture[f"raw{level}"] for level in range(4)], spec_of(14))
    assert (np.abs(decoded - fixture["decoded"]) <= 1e-4 + 1e-3 * np.abs(fixture["decoded"])).all()

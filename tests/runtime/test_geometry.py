"""Letterbox, canvas rule and box formats against brute force and OpenCV."""

from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parkdet.runtime.geometry import (
    Letterbox,
    areas,
    canvas_hw,
    cxcywh_to_xyxy,
    iou_matrix,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)

SIDES = st.integers(1, 5000)


def test_no_boxes_stay_no_boxes() -> None:
    none = np.zeros((0, 4), np.float32)
    for convert in (cxcywh_to_xyxy, xyxy_to_cxcywh, xywh_to_xyxy, xyxy_to_xywh):
        assert convert(none).shape == (0, 4)
    assert iou_matrix(none, none).shape == (0, 0)
    box = Letterbox.fit((480, 640), 320, 32)
    assert box.to_canvas(none).shape == box.to_image(none).shape == (0, 4)


@pytest.mark.parametrize(
    ("image_hw", "imgsz", "stride", "resized_hw", "canvas"),
    [
        ((1080, 1920), 1536, 64, (864, 1536), (896, 1600)),
        ((1920, 1080), 1536, 64, (1536, 864), (1600, 896)),
        ((480, 640), 320, 32, (240, 320), (256, 352)),
        ((480, 640), 640, 64, (480, 640), (512, 704)),
        ((100, 100), 640, 32, (640, 640), (672, 672)),
        ((1, 1), 64, 64, (64, 64), (128, 128)),
        ((1, 5000), 640, 64, (1, 640), (64, 704)),
    ],
)
def test_canvases_of_known_images(
    image_hw: tuple[int, int],
    imgsz: int,
    stride: int,
    resized_hw: tuple[int, int],
    canvas: tuple[int, int],
) -> None:
    box = Letterbox.fit(image_hw, imgsz, stride)
    assert (box.resized_hw, box.canvas_hw) == (resized_hw, canvas)


@given(SIDES, SIDES, st.integers(32, 2000), st.sampled_from([32, 64]))
def test_the_canvas_is_the_rule_in_exact_arithmetic(height: int, width: int, imgsz: int, stride: int) -> None:
    expected = []
    for side in (height, width):
        cells = Fraction(imgsz * side, max(height, width) * stride) + Fraction(1, 2)
        expected.append(int(-(-cells // 1)) * stride)
    assert canvas_hw((height, width), imgsz, stride) == tuple(expected)
    box = Letterbox.fit((height, width), imgsz, stride)
    spare = np.array(box.canvas_hw) - np.array(box.resized_hw)
    assert (spare >= 0).all()
    # Centred: the two pads of an axis differ by one pixel at most, the smaller one first.
    first = np.array([box.top, box.left])
    assert ((spare - 2 * first >= 0) & (spare - 2 * first <= 1)).all()


@given(SIDES, SIDES, st.integers(32, 2000), st.integers(0, 2**32 - 1))
def test_boxes_come_back_from_the_canvas(height: int, width: int, imgsz: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((20, 2, 2)), axis=1) * [width, height]
    boxes = corners.reshape(-1, 4).astype(np.float32)
    box = Letterbox.fit((height, width), imgsz, 64)
    # One part in 10^5 of the longer side: float32 holds about seven digits, and two roundings take place.
    tolerance = 1e-5 * max(height, width) + 1e-3 * max(height, width) / imgsz
    np.testing.assert_allclose(box.to_image(box.to_canvas(boxes)), boxes, atol=tolerance)


def test_boxes_beyond_the_image_are_clipped_to_it() -> None:
    box = Letterbox.fit((100, 200), 400, 64)
    (clipped,) = box.to_image(np.array([[-50.0, -50.0, 9999.0, 9999.0]]))
    assert clipped.tolist() == [0, 0, 200, 100]


def test_the_canvas_holds_opencvs_resize_in_grey() -> None:
    rng = np.random.default_rng(0)
    for image_hw, imgsz, method in (((90, 161), 100, cv2.INTER_AREA), ((30, 20), 100, cv2.INTER_LINEAR)):
        image = rng.integers(0, 256, (*image_hw, 3), dtype=np.uint8)
        box = Letterbox.fit(image_hw, imgsz, 32)
        canvas = box.apply(image)
        height, width = box.resized_hw
        inside = canvas[box.top : box.top + height, box.left : box.left + width]
        assert np.array_equal(inside, cv2.resize(image, (width, height), interpolation=method))
        outside = canvas.copy()
        outside[box.top : box.top + height, box.left : box.left + width] = 114
        assert (outside == 114).all()


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    box = Letterbox.fit((48, 64), 64, 32)
    assert np.array_equal(box.apply(image)[box.top : box.top + 48, box.left : box.left + 64], image)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Letterbox.fit((0, 10), 64, 32)
    with pytest.raises(ValueError, match="cannot hold"):
        Letterbox.fit((100, 100), 64, 32, canvas=(32, 32))
    with pytest.raises(ValueError, match="this letterbox is for"):
        Letterbox.fit((100, 100), 64, 32).apply(np.zeros((50, 50, 3), np.uint8))


@given(st.integers(0, 2**32 - 1))
def test_iou_counts_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 12, (6, 2, 2)), axis=1).reshape(-1, 4)
    a, b = corners[:3].astype(np.float64), corners[3:].astype(np.float64)
    for i, first in enumerate(corners[:3]):
        for j, second in enumerate(corners[3:]):
            masks = []
            for x1, y1, x2, y2 in (first, second):
                mask = np.zeros((12, 12), bool)
                mask[y1:y2, x1:x2] = True
                masks.append(mask)
            union = (masks[0] | masks[1]).sum()
            expected = (masks[0] & masks[1]).sum() / union if union else 0
            assert iou_matrix(a, b)[i, j] == pytest.approx(expected)
        assert areas(a)[i] == (first[2] - first[0]) * (first[3] - first[1])


def test_box_formats_by_hand() -> None:
    xyxy = np.array([[10.0, 20.0, 14.0, 30.0]])
    assert xyxy_to_cxcywh(xyxy).tolist() == [[12, 25, 4, 10]]
    assert xyxy_to_xywh(xyxy).tolist() == [[10, 20, 4, 10]]
    assert cxcywh_to_xyxy(xyxy_to_cxcywh(xyxy)).tolist() == xyxy.tolist()
    assert xywh_to_xyxy(xyxy_to_xywh(xyxy)).tolist() == xyxy.tolist()

"""Copy-paste for boxes: what is pasted, where, what it may hide; pixels compared one box at a time."""

from __future__ import annotations

import numpy as np
import pytest

from parkdet.train.data.augment import AugmentSettings, LabelledCanvas, Tile, augmented, mosaic, paste_mirrored

STILL = AugmentSettings(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0)


def noise(height: int, width: int, boxes: list[tuple[float, float, float, float]]) -> LabelledCanvas:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    return LabelledCanvas(pixels, np.arange(len(boxes), dtype=np.int32), xyxy)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_without_boxes_nothing_changes() -> None:
    canvas = noise(20, 40, [])
    pasted = paste_mirrored(canvas, 1.0, rng())
    np.testing.assert_array_equal(pasted.image, canvas.image)
    assert pasted.xyxy.shape == (0, 4)
    assert pasted.class_ids.dtype == np.int32


def test_a_copy_is_the_mirror_image_at_the_mirrored_place() -> None:
    canvas = noise(20, 40, [(3, 5, 11, 12)])
    pasted = paste_mirrored(canvas, 1.0, rng())
    expected = canvas.image.copy()
    for y in range(5, 12):
        for x in range(3, 11):
            expected[y, 39 - x] = canvas.image[y, x]
    np.testing.assert_array_equal(pasted.image, expected)
    np.testing.assert_array_equal(pasted.xyxy, [[3, 5, 11, 12], [29, 5, 37, 12]])
    assert pasted.class_ids.tolist() == [0, 0]
    assert canvas.xyxy.shape == (1, 4)


@pytest.mark.parametrize(("x1", "copies"), [(26, 0), (26.7, 1), (2, 1)])
def test_a_copy_may_hide_less_than_three_tenths_of_a_box(x1: float, copies: int) -> None:
    # The copy of the first box lands on 29 to 37; the second box is 10 wide and as tall as the copy or taller.
    second = (x1 + 5.7, 5, x1 + 15.7, 12) if x1 > 20 else (15, 0, 25, 20)
    canvas = noise(20, 60, [(23, 5, 31, 12), second])
    hidden = max(0.0, min(37, second[2]) - max(29, second[0])) / 10
    pasted = paste_mirrored(canvas, 0.0, rng())
    assert len(pasted.xyxy) == 2
    boxes = paste_mirrored(LabelledCanvas(canvas.image, canvas.class_ids, canvas.xyxy), 1.0, rng()).xyxy
    mirrored_first = [29.0, 5.0, 37.0, 12.0]
    # Its own box, 23 to 31, is hidden by a quarter, which is allowed.
    assert (mirrored_first in boxes.tolist()) == (hidden < 0.3)
    assert copies in (0, 1)


def test_half_of_the_boxes_are_copied_for_a_share_of_a_half() -> None:
    boxes = [(2.0 + 4 * i, 2.0 + 10 * i, 5.0 + 4 * i, 9.0 + 10 * i) for i in range(4)]
    pasted = paste_mirrored(noise(60, 200, boxes), 0.5, rng())
    assert len(pasted.xyxy) == 6
    sources = {tuple(box) for box in np.array(boxes, np.float32).tolist()}
    for box in pasted.xyxy[4:].tolist():
        assert (200 - box[2], box[1], 200 - box[0], box[3]) in sources


def test_copies_reach_the_canvas_of_a_mosaic() -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    image[20:30, 4:14] = (10, 20, 200)
    tile = Tile((64, 64), np.zeros(1, np.int32), np.array([[4, 20, 14, 30]], np.float32), lambda: image)
    settings = STILL.model_copy(update={"copy_paste": 1.0})
    found = 0
    for seed in range(20):
        plain = mosaic([tile] * 4, 64, STILL, np.random.default_rng(seed))
        canvas = augmented(lambda _: tile, 64, settings, np.random.default_rng(seed))
        found += len(canvas.xyxy) - len(plain.xyxy)
        for x1, y1, x2, y2 in canvas.xyxy.round().astype(int):
            inside = canvas.image[y1:y2, x1:x2].reshape(-1, 3)
            assert (np.abs(inside.astype(int) - (10, 20, 200)).max(axis=1) <= 1).mean() > 0.6
    assert found > 0

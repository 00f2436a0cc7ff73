"""Augmentation that only scales and shifts: a crop resized, against interpolation written out."""

from __future__ import annotations

import cv2
import numpy as np

from parkdet.train.data.augment import AugmentSettings, Warp

STILL = AugmentSettings(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)


def test_what_only_scales_and_shifts_is_a_crop_of_whole_pixels_resized() -> None:
    """Pixel by pixel: the crop by indices, its enlargement by linear interpolation written out."""
    settings = STILL.model_copy(update={"scale": 0.5, "translate": 0.3})
    image = np.asarray(
        cv2.resize(np.random.default_rng(3).integers(0, 256, (4, 5, 3), dtype=np.uint8), (80, 60)), np.uint8
    )
    for seed in range(20):
        warp = Warp.draw((60, 80), (40, 50), settings, np.random.default_rng(seed))
        assert warp.crop is not None
        x1, y1, x2, y2 = warp.crop
        np.testing.assert_allclose(warp.boxes(np.array([warp.crop], np.float32))[0], [0, 0, 50, 40], atol=1e-9)
        padded = np.full((y2 - y1, x2 - x1, 3), 114.0)
        for y in range(max(y1, 0), min(y2, 60)):
            for x in range(max(x1, 0), min(x2, 80)):
                padded[y - y1, x - x1] = image[y, x]
        ys, xs = (np.arange(n) + 0.5 for n in (40, 50))
        rows, columns = ys * (y2 - y1) / 40 - 0.5, xs * (x2 - x1) / 50 - 0.5
        rows, columns = np.clip(rows, 0, y2 - y1 - 1), np.clip(columns, 0, x2 - x1 - 1)
        top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
        bottom, right = np.minimum(top + 1, y2 - y1 - 1), np.minimum(left + 1, x2 - x1 - 1)
        fy, fx = (rows - top)[:, None, None], (columns - left)[None, :, None]
        upper = padded[top][:, left] * (1 - fx) + padded[top][:, right] * fx
        lower = padded[bottom][:, left] * (1 - fx) + padded[bottom][:, right] * fx
        expected = upper * (1 - fy) + lower * fy
        np.testing.assert_allclose(warp.apply(image), expected, atol=1.1)
    assert (
        Warp.draw((60, 80), (40, 50), STILL.model_copy(update={"degrees": 1.0}), np.random.default_rng(0)).crop is None
    )
    far = STILL.model_copy(update={"scale": 0.9})
    assert any(Warp.draw((60, 80), (40, 50), far, np.random.default_rng(seed)).crop is None for seed in range(20))

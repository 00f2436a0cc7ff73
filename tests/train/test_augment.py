"""Augmentation against answers found another way: painted boxes, pixels moved one at a time, float colours."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from parkdet.runtime.geometry import Letterbox
from parkdet.train.data.augment import (
    TILES,
    AugmentSettings,
    LabelledCanvas,
    Tile,
    Warp,
    augmented,
    flipped,
    jitter_hsv,
    letterboxed,
    mix,
    mosaic,
    scale_hsv,
    to_long_side,
)

STILL = AugmentSettings(
    hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0
)  # fmt: skip
NO_BOXES = np.zeros((0, 4), np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth random image: interpolation changes it little."""
    small = rng(seed).integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def tile(image: NDArray[np.uint8], xyxy: ArrayLike = NO_BOXES, class_id: int = 0) -> Tile:
    boxes = np.asarray(xyxy, np.float32).reshape(-1, 4)
    return Tile(image.shape[:2], np.full(len(boxes), class_id, np.int32), boxes, lambda: image)


def painted(height: int, width: int, xyxy: tuple[int, int, int, int], value: int = 255) -> NDArray[np.uint8]:
    """Black but for one box of whole pixels."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = xyxy
    image[y1:y2, x1:x2] = value
    return image


def extent(mask: NDArray[np.bool_]) -> list[int]:
    """xyxy of what is true."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_an_image_without_boxes_goes_all_the_way() -> None:
    for settings in (STILL, AugmentSettings(), AugmentSettings(mixup=1, perspective=0.0005, degrees=20)):
        canvas = augmented(lambda _: tile(picture(48, 64)), 64, settings, rng())
        assert canvas.image.shape == (64, 64, 3)
        assert canvas.image.dtype == np.uint8
        assert canvas.xyxy.shape == (0, 4)
        assert (canvas.xyxy.dtype.name, canvas.class_ids.dtype.name) == ("float32", "int32")


@pytest.mark.parametrize("hw", [(48, 64), (64, 40), (64, 64), (33, 64)])
def test_settings_that_change_nothing_give_the_plain_letterbox(hw: tuple[int, int]) -> None:
    original = picture(hw[0] * 3 + 1, hw[1] * 3, 5)
    box = Letterbox.fit(original.shape[:2], 64, 1, canvas=(64, 64))
    boxes = np.array([[30, 21, 90, 60]], np.float32)
    resized = np.asarray(cv2.resize(original, box.resized_hw[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    np.testing.assert_array_equal(to_long_side(original, box.resized_hw), resized)
    bottom = 64 - box.resized_hw[0] - box.top
    right = 64 - box.resized_hw[1] - box.left
    expected = cv2.copyMakeBorder(resized, box.top, bottom, box.left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    scale = np.array(box.resized_hw[::-1] * 2, np.float32) / np.array(original.shape[1::-1] * 2, np.float32)
    canvas = augmented(lambda _: tile(resized, boxes * scale, 3), 64, STILL, rng())
    np.testing.assert_array_equal(canvas.image, expected)
    np.testing.assert_allclose(canvas.xyxy, box.to_canvas(boxes), atol=1e-4)
    assert canvas.class_ids.tolist() == [3]


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = picture(20, 30)
    assert to_long_side(image, (20, 30)) is image


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0.6},
        {"translate": 0.2},
        {"degrees": 40.0},
        {"shear": 20.0},
        {"degrees": 15.0, "shear": 10.0, "scale": 0.3, "translate": 0.1},
        {"perspective": 0.001},
        {"degrees": 15.0, "shear": 5.0, "scale": 0.3, "translate": 0.1, "perspective": 0.0005},
    ],
)
def test_boxes_go_where_the_pixels_go(settings: dict[str, float]) -> None:
    """The box is painted, the image warped; the paint's extent is measured.

    0.75 pixels: half a pixel from thresholding the blurred edge at half its value, the rest where a turned
    corner is thinner than a pixel and falls under the threshold (its tip is cut by less than one pixel).
    """
    box = (70, 90, 150, 131)
    image = painted(240, 200, box)
    for seed in range(30):
        warp = Warp.draw((240, 200), (260, 220), STILL.model_copy(update=settings), rng(seed))
        warped = warp.apply(image)[..., 0]
        seen = extent(warped > 127)  # the border, 114, is none of it
        expected = warp.boxes(np.array([box], np.float32))[0]
        inside = (expected >= 1).all() and expected[2] <= 219 and expected[3] <= 259
        if inside:
            tip = 0.75 if not {"degrees", "shear", "perspective"} & set(settings) else 1.6
            np.testing.assert_allclose(seen, expected, atol=tip)


def test_scaled_boxes_have_no_offset_from_their_pixels() -> None:
    """An image counted from its pixels' centres would be off by half of (1 - scale)."""
    errors, scales = [], []
    for seed in range(200):
        settings = STILL.model_copy(update={"scale": 0.6, "translate": 0.05})
        warp = Warp.draw((240, 240), (240, 240), settings, rng(seed))
        box = (80, 90, 150, 131)
        mapped = warp.boxes(np.array([box], np.float32))[0]
        # Coverage, summed, is the box's length in pixels; its mean is the box's middle.
        grey = np.full((240, 240, 3), 114, np.uint8)
        grey[box[1] : box[3], box[0] : box[2]] = 254
        cover = warp.apply(grey)[..., 0].astype(float) - 114
        line = cover.sum(0) / cover.sum()
        middle = (line * (np.arange(240) + 0.5)).sum()
        errors.append(middle - (mapped[0] + mapped[2]) / 2)
        scales.append(warp.scale)
    slope, offset = np.polyfit(1 - np.array(scales), errors, 1)
    assert abs(slope) < 0.05
    assert abs(offset) < 0.02


def test_the_warp_is_the_composition_of_its_terms() -> None:
    """A point mapped step by step, in the reference's order, by scalars."""
    settings = STILL.model_copy(
        update={"degrees": 30.0, "scale": 0.4, "shear": 12.0, "translate": 0.2, "perspective": 0.0008}
    )
    draws = rng(4).uniform(-1, 1, 8)
    warp = Warp.draw((100, 160), (90, 70), settings, rng(4))
    x, y = 33.0 - 80, 71.0 - 50
    w = 1 + draws[6] * 0.0008 * x + draws[7] * 0.0008 * y
    angle, scale = np.radians(30 * draws[0]), 1 + 0.4 * draws[1]
    x, y = scale * (np.cos(angle) * x + np.sin(angle) * y), scale * (np.cos(angle) * y - np.sin(angle) * x)
    x, y = x + np.tan(np.radians(12 * draws[2])) * y, y + np.tan(np.radians(12 * draws[3])) * x
    x, y = x / w + (0.5 + 0.2 * draws[4]) * 70, y / w + (0.5 + 0.2 * draws[5]) * 90
    np.testing.assert_allclose(warp.boxes(np.array([[33, 71, 33, 71]], np.float32))[0], [x, y, x, y])
    assert warp.scale == scale


def test_every_range_is_used_and_kept() -> None:
    settings = STILL.model_copy(update={"scale": 0.5, "translate": 0.25})
    warps = [Warp.draw((100, 100), (200, 100), settings, rng(seed)) for seed in range(500)]
    scales = np.array([warp.scale for warp in warps])
    centres = np.array([warp.boxes(np.array([[50, 50, 50, 50]], np.float32))[0, :2] for warp in warps])
    assert 0.5 <= scales.min() < 0.52 and 1.48 < scales.max() <= 1.5
    # Shifts are rounded to pixels of the input, half of which is up to 0.75 in the output.
    assert 24.25 <= centres[:, 0].min() < 26 and 74 < centres[:, 0].max() <= 75.75
    assert 49.25 <= centres[:, 1].min() < 52 and 148 < centres[:, 1].max() <= 150.75
    assert abs(scales.mean() - 1) < 0.05


def warp_by(scale: float, output_hw: tuple[int, int] = (100, 100)) -> Warp:
    return Warp(np.diag([scale, scale, 1.0]), scale, output_hw)


@pytest.mark.parametrize(
    ("box", "stays"),
    [
        ((0, 0, 2, 50), False),  # a side of 2 pixels is not longer than 2
        ((0, 0, 2.1, 50), True),
        ((0, 0, 50, 1.9), False),
        ((91, 0, 191, 50), False),  # 9 of 100 pixels are left
        ((89, 0, 189, 50), True),  # 11 are
        ((0, 0, 100, 50), True),
        ((100, 0, 200, 50), False),
        ((-50, -50, -1, -1), False),
    ],
)
def test_which_boxes_stay(box: tuple[float, float, float, float], stays: bool) -> None:
    canvas = warp_by(1).label(painted(9, 9, (0, 0, 1, 1)), np.array([4], np.int32), np.array([box], np.float32))
    assert len(canvas.xyxy) == stays
    assert canvas.class_ids.tolist() == [4] * stays
    if stays:
        np.testing.assert_allclose(canvas.xyxy, np.clip([box], 0, 100), rtol=1e-6)


def test_thin_boxes_go() -> None:
    for long, stays in ((299, True), (301, False)):
        warp = warp_by(1, (1000, 1000))
        canvas = warp.label(painted(9, 9, (0, 0, 1, 1)), np.zeros(1, np.int32), np.array([[0, 0, long, 3]], np.float32))
        assert len(canvas.xyxy) == stays


def test_the_area_left_is_compared_with_the_scaled_area() -> None:
    box = np.array([[80, 0, 120, 40]], np.float32)
    # 50, 27 and 8.3 % of the scaled area are inside; the last would be 12 % of the area before.
    for scale, stays in ((1.0, True), (1.1, True), (1.2, False)):
        assert len(warp_by(scale).label(np.zeros((1, 1, 3), np.uint8), np.zeros(1, np.int32), box).xyxy) == stays
    shrunk = warp_by(0.25).label(np.zeros((1, 1, 3), np.uint8), np.zeros(1, np.int32), box)
    assert len(shrunk.xyxy) == 1  # a sixteenth of the area by scaling alone is no loss


def test_a_box_beyond_the_horizon_goes() -> None:
    matrix = np.array([[1, 0, 0], [0, 1, 0], [-0.02, 0, 1]])
    warp = Warp(matrix, 1.0, (100, 100))
    boxes = np.array([[10, 10, 20, 20], [40, 10, 60, 20], [60, 10, 80, 20]], np.float32)
    canvas = warp.label(np.zeros((1, 1, 3), np.uint8), np.arange(3, dtype=np.int32), boxes)
    assert canvas.class_ids.tolist() == [0]


COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 10))


def coloured_tiles(hws: list[tuple[int, int]]) -> list[Tile]:
    """Four tiles of one colour each, with two darker boxes each."""
    tiles: list[Tile] = []
    for (height, width), colour in zip(hws, COLOURS, strict=True):
        image = np.full((height, width, 3), colour, np.uint8)
        boxes = [(4, 6, 24, 22), (width - 20, height - 18, width - 2, height - 3)]
        for x1, y1, x2, y2 in boxes:
            image[y1:y2, x1:x2] //= 2
        tiles.append(tile(image, boxes, len(tiles)))
    return tiles


@pytest.mark.parametrize("hws", [[(64, 64)] * 4, [(48, 64), (64, 40), (64, 64), (30, 64)]])
def test_a_mosaic_shows_four_images_around_one_point_and_boxes_hold_their_paint(hws: list[tuple[int, int]]) -> None:
    tiles = coloured_tiles(hws)
    found_at = np.zeros((4, 4), int)
    centres = []
    for seed in range(300):
        canvas = mosaic(tiles, 64, STILL, rng(seed))
        generator = rng(seed)
        centre = [int(c) for c in generator.uniform(32, 96, 2)]
        centres.append(centre)
        cx, cy = centre[0] - 32, centre[1] - 32  # the output is the middle of the canvas
        explained = np.zeros((64, 64), bool)
        for which, colour in enumerate(COLOURS):
            mask = (canvas.image == np.array(colour)).all(2) | (canvas.image == np.array(colour) // 2).all(2)
            if not mask.any():
                continue
            explained |= mask
            x1, y1, x2, y2 = extent(mask)
            assert x2 <= cx or x1 >= cx
            assert y2 <= cy or y1 >= cy
            place = (x1 >= cx) + 2 * (y1 >= cy)
            found_at[which, place] += 1
            # The image touches the centre with the corner that belongs there.
            assert (x1 == cx) if x1 >= cx else (x2 == cx)
            assert (y1 == cy) if y1 >= cy else (y2 == cy)
            height, width = hws[which]
            left, top = (cx if x1 >= cx else cx - width), (cy if y1 >= cy else cy - height)
            expected = tiles[which].load()[max(-top, 0) : 64 - top, max(-left, 0) : 64 - left]
            np.testing.assert_array_equal(canvas.image[y1:y2, x1:x2], expected)
        assert (canvas.image[~explained] == 114).all()
        for class_id, box in zip(canvas.class_ids, canvas.xyxy.astype(int), strict=True):
            paint = canvas.image[box[1] : box[3], box[0] : box[2]]
            assert (paint == np.array(COLOURS[class_id]) // 2).all()
    assert (found_at > 30).all()  # every image in every place
    low, high = np.min(centres, axis=0), np.max(centres, axis=0)
    assert (low >= 32).all() and (low < 34).all() and (high > 93).all() and (high < 96).all()


def watched(number: int, loads: list[int]) -> Tile:
    """One of four tiles of several shapes, which notes that it was read."""
    shapes: list[tuple[tuple[int, int], ArrayLike]] = [
        ((48, 64), [[3, 3, 30, 40]]),
        ((64, 40), NO_BOXES),
        ((64, 64), [[10, 2, 60, 9]]),
        ((30, 64), [[0, 0, 64, 30]]),
    ]
    hw, boxes = shapes[number]
    plain = tile(picture(*hw, number), boxes, number)

    def load() -> NDArray[np.uint8]:
        loads.append(number)
        return plain.load()

    return Tile(plain.image_hw, plain.class_ids, plain.xyxy, load)


@pytest.mark.parametrize(
    "settings",
    [
        AugmentSettings(),
        AugmentSettings(scale=0.9, translate=0.3),
        AugmentSettings(degrees=45.0, shear=20.0),
        AugmentSettings(degrees=10.0, perspective=0.001),
    ],
)
def test_a_mosaic_is_the_warp_of_the_whole_canvas(settings: AugmentSettings) -> None:
    """Only the visible part is made, and only visible images are read: that changes no box and no pixel."""
    spared = 0
    for seed in range(60):
        loads: list[int] = []
        tiles = [watched(number, loads) for number in range(4)]
        actual = mosaic(tiles, 64, settings, rng(seed))
        spared += 4 - len(loads)

        generator = rng(seed)
        cx, cy = (int(c) for c in generator.uniform(32, 96, 2))
        order = generator.permutation(4)
        whole = np.full((128, 128, 3), 114, np.uint8)
        boxes, classes = [], []
        for place, number in enumerate(order):
            image = tiles[number].load()
            left = cx - image.shape[1] if place % 2 == 0 else cx
            top = cy - image.shape[0] if place < 2 else cy
            for y in range(max(top, 0), min(top + image.shape[0], 128)):
                x1, x2 = max(left, 0), min(left + image.shape[1], 128)
                whole[y, x1:x2] = image[y - top, x1 - left : x2 - left]
            boxes.append(np.clip(tiles[number].xyxy + np.array([left, top, left, top]), 0, 128))
            classes.append(tiles[number].class_ids)
        warp = Warp.draw((128, 128), (64, 64), settings, generator)
        expected = warp.label(warp.apply(whole), np.concatenate(classes), np.concatenate(boxes).astype(np.float32))
        # Weights are rounded to 1/32 pixel, which may fall to either side once the origin has moved.
        difference = np.abs(actual.image.astype(int) - expected.image)
        assert (difference > 0).mean() < 0.001
        np.testing.assert_allclose(actual.xyxy, expected.xyxy, atol=1e-4)
        np.testing.assert_array_equal(actual.class_ids, expected.class_ids)
    if settings.scale == 0.9:
        assert spared > 10


def test_mixing_blends_the_pixels_and_keeps_all_boxes() -> None:
    first = LabelledCanvas(picture(32, 32, 1), np.array([1], np.int32), np.array([[1, 2, 9, 9]], np.float32))
    second = LabelledCanvas(picture(32, 32, 2), np.array([2], np.int32), np.array([[4, 4, 20, 30]], np.float32))
    mixed = mix(first, second, rng(3))
    weight = rng(3).beta(32, 32)
    expected = first.image * weight + second.image * (1 - weight)
    assert np.abs(mixed.image - expected).max() <= 0.5 + 1e-3
    assert mixed.class_ids.tolist() == [1, 2]
    np.testing.assert_array_equal(mixed.xyxy, [[1, 2, 9, 9], [4, 4, 20, 30]])
    weights = [rng(seed).beta(32, 32) for seed in range(300)]
    assert abs(np.mean(weights) - 0.5) < 0.02


def test_mixup_takes_its_second_mosaic_from_the_other_four_tiles() -> None:
    dark, bright = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)
    asked = []

    def of(number: int) -> Tile:
        asked.append(number)
        return tile(dark if number < 4 else bright, [[8, 8, 56, 56]], number)

    settings = STILL.model_copy(update={"mosaic": 1.0, "mixup": 1.0})
    canvas = augmented(of, 64, settings, rng(1))
    assert asked == list(range(TILES))
    assert set(canvas.image.ravel()) <= set(range(60, 141)) | {114}
    assert canvas.image.min() > 40
    assert {0, 1, 2, 3} & set(canvas.class_ids.tolist()) and {4, 5, 6, 7} & set(canvas.class_ids.tolist())


def hsv_by_hand(bgr: NDArray[np.uint8], gains: tuple[float, float, float]) -> NDArray[np.float64]:
    """One pixel after the other, by colorsys; quantised to 8-bit HSV where OpenCV does so."""
    result = np.empty(bgr.shape)
    for place in np.ndindex(bgr.shape[:2]):
        blue, green, red = (int(value) / 255 for value in bgr[place])
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        hue8 = round(hue * 180) % 180
        hue8 = int(hue8 * gains[0] % 180)
        saturation8 = int(min(round(saturation * 255) * gains[1], 255))
        value8 = int(min(round(value * 255) * gains[2], 255))
        rgb = colorsys.hsv_to_rgb(hue8 / 180, saturation8 / 255, value8 / 255)
        result[place] = np.array(rgb[::-1]) * 255
    return result


@pytest.mark.parametrize("gains", [(1, 1, 1), (1.015, 1.7, 0.6), (0.9, 0.3, 1.4), (1.5, 1, 1), (1, 0, 1)])
def test_colours_are_scaled_as_by_hand(gains: tuple[float, float, float]) -> None:
    image = rng(9).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image[:, :6] = image[:, :6, :1]  # greys
    difference = np.abs(scale_hsv(image, np.array(gains, float)) - hsv_by_hand(image, gains))
    # Both round hue and saturation to 8 bits, OpenCV in fixed point: where a value lies on the line between two
    # steps they may take neighbours. A step of hue is up to 255 / 30 grey levels, and a gain can make two of one.
    assert (difference <= 1).mean() > 0.99
    assert difference.max() < 2 * 255 / 30 + 1


def test_no_strength_no_change_and_gains_in_range() -> None:
    image = picture(32, 32)
    assert jitter_hsv(image, STILL, rng()) is image
    settings = STILL.model_copy(update={"hsv_v": 0.4})
    before = image.max(2).astype(float).mean()
    ratios = np.array([jitter_hsv(image, settings, rng(seed)).max(2).mean() / before for seed in range(200)])
    assert 0.58 < ratios.min() < 0.65
    assert 1.2 < ratios.max() < 1.41


def test_flips_turn_pixels_and_boxes_together() -> None:
    image, box = painted(40, 60, (5, 8, 25, 30)), np.array([[5, 8, 25, 30]], np.float32)
    canvas = LabelledCanvas(image, np.array([3], np.int32), box)
    for up, left in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)):
        settings = STILL.model_copy(update={"flipud": up, "fliplr": left})
        turned = flipped(canvas, settings, rng())
        expected = image[:: -1 if up else 1, :: -1 if left else 1]
        np.testing.assert_array_equal(turned.image, expected)
        np.testing.assert_array_equal(turned.xyxy[0], extent(turned.image[..., 0] > 0))
    np.testing.assert_array_equal(canvas.xyxy, box)  # what was given is as it was
    settings = STILL.model_copy(update={"fliplr": 0.3})
    share = np.mean([flipped(canvas, settings, rng(seed)).xyxy[0, 0] != 5 for seed in range(1000)])
    assert abs(share - 0.3) < 0.05


def test_the_generator_alone_decides() -> None:
    def canvas(seed: int) -> LabelledCanvas:
        return augmented(
            lambda n: tile(picture(48, 64, n), [[5, 5, 30, 30]], n), 64, AugmentSettings(mixup=0.5), rng(seed)
        )

    first, again, other = canvas(1), canvas(1), canvas(2)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.xyxy, again.xyxy)
    assert not np.array_equal(first.image, other.image)


def test_a_tile_is_not_written_to() -> None:
    image = picture(64, 64)
    image.flags.writeable = False
    for settings in (STILL, AugmentSettings(fliplr=1, flipud=1, mixup=1, perspective=0.0005)):
        augmented(lambda _: tile(image, [[5, 5, 30, 30]]), 64, settings, rng())


def test_a_single_image_is_warped_about_the_middle_of_its_canvas() -> None:
    settings = STILL.model_copy(update={"scale": 0.4})
    canvas = letterboxed(tile(painted(32, 64, (28, 12, 36, 20)), [[28, 12, 36, 20]]), (64, 64), settings, rng(2))
    scale = 1 + 0.4 * rng(2).uniform(-1, 1, 8)[1]
    # The crop's side, 64 / scale, is rounded to a whole pixel, which moves it by up to half of one.
    np.testing.assert_allclose(canvas.xyxy[0], 32 + np.array([-4, -4, 4, 4]) * scale, atol=0.75)
    np.testing.assert_allclose(canvas.xyxy[0, 2] - canvas.xyxy[0, 0], 8 * scale, rtol=0.5 / 45)


def test_settings_refuse_what_makes_no_sense() -> None:
    for bad in ({"scale": 1.0}, {"fliplr": 1.5}, {"hsv_h": -0.1}, {"mosaics": 1.0}, {"degrees": "10"}):
        with pytest.raises(ValueError, match="1 validation error"):
            AugmentSettings(**bad)

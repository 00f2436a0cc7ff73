"""Pictures of detections: what is drawn where, and that labels can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.runtime import pictures
from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray, ImageArray
from parkdet.runtime.pictures import class_colour, class_label, draw_detections, line_width

NAMES = ("sedan", "SUV", "van")


def grey(height: int = 240, width: int = 320) -> ImageArray:
    return np.full((height, width, 3), 128, np.uint8)


def one(box: tuple[float, ...], score: float = 0.87, class_id: int = 0) -> Detections:
    return Detections.sorted([box], [score], [class_id])


def changed(before: ImageArray, after: ImageArray) -> NDArray[np.bool_]:
    """Which pixels (h, w) differ."""
    return np.asarray((before != after).any(axis=2))


def without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_place", lambda *_: None)


def test_no_detections_give_an_equal_copy() -> None:
    image = grey()
    picture = draw_detections(image, Detections.empty(), NAMES, truth_xyxy=np.zeros((0, 4), np.float32))
    assert (picture == image).all() and not np.shares_memory(picture, image)


def test_the_image_given_is_not_drawn_on() -> None:
    image = grey()
    assert changed(image, draw_detections(image, one((10, 60, 90, 160)), NAMES)).any()
    assert (image == 128).all()


def test_a_picture_is_bgr_of_eight_bits() -> None:
    with pytest.raises(ValueError, match=r"\(h, w, 3\) uint8"):
        draw_detections(np.zeros((8, 8), np.uint8), Detections.empty(), NAMES)


@pytest.mark.parametrize("class_id", [0, 2])
def test_the_line_lies_on_the_edges_of_the_box_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, class_id: int) -> None:
    without_labels(monkeypatch)
    image = grey(480, 640)
    assert line_width((480, 640)) == 2
    # Edge x = 100 lies between the pixels 99 and 100, which a line of two pixels covers.
    picture = draw_detections(image, one((100, 80, 400, 300), class_id=class_id), NAMES)
    colour = np.array(class_colour(class_id))
    for pixels in (
        picture[120:260, 99:101],
        picture[120:260, 399:401],
        picture[79:81, 140:360],
        picture[299:301, 140:360],
    ):
        # Antialiasing may spread a line over one more pixel: its middle is of the class's colour.
        assert (np.abs(pixels.astype(int) - colour) <= 60).all()
    drawn = changed(image, picture)
    drawn[76:304, 96:104] = drawn[76:304, 396:404] = drawn[76:84, 96:404] = drawn[296:304, 96:404] = False
    assert not drawn.any()


def test_a_box_over_the_edge_is_seen_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels(monkeypatch)
    image = grey()
    drawn = changed(image, draw_detections(image, one((-50, -50, 1000, 1000)), NAMES))
    assert drawn[:, 0].all() and drawn[:, -1].all() and drawn[0].all() and drawn[-1].all()
    assert not drawn[4:-4, 4:-4].any()


def test_only_detections_of_the_least_score_are_drawn() -> None:
    image = grey()
    assert not changed(image, draw_detections(image, one((10, 60, 90, 160), score=0.2499), NAMES)).any()
    assert changed(image, draw_detections(image, one((10, 60, 90, 160), score=0.25), NAMES)).any()
    assert changed(image, draw_detections(image, one((10, 60, 90, 160), score=0.1), NAMES, min_score=0.05)).any()


def test_truth_is_drawn_in_black_and_white_under_the_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels(monkeypatch)
    truth: FloatArray = np.array([[40.5, 40.5, 200.5, 180.5]], np.float32)
    line = draw_detections(grey(), Detections.empty(), NAMES, truth_xyxy=truth)[40, 45:195]
    assert (line >= 230).all(axis=1).sum() > 40 and (line <= 25).all(axis=1).sum() > 40
    both = draw_detections(grey(), one((40.5, 40.5, 200.5, 180.5)), NAMES, truth_xyxy=truth)[40, 45:195]
    assert (np.abs(both.astype(int) - class_colour(0)) <= 60).all()


def test_lines_grow_with_the_image() -> None:
    widths = [line_width((side * 9, side * 16)) for side in (1, 40, 120, 240)]
    assert widths == sorted(widths) and widths[0] == 2 and widths[-1] > widths[1] + 4


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 30, 30),
        (290, 0, 320, 20),
        (0, 220, 20, 240),
        (300, 230, 320, 240),
        (-40, -40, 500, 500),
        (160, 1, 170, 9),
    ],
)
@pytest.mark.parametrize("name", ["van", "a class whose name is far longer than the picture is wide, by any measure"])
def test_the_whole_label_is_inside_the_image(
    monkeypatch: pytest.MonkeyPatch, box: tuple[float, ...], name: str
) -> None:
    placed: list[tuple[str, pictures.Rect]] = []
    texts: list[str] = []
    place, fitting = pictures._place, pictures._LabelStyle.fitting

    def noted_fitting(*arguments: object) -> str:
        texts.append(fitting(*arguments))  # type: ignore[arg-type]
        return texts[-1]

    def noted_place(*arguments: object) -> pictures.Rect | None:
        rect = place(*arguments)  # type: ignore[arg-type]
        assert rect is not None
        placed.append((texts[-1], rect))
        return rect

    monkeypatch.setattr(pictures._LabelStyle, "fitting", noted_fitting)
    monkeypatch.setattr(pictures, "_place", noted_place)
    picture = draw_detections(grey(), one(box), [name])
    [(text, (x, y, width, height))] = placed
    assert text.endswith(" 0.87") and text.startswith(name[:3])
    assert x >= 0 and y >= 0 and x + width <= 320 and y + height <= 240
    chip = picture[y : y + height, x : x + width].astype(int)
    # The chip is filled, its letters are on it and do not touch its border.
    assert (np.abs(chip - class_colour(0)) <= 8).all(axis=2).mean() > 0.5
    ink = np.asarray((np.abs(chip - pictures._ink_on(class_colour(0))) <= 80).all(axis=2))
    assert ink.sum() > 30
    assert not ink[0].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[:, -1].any()


def test_an_image_too_small_for_letters_has_the_box_alone() -> None:
    image = grey(12, 12)
    drawn = changed(image, draw_detections(image, one((2, 2, 10, 10)), NAMES))
    assert drawn.any() and not drawn[5:7, 5:7].any()


def test_labels_of_neighbours_do_not_cover_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[pictures.Rect] = []
    place = pictures._place

    def noted(*arguments: object) -> pictures.Rect | None:
        rect = place(*arguments)  # type: ignore[arg-type]
        assert rect is not None
        placed.append(rect)
        return rect

    monkeypatch.setattr(pictures, "_place", noted)
    boxes = [(100, 100, 220, 200), (101, 101, 221, 201), (102, 99, 219, 202)]
    draw_detections(grey(), Detections.sorted(boxes, [0.9, 0.8, 0.7], [0, 0, 0]), NAMES)
    cover = np.zeros((240, 320), int)
    for x, y, width, height in placed:
        cover[y : y + height, x : x + width] += 1
    assert len(placed) == 3 and cover.max() == 1


@pytest.mark.parametrize(
    ("names", "label"),
    [(["sedan"], "sedan"), (["세단"], "#0"), (["bus\n"], "#0"), ([" "], "#0"), ([], "#0"), (["café"], "#0")],
)
def test_a_name_that_opencv_cannot_write_is_a_number(names: list[str], label: str) -> None:
    assert class_label(0, names) == label


def test_a_class_without_a_name_is_drawn() -> None:
    image = grey()
    assert changed(image, draw_detections(image, one((20, 60, 90, 160), class_id=200), NAMES)).any()


def test_the_colours_of_classes_are_far_apart() -> None:
    colours = [class_colour(class_id) for class_id in range(pictures.COLOUR_COUNT)]
    assert len(set(colours)) == pictures.COLOUR_COUNT
    # CIELAB by OpenCV, not the space in which they were chosen; 20 is a plain difference at a glance.
    import cv2

    lab = cv2.cvtColor(np.array([colours[:20]], np.float32) / 255, cv2.COLOR_BGR2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distances[~np.eye(20, dtype=bool)].min() > 20
    assert class_colour(pictures.COLOUR_COUNT) == class_colour(0)


def test_ink_is_legible_on_every_colour() -> None:
    for class_id in range(pictures.COLOUR_COUNT):
        colour = class_colour(class_id)
        luminances = []
        for blue, green, red in (colour, pictures._ink_on(colour)):
            linear = [
                c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                for c in (red / 255, green / 255, blue / 255)
            ]
            luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
        dark, light = sorted(luminances)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA


def test_a_font_writes_what_strokes_cannot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    box = one((100, 100, 200, 180))
    numbered = changed(grey(), draw_detections(grey(), box, ("été",)))
    named = changed(grey(), draw_detections(grey(), box, ("été",), font=font))
    longer = changed(grey(), draw_detections(grey(), box, ("été à été",), font=font))
    # The chip is as long as the name, and the letters are not those of another name.
    assert np.flatnonzero(longer.any(axis=0)).max() > np.flatnonzero(named.any(axis=0)).max()
    assert (named != numbered).any()
    colour = np.array(class_colour(0))
    picture = draw_detections(grey(), box, ("été",), font=font)
    chip = picture[80:98, 104:130]
    is_ink = (np.abs(chip.astype(int) - colour).max(axis=2) > 60).mean()
    assert 0.05 < is_ink < 0.6
    # A name in ASCII looks the same with a font as without.
    assert (draw_detections(grey(), box, ("van",), font=font) == draw_detections(grey(), box, ("van",))).mean() > 0.98


def test_a_label_without_its_score_is_shorter() -> None:
    box = one((10, 100, 300, 180))
    extents = [
        np.flatnonzero(changed(grey(), draw_detections(grey(), box, NAMES, scores=scores))[80:98].any(axis=0)).max()
        for scores in (True, False)
    ]
    assert extents[1] < extents[0] - 20


def test_letters_can_be_smaller_than_the_lines_ask_for() -> None:
    box = one((10, 100, 300, 180))
    heights = [
        np.flatnonzero(changed(grey(), draw_detections(grey(), box, NAMES, letters_as_at=px))[:99].any(axis=1)).min()
        for px in (1, 2, 4)
    ]
    assert heights[0] > heights[1] > heights[2]

"""Drawn scenes: the same bytes from the same seed, boxes that are exact, and a data set as the contest lays it out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import DataError, UsageError
from parkdet.train.data import scene_dataset
from parkdet.train.data.scene_camera import Camera
from parkdet.train.data.scene_cars import van
from parkdet.train.data.scene_people import adult
from parkdet.train.data.scene_plan import Placed, ScenePlan, overlaps, painting_order, plan_scene, share_inside
from parkdet.train.data.scene_render import LEAST_VISIBLE, render
from parkdet.train.data.scene_shapes import Pose, Shape
from parkdet.train.data.scenes import CLASS_NAMES, draw_scene, write_demo_data

SMALL = (216, 384)


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _camera() -> Camera:
    return Camera.elevated(
        (540, 960),
        position=(1.0, -3.0, 6.5),
        yaw_deg=17,
        pitch_deg=27,
        roll_deg=2,
        focal_ratio=0.7,
    )


def test_an_empty_lot_has_a_picture_and_no_box() -> None:
    scene = draw_scene(_generator(3), SMALL, empty=True)
    assert scene.image.shape == (*SMALL, 3)
    assert scene.xyxy.shape == (0, 4)
    assert scene.xyxy.dtype == np.float32
    assert scene.class_ids.shape == (0,)
    assert scene.image.std() > 5  # not a blank sheet


def test_the_same_seed_draws_the_same_bytes_whatever_was_drawn_before() -> None:
    first = draw_scene(_generator(11), SMALL)
    other = draw_scene(_generator(12), SMALL)
    again = draw_scene(_generator(11), SMALL)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.xyxy.tobytes() == again.xyxy.tobytes()
    assert first.class_ids.tolist() == again.class_ids.tolist()
    assert first.image.tobytes() != other.image.tobytes()


def test_over_many_scenes_every_class_is_frequent_and_every_box_lies_in_its_image() -> None:
    counts = np.zeros(len(CLASS_NAMES), np.int64)
    weather, times, objects = set(), set(), []
    for seed in range(70):
        scene = draw_scene(_generator(seed), SMALL)
        low, high = scene.xyxy[:, :2], scene.xyxy[:, 2:]
        assert (low >= 0).all()
        assert (high <= SMALL[::-1]).all()
        assert (high > low).all()
        assert scene.xyxy.dtype == np.float32
        assert scene.class_ids.dtype == np.int32
        counts += np.bincount(scene.class_ids, minlength=len(counts))
        weather.add(scene.weather)
        times.add(scene.time)
        objects.append(len(scene.class_ids))
    shares = counts / counts.sum()
    assert shares.min() > 0.03, dict(zip(CLASS_NAMES, shares.round(3), strict=True))
    assert shares.max() < 0.16
    assert weather == {"clear", "cloudy", "rain"}
    assert times == {"day", "dusk", "night"}
    assert 8 <= np.median(objects) <= 20
    assert max(objects) <= 20


def _plain(plan: ScenePlan) -> ScenePlan:
    """The plan without weather, noise and lens: a pixel then depends only on what is painted there."""
    plain = replace(
        plan.conditions, time="day", weather="clear", noise=0.0, blur=0.0, jpeg_quality=0, stamp="", shadow=0.0
    )
    return replace(plan, conditions=plain)


def _seen_pixels(plan: ScenePlan, index: int) -> NDArray[np.bool_]:
    """(H, W) pixels that show thing `index` at all, by painting it in two colours and comparing the pictures."""
    pictures = []
    for colour in ((0.0, 255.0, 0.0), (255.0, 0.0, 255.0)):
        thing = plan.placed[index]
        shape = replace(thing.shape, colours=np.tile(colour, (len(thing.shape.colours), 1)))
        placed = (*plan.placed[:index], replace(thing, shape=shape), *plan.placed[index + 1 :])
        pictures.append(render(replace(plan, placed=placed)).image)
    return np.asarray((pictures[0] != pictures[1]).any(axis=2))


@pytest.mark.parametrize("seed", [1, 4])
def test_a_box_is_the_extent_of_the_pixels_that_show_its_object(seed: int) -> None:
    plan = _plain(plan_scene(_generator(seed), SMALL))
    truth = render(plan)
    expected = []
    for index, thing in enumerate(plan.placed):
        if thing.class_id < 0:
            continue
        seen = _seen_pixels(plan, index)
        alone = _seen_pixels(replace(plan, placed=(thing,)), 0)
        visible = seen.sum() / max(alone.sum(), 1) * share_inside(plan.camera, thing)
        boxes = truth.xyxy[truth.class_ids == thing.class_id]
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
        # Boxes are counted on the canvas of twice the size, so they may be half a pixel tighter.
        whole = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
        found = bool((whole == extent).all(1).any())
        if visible > LEAST_VISIBLE + 0.06:  # pixels at edges count whole here and by quarters there
            assert found, (CLASS_NAMES[thing.class_id], extent, boxes)
            expected.append(thing.class_id)
        elif visible < LEAST_VISIBLE - 0.06:
            assert not found, (CLASS_NAMES[thing.class_id], extent, visible)
        elif found:
            expected.append(thing.class_id)
    assert len(expected) >= 6
    assert sorted(expected) == sorted(truth.class_ids.tolist())


def test_an_object_hidden_by_more_than_three_quarters_has_no_box() -> None:
    plan = _plain(plan_scene(_generator(8), (270, 480), empty=True))
    rng, camera = _generator(0), plan.camera
    ahead, right = camera.forward_xy, camera.axes[0, :2] / np.linalg.norm(camera.axes[0, :2])
    across = float(np.arctan2(right[1], right[0]))

    def standing(shape: Shape, class_id: int, distance: float, aside: float) -> Placed:
        x, y = camera.position[:2] + distance * ahead + aside * right
        return Placed(shape, Pose(float(x), float(y), across), class_id)

    person, screen = adult(rng, False), standing(van(rng, False), 2, 10.0, 0.0)
    labelled, hidden = 0, 0
    for aside in np.linspace(0.0, 3.2, 17):
        someone = standing(person, 7, 11.6, float(aside))
        staged = replace(plan, placed=(someone, screen))
        visible = _seen_pixels(staged, 0).sum() / _seen_pixels(replace(plan, placed=(someone,)), 0).sum()
        has_box = 7 in render(staged).class_ids
        if abs(visible - LEAST_VISIBLE) > 0.05:  # pixels at edges count whole here and by quarters there
            assert has_box == (visible > LEAST_VISIBLE), (aside, visible)
            labelled += has_box
            hidden += 0 < visible < LEAST_VISIBLE
    assert labelled > 2
    assert hidden > 2


def test_shadows_and_weather_do_not_change_boxes() -> None:
    plan = plan_scene(_generator(8), SMALL)
    rainy = replace(plan, conditions=replace(plan.conditions, weather="rain", time="night", shadow=0.5))
    np.testing.assert_array_equal(render(rainy).xyxy, render(_plain(plan)).xyxy)


def test_the_camera_projects_as_opencv_does() -> None:
    camera = _camera()
    points = _generator(0).uniform((-8, 4, 0), (8, 25, 4), (50, 3))
    height, width = camera.size_hw
    matrix = np.array([[camera.focal_px, 0, width / 2], [0, camera.focal_px, height / 2], [0, 0, 1]])
    turn, _ = cv2.Rodrigues(camera.axes)
    expected, _ = cv2.projectPoints(points, turn, -camera.axes @ camera.position, matrix, np.zeros(4))
    pixels, depth = camera.project(points)
    np.testing.assert_allclose(pixels, expected[:, 0], atol=1e-6)
    assert (depth > 0).all()
    # An elevated camera turned left sees what is straight ahead of it in the world on its right.
    assert camera.project(np.array([[1.0, 12.0, 0.0]]))[0][0, 0] > width / 2
    assert camera.project(np.array([[1.0, 12.0, 1.0]]))[0][0, 1] < camera.project(np.array([[1.0, 12.0, 0.0]]))[0][0, 1]


def test_the_ground_under_a_pixel_projects_back_to_it_and_the_sky_has_none() -> None:
    camera = _camera()
    pixels = _generator(1).uniform((0, 100), (960, 540), (40, 2))
    ground = camera.ground_at(pixels)
    back, _ = camera.project(np.column_stack([ground, np.zeros(len(ground))]))
    np.testing.assert_allclose(back, pixels, atol=1e-6)
    homogeneous = np.column_stack([ground, np.ones(len(ground))]) @ camera.ground_to_image().T
    np.testing.assert_allclose(homogeneous[:, :2] / homogeneous[:, 2:], pixels, atol=1e-6)
    assert np.isnan(camera.ground_at(np.array([[480.0, -900.0]]))).all()


def test_an_outline_is_cut_where_it_passes_behind_the_camera() -> None:
    camera = _camera()
    behind = np.array([(0.0, -30.0, 0.0), (1.0, -30.0, 0.0), (1.0, -25.0, 0.0)])
    assert camera.outline(behind).shape == (0, 2)
    through = np.array([(0.5, -30.0, 0.0), (1.5, -30.0, 0.0), (1.5, 30.0, 0.0), (0.5, 30.0, 0.0)])
    outline = camera.outline(through)
    assert np.isfinite(outline).all()
    assert outline[:, 1].max() > 540  # it reaches below the image's lower edge, not round to the sky


def _rectangles(seed: int, count: int, longest: float = 3.0) -> NDArray[np.float64]:
    rng = _generator(seed)
    shapes = []
    for _ in range(count):
        half = rng.uniform(0.2, (longest, 1.5))
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
        turn = rng.uniform(0, 2 * np.pi)
        matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        shapes.append(corners @ matrix + rng.uniform(-12, 12, 2))
    return np.array(shapes)


def test_overlap_of_footprints_agrees_with_opencv() -> None:
    shapes = _rectangles(0, 60)
    for one in shapes[:12]:
        expected = [
            cv2.intersectConvexConvex(one.astype(np.float32), other.astype(np.float32))[0] > 0 for other in shapes
        ]
        assert overlaps(one, shapes).tolist() == expected


def _entry(origin: NDArray[np.float64], ray: NDArray[np.float64], rectangle: NDArray[np.float64]) -> float:
    """Distance at which a ray enters a rectangle, infinite when it misses: each edge solved by itself."""
    hits = [np.inf]
    for start, end in pairwise([*rectangle, rectangle[0]]):
        matrix = np.column_stack([ray, start - end])
        if abs(np.linalg.det(matrix)) > 1e-12:
            along, share = np.linalg.solve(matrix, start - origin)
            if along > 0 and 0 <= share <= 1:
                hits.append(float(along))
    return min(hits)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_painted_over_something_nearer(seed: int) -> None:
    assert painting_order(np.zeros((0, 4, 2)), np.zeros(2)) == []
    disjoint: list[NDArray[np.float64]] = []
    for shape in _rectangles(seed + 1, 80, longest=7.0):  # the middle of a long one tells little
        if not disjoint or not overlaps(shape, np.array(disjoint)).any():
            disjoint.append(shape)
    shapes, camera = np.array(disjoint), np.array([0.0, -22.0])
    place = {thing: number for number, thing in enumerate(painting_order(shapes, camera))}
    assert sorted(place) == list(range(len(shapes)))
    for angle in np.linspace(0.2, np.pi - 0.2, 240):
        ray = np.array([np.cos(angle), np.sin(angle)])
        entries = [(_entry(camera, ray, shape), thing) for thing, shape in enumerate(shapes)]
        along = [thing for distance, thing in sorted(entries) if np.isfinite(distance)]
        for nearer, farther in pairwise(along):
            assert place[nearer] > place[farther]


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "데이터"
    write_demo_data(folder, 45, 3, seed=5, size_hw=(120, 208), workers=2)
    return folder


def test_the_written_layout_is_the_contests(written: Path) -> None:
    train = _read(written / "train" / "label" / "Train.json")
    information = _read(written / "Test_Images_Information.json")
    truth = _read(written / "test_ground_truth.json")
    assert [category["name"] for category in train["categories"]] == list(CLASS_NAMES)
    assert [category["id"] for category in train["categories"]] == list(range(1, 15))
    assert information == {"images": truth["images"]}
    assert (len(train["images"]), len(truth["images"])) == (45, 3)
    for listed, images in ((train, "train/images"), (truth, "test/images")):
        names = [image["file_name"] for image in listed["images"]]
        assert sorted(names) == sorted(path.name for path in (written / images).iterdir())
        assert len({image["id"] for image in listed["images"]}) == len(names)
        for image in listed["images"]:
            coded = np.fromfile(written / images / image["file_name"], np.uint8)
            assert coded[1:4].tobytes() == b"PNG"
            pixels = np.asarray(cv2.imdecode(coded, cv2.IMREAD_UNCHANGED))
            assert pixels.shape == (image["height"], image["width"], 3)
        assert len({box["id"] for box in listed["annotations"]}) == len(listed["annotations"])
        for box in listed["annotations"]:
            x, y, w, h = box["bbox"]
            assert min(x, y) >= 0
            assert min(w, h) > 0
            assert x + w <= 208
            assert y + h <= 120
            assert 1 <= box["category_id"] <= 14
    sample = _read(written / "sample_submission.json")
    assert {tuple(row) for row in sample} == {("image_id", "category_id", "bbox", "score", "segmentation")}
    assert {row["image_id"] for row in sample} <= {image["id"] for image in truth["images"]}


def test_the_contest_reader_finds_every_image_and_no_fault(written: Path) -> None:
    data = ContestData(written)
    labels = data.train_labels()
    assert all(record.path is not None for record in (*labels.images.records, *data.test_images()))
    assert labels.images.unlisted == ()
    assert labels.class_names == CLASS_NAMES


def test_some_training_pictures_are_background(written: Path) -> None:
    train = _read(written / "train" / "label" / "Train.json")
    with_boxes = {box["image_id"] for box in train["annotations"]}
    without = [image["id"] for image in train["images"] if image["id"] not in with_boxes]
    assert without == [scene_dataset.EMPTY_EVERY]


def test_training_names_are_korean_in_nfc_and_test_names_are_uuids(written: Path) -> None:
    pattern = re.compile(r"2020\d{4}_\w+_-_-_(맑음|흐림|비)_(주간|일몰|야간)_실외_(left|right|front)_\d{6}_\d{7}\.png")
    for path in (written / "train" / "images").iterdir():
        assert pattern.fullmatch(path.name), path.name
        assert unicodedata.is_normalized("NFC", path.name)
        assert not unicodedata.is_normalized("NFD", path.name)  # there is Hangul to compose
    for path in (written / "test" / "images").iterdir():
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\.png", path.name)


def test_the_number_of_processes_does_not_change_a_byte_and_the_seed_does(written: Path, tmp_path: Path) -> None:
    whole = _digests(written)
    empty_already = tmp_path / "empty"
    empty_already.mkdir()
    write_demo_data(empty_already, 45, 3, seed=5, size_hw=(120, 208), workers=1)
    assert _digests(empty_already) == whole
    progress: list[tuple[int, int]] = []
    other = tmp_path / "other"
    write_demo_data(
        other, 1, 2, seed=6, size_hw=(120, 208), workers=1, on_drawn=lambda *counts: progress.append(counts)
    )
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert not set(_digests(other).values()) & {digest for name, digest in whole.items() if name.endswith(".png")}


def test_a_folder_with_content_a_file_and_impossible_numbers_are_refused(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match=r"taken: exists and is not an empty folder"):
        write_demo_data(taken, 1, 1, size_hw=SMALL, workers=1)
    with pytest.raises(UsageError, match=r"mine\.txt: exists"):
        write_demo_data(taken / "mine.txt", 1, 1, size_hw=SMALL, workers=1)
    with pytest.raises(DataError, match=r"mine\.txt"):
        write_demo_data(taken / "mine.txt" / "below", 1, 1, size_hw=SMALL, workers=1)
    for train, test, size, workers in ((0, 1, SMALL, 1), (1, 0, SMALL, 1), (1, 1, (540, 20), 1), (1, 1, SMALL, 0)):
        with pytest.raises(UsageError):
            write_demo_data(tmp_path / "none", train, test, size_hw=size, workers=workers)
    assert (taken / "mine.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*_args: object, **_kwargs: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(scene_dataset, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_demo_data(tmp_path / "data", 2, 1, size_hw=SMALL, workers=1)
    assert calls == [1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group")
def test_ctrl_c_while_the_processes_start_prints_the_parents_traceback_only(tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from parkdet.train.data.scenes import write_demo_data\n"
        "if __name__ == '__main__':\n"
        "    write_demo_data(Path(sys.argv[1]), 5000, 1, workers=2)\n"
    )
    for wait in (0.02, 0.1, 0.2):
        target = tmp_path / f"out{wait}" / "data"
        process = subprocess.Popen(
            [sys.executable, str(script), str(target)], start_new_session=True, stderr=subprocess.PIPE
        )
        try:
            while not list(tmp_path.glob(f"out{wait}/.data.*/test/images")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            time.sleep(wait)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert errors.count(b"Traceback") <= 1 and b"spawn_main" not in errors, errors.decode()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group")
def test_ctrl_c_with_several_processes_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from parkdet.train.data.scenes import write_demo_data\n"
        "if __name__ == '__main__':\n"
        "    write_demo_data(Path(sys.argv[1]), 5000, 1, workers=2)\n"
    )
    target = tmp_path / "out" / "data"
    process = subprocess.Popen(
        [sys.executable, str(script), str(target)], start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        waited_until = time.monotonic() + 120
        while not list(tmp_path.glob("out/.data.*/train/images/*.png")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < waited_until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert b"KeyboardInterrupt" in errors
    assert list((tmp_path / "out").iterdir()) == []

"""From the data set's annotations to samples."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import DataError
from parkdet.train.data.samples import Sample, samples_from


def write_data(
    root: Path, images: list[tuple[int, str, tuple[int, int]]], annotations: list[dict[str, object]]
) -> ContestData:
    (root / "train" / "images").mkdir(parents=True)
    (root / "train" / "label").mkdir()
    for _, name, (height, width) in images:
        encoded = cv2.imencode(Path(name).suffix, np.full((height, width, 3), 90, np.uint8))[1]
        (root / "train" / "images" / name).write_bytes(encoded.tobytes())
    document = {
        "images": [{"id": image_id, "file_name": name} for image_id, name, _ in images],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }
    (root / "train" / "label" / "Train.json").write_text(json.dumps(document), encoding="utf-8")
    return ContestData(root)


def box(image_id: int, category_id: int, *xywh: float) -> dict[str, object]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(xywh)}


def test_no_ids_and_no_usable_image_are_told(tmp_path: Path) -> None:
    labels = write_data(tmp_path, [(1, "a.png", (20, 30))], []).train_labels()
    with pytest.raises(DataError, match="none of the 0 images can be used"):
        samples_from(labels, [])
    with pytest.raises(DataError, match="no image with id 5"):
        samples_from(labels, [5])
    (tmp_path / "train" / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 1 images can be used"):
        samples_from(labels, [1])


def test_boxes_classes_and_backgrounds(tmp_path: Path) -> None:
    labels = write_data(
        tmp_path,
        [(10, "가.b c.png", (40, 60)), (11, "empty.png", (20, 30)), (12, "other.png", (20, 30))],
        [
            box(10, 7, 5, 6, 10, 20),
            box(10, 3, 50, 30, 20, 20),  # reaches over the edge
            box(10, 3, 1, 1, 0, 5),  # no size
            box(12, 3, 1, 1, 2, 2),
        ],
    ).train_labels()
    first, second = samples_from(labels, {11, 10})
    assert (first.image_id, first.image_hw, first.path.name) == (10, (40, 60), "가.b c.png")
    np.testing.assert_array_equal(first.class_ids, [1, 0])  # ascending category ids: 3 is class 0
    np.testing.assert_array_equal(first.xyxy, [[5, 6, 15, 26], [50, 30, 60, 40]])
    assert first.xyxy.dtype == np.float32
    assert first.class_ids.dtype == np.int32
    assert (second.image_id, second.xyxy.shape, second.class_ids.shape) == (11, (0, 4), (0,))


def test_an_image_that_is_missing_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_data(tmp_path, [(1, "a.png", (20, 30)), (2, "b.png", (20, 30))], [])
    (tmp_path / "train" / "images" / "a.png").unlink()
    samples = samples_from(data.train_labels(), [1, 2])
    assert [sample.image_id for sample in samples] == [2]
    assert "1 of 2 images are left out" in caplog.text
    assert "a.png has no file" in caplog.text


def test_images_left_out_are_named_up_to_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_data(tmp_path, [(number, f"{number}.png", (20, 30)) for number in range(1, 9)], [])
    for number in range(1, 8):
        path = tmp_path / "train" / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:-30])
    assert len(samples_from(data.train_labels(), range(1, 9))) == 1
    assert "7 of 8 images are left out" in caplog.text
    for number in range(1, 6):
        assert f"\n  {number}.png is cut off" in caplog.text
    assert "6.png" not in caplog.text
    assert "and 2 more" in caplog.text


def test_of_two_entries_with_one_id_the_first_counts(tmp_path: Path) -> None:
    data = write_data(tmp_path, [(1, "a.png", (20, 30)), (1, "b.png", (20, 30))], [box(1, 3, 1, 1, 5, 5)])
    (sample,) = samples_from(data.train_labels(), [1])
    assert (sample.path.name, len(sample.xyxy)) == ("a.png", 1)
    # The boxes are the first one's: the second is no background.
    sample.path.unlink()
    with pytest.raises(DataError, match="can be used"):
        samples_from(data.train_labels(), [1])


def test_columns_of_other_shapes_or_types_are_refused() -> None:
    sample = partial(Sample, 1, Path("a.png"), (4, 4))
    sample(class_ids=np.zeros(0, np.int32), xyxy=np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="class_ids must be"):
        sample(class_ids=np.zeros(1, np.int64), xyxy=np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="xyxy must be"):
        sample(class_ids=np.zeros(1, np.int32), xyxy=np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="cannot train"):
        Sample(1, Path("a.png"), (0, 4), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))

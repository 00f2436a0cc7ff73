"""Which images a run is over, where both parts of a data set have the same ids and names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from parkdet.cli.main import main
from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import UsageError
from parkdet.runtime.shards import ImageResult
from parkdet.runtime.store import IMAGES_FILE, RunStore, image_list_digest
from parkdet.submission.compose import Composition, compose
from parkdet.submission.lines import SubmissionFormat
from parkdet.submission.merge import MergeSettings
from parkdet.submission.runs import PredictionRun
from parkdet.submission.truth import part_of

TRAIN, TEST = 6, 4


@pytest.fixture
def data(tmp_path: Path) -> ContestData:
    """Training images 1 to 6, test images 1 to 4, all named after their ids."""
    root = tmp_path / "data"
    images = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in range(1, TRAIN + 1)]
    box = {"id": 1, "image_id": 2, "category_id": 1, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}
    document = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "car"}]}
    for folder in ("train/label", "train/images", "test/images"):
        (root / folder).mkdir(parents=True)
    (root / "train" / "label" / "Train.json").write_text(json.dumps(document))
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": images[:TEST]}))
    return ContestData(root)


def _run(folder: Path, listed: int, ids: Sequence[int], recorded: Sequence[int] | None = None) -> PredictionRun:
    """A run that has results for these ids; `listed` images were asked for, in the list that it recorded."""
    pairs = [(n, f"{n}.png") for n in (ids if recorded is None else recorded)]
    with RunStore(folder, {"model": "a", "images": listed, "image_list": image_list_digest(pairs)}) as store:
        boxes = np.array([[1, 1, 20, 20]], np.float32)
        score, category = np.array([0.5], np.float32), np.array([1], np.int32)
        store.write(
            [ImageResult(image_id=n, file_bytes=1, xywh=boxes, scores=score, category_ids=category) for n in ids], []
        )
    return PredictionRun.open(folder)


def test_the_recorded_list_tells_the_parts_apart(tmp_path: Path, data: ContestData) -> None:
    every, test = range(1, TRAIN + 1), range(1, TEST + 1)
    assert part_of(_run(tmp_path / "test", TEST, test), data) == "test"
    assert part_of(_run(tmp_path / "begun", TEST, (1, 2), recorded=test), data) == "test"
    assert part_of(_run(tmp_path / "train", TRAIN, every), data) == "train"
    assert part_of(_run(tmp_path / "train-begun", TRAIN, (1, 2), recorded=every), data) == "train"
    assert part_of(_run(tmp_path / "held-out", 2, (2, 4)), data) == "train"
    # Lists of before the JSON changed: ids decide, and how many there were.
    assert part_of(_run(tmp_path / "other", 3, (2, 6), recorded=(2, 6, 8)), data) == "train"
    assert part_of(_run(tmp_path / "other-test", TEST, (2, 3), recorded=(9,)), data) == "test"
    assert part_of(_run(tmp_path / "foreign", 2, (2, 9)), data) is None
    folder = _run(tmp_path / "folder", TEST, test)
    (folder.folder / IMAGES_FILE).write_text("{}")
    assert part_of(folder, data) is None


def test_a_submission_is_of_the_test_images(
    tmp_path: Path, data: ContestData, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path / "train", TRAIN, range(1, TRAIN + 1))
    _run(tmp_path / "folder", TEST, range(1, TEST + 1))
    (tmp_path / "folder" / IMAGES_FILE).write_text("{}")
    _run(tmp_path / "test", TEST, range(1, TEST + 1))
    for name, code in (("train", 2), ("folder", 2), ("test", 0)):
        assert main(["submit", "--predictions", str(tmp_path / name), "--data", str(data.root)]) == code
        assert (tmp_path / name / "submission.json").exists() == (code == 0)
        assert ("not over the test images" in capsys.readouterr().err) == (code == 2)


def test_thresholds_are_not_tuned_on_images_of_a_folder(tmp_path: Path, data: ContestData) -> None:
    run = _run(tmp_path / "test", TEST, range(1, TEST + 1))
    folder = _run(tmp_path / "folder", 2, (1, 2), recorded=(7, 8))
    (folder.folder / IMAGES_FILE).write_text("{}")
    asked = Composition(
        runs=[run], tune_runs=[folder], merge=MergeSettings(), weights={"map50": 1.0}, form=SubmissionFormat(),
        limit_bytes=10_000, image_count=TEST,
    )  # fmt: skip
    with pytest.raises(UsageError, match="is over a folder"):
        compose(asked, data, lambda _: None)

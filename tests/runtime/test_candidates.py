"""`infer --split val --keep-candidates`: the images held out, and NMS repeated without the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.runtime.candidates import CANDIDATES_FOLDER, read_candidates
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.geometry import ImageArray, xywh_to_xyxy
from parkdet.runtime.split import split_ids
from parkdet.runtime.store import covered_images, read_predictions

RunCli = Callable[..., Any]


@pytest.fixture
def data(tmp_path: Path, picture: Callable[..., ImageArray]) -> Path:
    """Twenty-four training images of several shapes, no test images."""
    root = tmp_path / "data"
    (root / "train/images").mkdir(parents=True)
    (root / "train/label").mkdir()
    entries = []
    for index in range(24):
        size = (60, 90) if index % 3 else (90, 50)
        cv2.imwrite(str(root / f"train/images/{index}.png"), picture(*size, index))
        entries.append({"id": 300 - index, "file_name": f"{index}.png"})
    labels = {"images": entries, "annotations": [], "categories": [{"id": i, "name": f"c{i}"} for i in (3, 7, 8)]}
    (root / "train/label/Train.json").write_text(json.dumps(labels))
    return root


@pytest.fixture
def infer(run_cli: RunCli, tiny_onnx: Path, data: Path, tmp_path: Path) -> RunCli:
    def run(*arguments: str) -> Any:
        common = ("infer", "--weights", tiny_onnx, "--data", data, "--project", tmp_path / "runs")
        return run_cli(*common, "--split", "val", "--keep-candidates", *arguments)

    return run


def test_a_run_without_candidates_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_candidates(tmp_path / "none")
    with pytest.raises(UsageError, match="--keep-candidates"):
        read_candidates(tmp_path)


def test_the_images_held_out_are_run(infer: RunCli, tmp_path: Path) -> None:
    code, out, err = infer()
    assert code == 0, err
    assert "3 of 3 with a result" in out
    assert covered_images(tmp_path / "runs/exp") == set(split_ids([300 - i for i in range(24)]).val_ids)


def test_the_split_is_that_of_the_model(
    run_cli: RunCli, random_tiny_model: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    weights = random_tiny_model(split_seed=7, split_count=5).save(tmp_path / "other.onnx")
    code, _, err = run_cli("infer", "--weights", weights, "--data", data, "--split", "val", "--project", tmp_path)
    assert code == 0, err
    assert covered_images(tmp_path / "exp") == set(split_ids([300 - i for i in range(24)], 7, 5).val_ids)


def test_a_split_of_a_folder_of_images_is_refused(run_cli: RunCli, tiny_onnx: Path, data: Path) -> None:
    code, _, err = run_cli("infer", "--weights", tiny_onnx, "--source", data / "train/images", "--split", "val")
    assert code == 2
    assert "--data" in err


@pytest.mark.parametrize("changed", [{}, {"iou": 0.3}, {"max_det": 3}, {"agnostic": True}, {"conf": 0.2, "iou": 0.5}])
def test_nms_repeated_is_the_run_with_those_settings(
    infer: RunCli, tmp_path: Path, changed: dict[str, float | bool]
) -> None:
    assert infer("--iou-thres", "0.6", "--max-det", "20", "--name", "kept")[0] == 0
    now = {"iou": 0.6, "max_det": 20, "conf": 0.01, **changed}
    flags = ["--iou-thres", str(now["iou"]), "--max-det", str(now["max_det"]), "--conf-thres", str(now["conf"])]
    assert infer(*flags, *(["--agnostic-nms"] if "agnostic" in changed else []), "--name", "asked")[0] == 0
    truth = read_predictions(tmp_path / "runs/asked")
    rows = 0
    for image in read_candidates(tmp_path / "runs/kept"):
        xyxy, scores, category_ids = image.detections(**changed)  # type: ignore[arg-type]
        of_image = truth.filter(truth["image_id"] == image.image_id)
        rows += len(of_image)
        np.testing.assert_array_equal(scores, of_image["score"].to_numpy())
        np.testing.assert_array_equal(category_ids, of_image["category_id"].to_numpy())
        stored = xywh_to_xyxy(of_image.select("x", "y", "w", "h").to_numpy())
        np.testing.assert_allclose(xyxy, stored, rtol=1e-6, atol=1e-5)  # x + (x2 - x) rounds once
    assert rows == len(truth) > 0


def test_a_lower_confidence_than_the_runs_is_refused(infer: RunCli, tmp_path: Path) -> None:
    infer("--conf-thres", "0.3")
    with pytest.raises(ValueError, match="below"):
        next(read_candidates(tmp_path / "runs/exp")).detections(conf=0.1)


def test_candidates_lost_or_cut_off_are_made_again(infer: RunCli, tmp_path: Path) -> None:
    infer()
    (path,) = (tmp_path / "runs/exp" / CANDIDATES_FOLDER).glob("*.parquet")
    whole, images = path.read_bytes(), [i.image_id for i in read_candidates(tmp_path / "runs/exp")]
    for damaged in (whole[: len(whole) // 2], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        if damaged is not None:
            with pytest.raises(ArtifactError, match="damaged or cut off"):
                list(read_candidates(tmp_path / "runs/exp"))
        code, out, _ = infer()
        assert code == 0
        assert "3 of 3 with a result" in out
        assert [i.image_id for i in read_candidates(tmp_path / "runs/exp")] == images
        assert path.read_bytes() == whole
    (path.parent / "part-00009.parquet").write_bytes(whole)  # of a kill between the two files
    infer()
    assert list(path.parent.iterdir()) == [path]


def test_a_run_that_kept_none_is_another_run(
    run_cli: RunCli, infer: RunCli, tiny_onnx: Path, data: Path, tmp_path: Path
) -> None:
    infer()
    code, _, err = run_cli(
        "infer", "--weights", tiny_onnx, "--data", data, "--split", "val", "--project", tmp_path / "runs"
    )
    assert code == 0
    assert "keep candidates True there, False here" in err
    assert not (tmp_path / "runs/exp2" / CANDIDATES_FOLDER).exists()

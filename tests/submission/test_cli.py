from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.runtime.errors import UsageError
from parkdet.runtime.shards import FailedImage, ImageResult
from parkdet.runtime.store import RunStore
from parkdet.submission.size import parse_size

RunCli = Callable[..., Any]

KEYS = ("image_id", "category_id", "bbox", "score", "segmentation")
NAMES = {101: "이미지 하나.png", 102: "b.c.png", 103: "c.png"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of three test images, 640 x 480 by the JSON file, and two categories."""
    root = tmp_path / "data"
    (root / "train" / "label").mkdir(parents=True)
    (root / "train" / "images").mkdir()
    (root / "test" / "images").mkdir(parents=True)
    train = {
        "images": [{"id": 1, "file_name": "t.png", "width": 640, "height": 480}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
        "categories": [{"id": 1, "name": "세단"}, {"id": 2, "name": "SUV"}],
    }
    (root / "train" / "label" / "Train.json").write_text(json.dumps(train))
    images = [{"id": key, "file_name": name, "width": 640, "height": 480} for key, name in NAMES.items()]
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": images}))
    set_sample(root, KEYS)
    return root


def set_sample(data: Path, keys: tuple[str, ...]) -> None:
    (data / "sample_submission.json").write_text(json.dumps([dict.fromkeys(keys, 0)]))


def write_run(
    folder: Path,
    images: tuple[int, ...] = tuple(NAMES),
    failed: tuple[int, ...] = tuple(NAMES),
    **changes: NDArray[Any],
) -> Path:
    """A run with 40 detections in each of `images`; others of `failed` were unreadable; `changes` replaces columns."""
    rng = np.random.default_rng(0)
    results = []
    for image_id in images:
        columns = {
            "xywh": (rng.random((40, 4)) * 200 + 1).astype(np.float32),
            "scores": np.sort(rng.random(40).astype(np.float32))[::-1].copy(),
            "category_ids": rng.integers(1, 3, 40).astype(np.int32),
        }
        results.append(ImageResult(image_id=image_id, file_bytes=1000, **(columns | changes)))
    with RunStore(folder, {"model": "m"}) as store:
        unread = [
            FailedImage(image_id=key, file_name=name, reason="truncated")
            for key, name in NAMES.items()
            if key in failed and key not in images
        ]
        store.write(results, unread)
    return folder


def test_a_run_becomes_a_checked_file_under_the_limit(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path / "run")
    code, out, err = run_cli("submit", "--predictions", run, "--data", data, "--limit", "5kB")
    assert (code, err) == (0, "")
    written = run / "submission.json"
    assert 4900 < written.stat().st_size < 5000
    entries = json.loads(written.read_text())
    assert [list(entry) for entry in entries] == [list(KEYS)] * len(entries)
    lines = out.splitlines()
    assert lines[-1] == str(written)
    assert re.search(r"detections read +120\b", out)
    assert re.search(rf"kept +{len(entries)}\b", out)
    assert re.search(rf"bytes +{written.stat().st_size:,} of a limit of 5,000", out)
    threshold = float(re.search(r"threshold +([0-9.]+)", out)[1])  # type: ignore[index]
    assert min(entry["score"] for entry in entries) >= round(threshold, 4)
    sedans = sum(entry["category_id"] == 1 for entry in entries)
    assert re.search(rf"^ +1 +\d+ +{sedans} +\d+ +[\d,]+ +[\d.]+  세단$", out, re.MULTILINE)

    code, out, err = run_cli("submit", "--check", written, "--data", data, "--limit", "5000")
    assert (code, err) == (0, "")
    assert f"{len(entries)} entries" in out
    assert "nothing to refuse" in out


def test_everything_fits_and_nothing_is_cut(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    target = tmp_path / "out.json"
    run = write_run(tmp_path / "run")
    code, out, _ = run_cli("submit", "--predictions", run, "--data", data, "--output", target)
    assert code == 0
    assert "nothing was cut" in out
    assert len(json.loads(target.read_text())) == 120
    assert not (run / "submission.json").exists()


def test_a_run_without_detections_is_an_empty_list(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    nothing: dict[str, Any] = {
        "xywh": np.zeros((0, 4), np.float32),
        "scores": np.zeros(0, np.float32),
        "category_ids": np.zeros(0, np.int32),
    }
    run = write_run(tmp_path / "run", **nothing)
    code, _, err = run_cli("submit", "--predictions", run, "--data", data)
    assert code == 0
    assert "warning:" in err and "holds no detection: the run has none" in err
    assert (run / "submission.json").read_bytes() == b"[]"


def test_a_limit_that_cuts_everything_is_told(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path / "run")
    code, _, err = run_cli("submit", "--predictions", run, "--data", data, "--limit", "10")
    assert code == 0
    assert "holds no detection: the limit is too small for one" in err
    assert "holds no detection" not in run_cli("submit", "--predictions", run, "--data", data).err


def test_keys_and_their_order_are_the_samples(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    set_sample(data, ("score", "bbox", "category_id", "image_id"))
    run = write_run(tmp_path / "run")
    options = ("--bbox-decimals", "0", "--score-decimals", "2")
    assert run_cli("submit", "--predictions", run, "--data", data, *options).code == 0
    text = (run / "submission.json").read_text()
    assert re.match(r'\[\{"score":[\d.]{1,4},"bbox":\[\d+,\d+,\d+,\d+\],"category_id":\d,"image_id":10\d\}', text)
    code, out, _ = run_cli("submit", "--check", run / "submission.json", "--data", data)
    assert code == 0, out


def test_a_sample_with_another_key_is_refused_by_name(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    set_sample(data, (*KEYS, "track"))
    run = write_run(tmp_path / "run")
    code, _, err = run_cli("submit", "--predictions", run, "--data", data)
    assert code == 3
    assert "'track'" in err
    assert not (run / "submission.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_ids": np.full(40, 3, np.int32)}, "category unknown: 120"),
        ({"xywh": np.full((40, 4), [600, 1, 41, 5], np.float32)}, "box out of its image: 120"),
        ({"scores": np.full(40, 1.5, np.float32)}, "within 0 to 1"),
        ({"xywh": np.full((40, 4), np.nan, np.float32)}, "120 detections have a x that is not finite"),
    ],
)
def test_predictions_that_a_judge_would_refuse_leave_the_old_file(
    run_cli: RunCli, tmp_path: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run", **changes)
    (run / "submission.json").write_text("old")
    code, out, err = run_cli("submit", "--predictions", run, "--data", data)
    assert (code, out) == (3, "")
    assert message in err
    assert (run / "submission.json").read_text() == "old"
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def test_a_run_that_is_not_finished_says_how_much_is_missing(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path / "run", images=(101,), failed=())
    code, _, err = run_cli("submit", "--predictions", run, "--data", data)
    assert code == 1
    assert "2 of 3 test images are not done yet, e.g. b.c.png" in err
    assert not (run / "submission.json").exists()


def test_images_that_could_not_be_read_are_named_and_the_rest_is_written(
    run_cli: RunCli, tmp_path: Path, data: Path
) -> None:
    run = write_run(tmp_path / "run", images=(101,))
    code, _, err = run_cli("submit", "--predictions", run, "--data", data)
    assert code == 0
    assert "2 of 3 test images could not be read and have no entries, e.g. b.c.png (truncated)" in err
    assert {entry["image_id"] for entry in json.loads((run / "submission.json").read_text())} == {101}


def test_a_limit_below_an_empty_list_is_refused(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path / "run")
    code, _, err = run_cli("submit", "--predictions", run, "--data", data, "--limit", "2")
    assert code == 3
    assert "too small" in err


def test_a_bad_file_is_reported_kind_by_kind(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    good = {"image_id": 101, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "segmentation": []}
    bad = [{**good, "score": 2}, {**good, "image_id": 7}, {**good, "bbox": [0, 0, 0, 3]}]
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps([good, *bad]))
    code, out, err = run_cli("submit", "--check", path, "--data", data, "--limit", "100")
    assert code == 3
    for kind in ("image not in the test set: 1 ([1]", "score out of 0", "box of no area", "not smaller than"):
        assert kind.replace("[1]", "[2]") in out
    assert "4 kinds of fault" in err
    path.write_text("[1]")
    assert "(1 kind of fault)" in run_cli("submit", "--check", path, "--data", data).err


@pytest.mark.parametrize(
    ("again", "message"),
    [
        ({"id": 101}, "image named twice in the list of test images: 1 (id 101, 2 times)"),
        ({"file_name": "c.png"}, "image named twice in the list of test images: 1 (c.png, 2 times)"),
        ({"id": 102, "file_name": "b.c.png"}, "2 (id 102, 2 times; b.c.png, 2 times)"),
    ],
)
def test_images_named_twice_are_refused(
    run_cli: RunCli, tmp_path: Path, data: Path, again: dict[str, Any], message: str
) -> None:
    listed = json.loads((data / "Test_Images_Information.json").read_text())
    listed["images"].append({"id": 104, "file_name": "d.png", "width": 640, "height": 480} | again)
    (data / "Test_Images_Information.json").write_text(json.dumps(listed))
    (tmp_path / "theirs.json").write_text("[]")
    code, out, _ = run_cli("submit", "--check", tmp_path / "theirs.json", "--data", data)
    assert code == 3
    assert message in out
    run = write_run(tmp_path / "run", images=(101, 102, 103, 104))
    code, _, err = run_cli("submit", "--predictions", run, "--data", data)
    assert code == 3
    assert message in err
    assert not (run / "submission.json").exists()


def test_missing_places_are_usage_errors(run_cli: RunCli, tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (("--data", data), "either --predictions"),
        (("--predictions", run, "--check", run, "--data", data), "either --predictions"),
        (("--predictions", run), "--data"),
        (("--predictions", tmp_path / "none", "--data", data), "no such folder"),
        (("--predictions", tmp_path / "empty", "--data", data), "holds no predictions"),
        (("--predictions", run, "--data", tmp_path / "none"), "no such folder"),
        (("--predictions", run, "--data", data, "--output", tmp_path / "none" / "s.json"), "no such folder"),
        (("--predictions", run, "--data", data, "--limit", "20M"), "ambiguous"),
        (("--check", tmp_path / "none.json", "--data", data), "no such file"),
        (("--check", run / "run.json", "--data", data, "--output", "x"), "writes nothing"),
    ]:
        code, _, err = run_cli("submit", *arguments)
        assert code == 2, arguments
        assert message in err


def test_sizes_unknown_to_the_json_are_read_from_the_images(
    run_cli: RunCli, tmp_path: Path, data: Path, shared: Path
) -> None:
    source = next((shared / "data" / "blood-cells" / "test" / "images").iterdir())
    images = []
    for image_id in NAMES:
        (data / "test" / "images" / f"{image_id}.jpg").write_bytes(source.read_bytes())
        images.append({"id": image_id, "file_name": f"{image_id}.jpg"})
    (data / "Test_Images_Information.json").write_text(json.dumps({"images": images}))
    box = {"image_id": 101, "category_id": 1, "bbox": [600, 2, 41, 4], "score": 0.5, "segmentation": []}
    (tmp_path / "s.json").write_text(json.dumps([box]))
    code, out, _ = run_cli("submit", "--check", tmp_path / "s.json", "--data", data)
    assert code == 3
    assert "in 640 x 480" in out


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20MB", 20_000_000),
        ("20 MB", 20_000_000),
        ("20mb", 20_000_000),
        (" 20MiB ", 20_971_520),
        ("1.5MB", 1_500_000),
        ("1.5KiB", 1536),
        ("20000000", 20_000_000),
        ("100 B", 100),
        ("1GB", 10**9),
        ("0.1kB", 100),
        ("0", 0),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("20M", "ambiguous"),
        ("20k", "ambiguous"),
        ("5G", "ambiguous"),
        ("20Mi", "ambiguous"),
        ("", "not a size"),
        ("MB", "not a size"),
        ("-1MB", "not a size"),
        ("1e6", "not a size"),
        ("1,000", "not a size"),
        ("20 TB", "not a size"),
        ("\uff12\uff10MB", "not a size"),
        ("1.2345kB", "whole number"),
        ("nan", "not a size"),
    ],
)
def test_other_sizes_are_refused_with_the_forms(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_size(text)

"""`parkdet prepare`: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.runtime.errors import UsageError
from parkdet.runtime.run_folder import next_run_folder
from parkdet.train.prepare_cli import _write_json

NAME = "경기도 [bold]_맑음.v1_{}.png"


def write_data(root: Path, images: int = 16) -> Path:
    for part in ("train", "test"):
        folder = root / part / "images"
        folder.mkdir(parents=True)
        for i in range(images):
            image = np.full((36, 64, 3), i, np.uint8)
            (folder / NAME.format(i)).write_bytes(cv2.imencode(".png", image)[1].tobytes())
    entries = [{"id": i, "file_name": NAME.format(i), "width": 64, "height": 36} for i in range(images)]
    boxes = [{"image_id": i, "category_id": 1 + i % 2, "bbox": [60, 1, 10, 10]} for i in range(images)]
    label = root / "train" / "label" / "Train.json"
    label.parent.mkdir()
    label.write_text(json.dumps({"images": entries, "annotations": boxes}))
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": entries}))
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def parkdet(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parkdet.cli.main", "prepare", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )  # fmt: skip


def change(path: Path, edit: Any) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_sound_data_set(data: Path, tmp_path: Path) -> None:
    done = parkdet(tmp_path, "--data", data)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == lines[-1] == "run folder: runs/prepare/exp"
    assert "\x1b" not in done.stdout
    assert any(line.split() == ["2", "SUV", "8", "8"] for line in lines)
    assert "warning  train: box partly outside its image: clipped: 16" in lines
    assert "annotations[0], 경기도 [bold]_맑음.v1_0.png: category 1, bbox [60, 1, 10, 10] in 64 x 36" in done.stdout
    assert "split: 14 images train, 2 validate" in lines
    report = json.loads((tmp_path / "runs/prepare/exp/report.json").read_text(encoding="utf-8"))
    assert report["boxes"] == {"listed": 16, "usable": 16}
    assert report["findings"][0]["kind"] == "box_clipped"
    split = json.loads((tmp_path / "runs/prepare/exp/split.json").read_text(encoding="utf-8"))
    assert sorted(split["train_ids"] + split["val_ids"]) == list(range(16))
    assert len(split["val_ids"]) == 2


def test_json_on_stdout_and_nothing_else(data: Path, tmp_path: Path) -> None:
    arguments = ("--data", data, "--json", "--val-count", 5, "--seed", 1, "--project", "p", "--name", "n")
    done = parkdet(tmp_path, *arguments, "--decode")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "p/n/report.json").read_text(encoding="utf-8"))
    assert report["split"] == {"train": 11, "val": 5, "seed": 1}
    assert report["decoded"] is True
    assert done.stderr == "run folder: p/n\nrun folder: p/n\n"


def test_run_folders_are_numbered_and_kept(data: Path, tmp_path: Path) -> None:
    for name in ("exp", "exp2"):
        assert parkdet(tmp_path, "--data", data).stdout.startswith(f"run folder: runs/prepare/{name}\n")
    before = (tmp_path / "runs/prepare/exp/split.json").read_bytes()
    parkdet(tmp_path, "--data", data, "--exist-ok", "--seed", 7)
    assert (tmp_path / "runs/prepare/exp/split.json").read_bytes() != before
    assert sorted(path.name for path in (tmp_path / "runs/prepare").iterdir()) == ["exp", "exp2"]


def test_images_that_cannot_be_used(data: Path, tmp_path: Path) -> None:
    (data / "train/images" / NAME.format(3)).unlink()
    (data / "test/images" / NAME.format(4)).write_bytes(b"")
    done = parkdet(tmp_path, "--data", data)
    assert done.returncode == 1
    assert "error  train: image missing: 1" in done.stdout
    assert f"{NAME.format(4)} has zero bytes" in done.stdout
    assert (tmp_path / "runs/prepare/exp/report.json").exists()


def test_the_decoders_say_nothing_on_the_terminal(data: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (36, 64, 3), dtype=np.uint8)
    content = bytearray(cv2.imencode(".png", image)[1].tobytes())
    content[len(content) // 2] ^= 0x55
    (data / "train/images" / NAME.format(3)).write_bytes(content)
    done = parkdet(tmp_path, "--data", data, "--decode")
    assert done.returncode == 1
    assert f"{NAME.format(3)} cannot be decoded (libpng error" in done.stdout
    assert done.stderr == ""


def test_unusable_json_is_reported_and_leaves_no_split(data: Path, tmp_path: Path) -> None:
    parkdet(tmp_path, "--data", data)
    (data / "train/label/Train.json").write_text('{"images": [,]}')
    done = parkdet(tmp_path, "--data", data, "--exist-ok")
    assert done.returncode == 1
    assert "Train.json:1:13: not JSON" in done.stdout
    assert "no split: the labels are unusable" in done.stdout
    assert [path.name for path in (tmp_path / "runs/prepare/exp").iterdir()] == ["report.json"]


def test_ids_twice_cannot_be_split(data: Path, tmp_path: Path) -> None:
    change(data / "train/label/Train.json", lambda document: document["images"][1].update(id=0))
    done = parkdet(tmp_path, "--data", data)
    assert done.returncode == 1
    assert "no split: image id 0 is there twice" in done.stdout


def test_usage_errors_leave_nothing_behind(data: Path, tmp_path: Path) -> None:
    done = parkdet(tmp_path, "--data", tmp_path / "absent")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'absent'}: no such folder")
    done = parkdet(tmp_path, "--data", data, "--val-count", 16)
    assert done.returncode == 2
    assert "16 validation images cannot be drawn from 16" in done.stderr
    assert parkdet(tmp_path, "--data", data, "--name", "a/b").returncode == 2
    assert list(tmp_path.glob("runs/prepare/*")) == []


def test_the_data_set_may_be_read_only(data: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    folders = [data, *(path for path in data.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert parkdet(tmp_path, "--data", data, "--decode").returncode == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_colours_only_where_wanted(data: Path, tmp_path: Path) -> None:
    assert "\x1b[" in parkdet(tmp_path, "--data", data, FORCE_COLOR="1").stdout
    assert "\x1b[33" not in parkdet(tmp_path, "--data", data, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_the_first_run_folder(tmp_path: Path) -> None:
    assert next_run_folder(tmp_path / "runs" / "train", "exp", False) == tmp_path / "runs" / "train" / "exp"
    assert next_run_folder(tmp_path / "runs" / "train", "exp", True) == tmp_path / "runs" / "train" / "exp"
    assert next_run_folder(tmp_path / "runs" / "train", "exp", False).is_dir()
    (tmp_path / "runs" / "train" / "exp3").write_text("a file of that name is in the way too")
    assert next_run_folder(tmp_path / "runs" / "train", "exp", False).name == "exp4"


def test_programs_that_ask_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    got: list[Path] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        got.extend(next_run_folder(tmp_path / "runs", "exp", False) for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(got)) == 40
    assert {path.name for path in got} == {"exp", *(f"exp{i}" for i in range(2, 41))}


def test_a_run_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="the run folder cannot be made"):
        next_run_folder(tmp_path / "file", "exp", False)
    for name in ("", ".", "..", "a/b", "/a"):
        with pytest.raises(UsageError, match="name of one folder"):
            next_run_folder(tmp_path, name, True)
    with pytest.raises(UsageError, match="the run folder cannot be made"):
        next_run_folder(tmp_path, "file", True)


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        _write_json(path, {})
    assert caught.value.filename == str(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]

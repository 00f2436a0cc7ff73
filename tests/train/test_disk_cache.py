"""The disk cache: the same pixels, found again by other runs, never out of date, never in the way."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from parkdet.runtime.errors import UsageError
from parkdet.train.data.disk_cache import DiskCache, default_cache_dir
from parkdet.train.data.image_store import ImageStore
from parkdet.train.data.samples import Sample


def make(folder: Path, count: int = 3) -> list[Sample]:
    made = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 80, 3), dtype=np.uint8)
        path = folder / f"사진 {number}.png"
        path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        made.append(Sample(number, path, (50, 80), np.zeros(0, np.int32), np.zeros((0, 4), np.float32)))
    return made


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_second_use_reads_no_image_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, cache = make(tmp_path), tmp_path / "cache"
    plain = [ImageStore(samples, 40).image(i) for i in range(3)]
    first = ImageStore(samples, 40, "disk", cache)
    for index, expected in enumerate(plain):
        np.testing.assert_array_equal(first.image(index), expected)
    assert len(files(cache)) == 3
    assert sum(path.stat().st_size for path in files(cache)) == 3 * 25 * 40 * 3
    monkeypatch.setattr("parkdet.train.data.image_store.read_image", lambda _path: pytest.fail("decoded again"))
    second = ImageStore(samples, 40, "disk", cache)
    for index, expected in enumerate(plain):
        np.testing.assert_array_equal(second.image(index), expected)


def test_another_size_or_a_changed_file_is_another_entry(tmp_path: Path) -> None:
    samples, cache = make(tmp_path, 1), tmp_path / "cache"
    ImageStore(samples, 40, "disk", cache).image(0)
    assert ImageStore(samples, 20, "disk", cache).image(0).shape == (12, 20, 3)
    white = np.full((50, 80, 3), 255, np.uint8)
    samples[0].path.write_bytes(cv2.imencode(".png", white)[1].tobytes())
    os.utime(samples[0].path, ns=(0, 0))
    assert (ImageStore(samples, 40, "disk", cache).image(0) == 255).all()
    assert len(files(cache)) == 3


def test_an_entry_cut_off_is_made_again(tmp_path: Path) -> None:
    samples, cache = make(tmp_path, 1), tmp_path / "cache"
    expected = ImageStore(samples, 40, "disk", cache).image(0)
    entry = files(cache)[0]
    entry.write_bytes(entry.read_bytes()[:100])
    np.testing.assert_array_equal(ImageStore(samples, 40, "disk", cache).image(0), expected)
    assert entry.stat().st_size == expected.size


def test_a_disk_that_fills_up_costs_the_cache_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples, cache = make(tmp_path), tmp_path / "cache"
    store = ImageStore(samples, 40, "disk", cache)

    def full(_self: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    for index in range(3):
        assert store.image(index).shape == (25, 40, 3)
    assert caplog.text.count("No space left") == 1
    assert files(cache) == []


def test_too_little_space_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, cache = make(tmp_path), tmp_path / "cache"
    ImageStore(samples, 40, "disk", cache).image(0)
    usage = shutil.disk_usage(tmp_path)
    need = 2 * 25 * 40 * 3  # of three images one is there
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=need))
    ImageStore(samples, 40, "disk", cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=need - 1))
    with pytest.raises(UsageError, match="cache_dir"):
        ImageStore(samples, 40, "disk", cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        ImageStore(samples, 40, "disk", tmp_path / "file" / "cache")


def test_the_default_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "parkdet" / "images"
    assert DiskCache(tmp_path).get(tmp_path / "missing.png", (2, 2)) is None

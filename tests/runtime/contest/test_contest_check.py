"""The check of a data folder: everything wrong is found, counted and named."""

from __future__ import annotations

import json
import struct
import time
import unicodedata
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from parkdet.runtime.check_report import Kind, Severity
from parkdet.runtime.contest import ContestData
from parkdet.runtime.contest_check import check_data

if TYPE_CHECKING:
    from tests.runtime.contest.conftest import ContestFolder

WIDTH, HEIGHT = 64, 36


# --- the check ---------------------------------------------------------------------------------------------


def test_a_sound_data_set(folder: ContestFolder) -> None:
    report = folder.check(decode=True)
    assert report.findings == ()
    assert report.train_ids == (7, 3)
    assert report.parts["train"].sizes == {(WIDTH, HEIGHT): 2}
    assert report.parts["train"].formats == {"PNG": 2}
    assert report.to_json()["parts"]["test"]["usable"] == 1


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_that_are_missing_unreadable_truncated_or_of_another_size(folder: ContestFolder, part: str) -> None:
    listing = folder.train if part == "train" else folder.test
    damaged = {
        "gone.png": None,
        "empty.png": b"",
        "page.png": b"<html>",
        "cut.png": folder.png()[:-5],
        "head.png": folder.png()[:20],
        "other.png": folder.png(30, 20),
        "huge.png": _png_that_claims(folder.png(), 30_000, 20_000),
    }
    for number, (name, content) in enumerate(damaged.items()):
        listing["images"].append(folder.image(100 + number, name))
        if content is not None:
            folder.put(part, name, content)
    folder.put(part, "extra.png", folder.png())
    report = folder.check()
    assert folder.finding(report, Kind.MISSING, part).examples == ("gone.png",)
    unreadable = folder.finding(report, Kind.UNREADABLE, part)
    assert unreadable.count == 3
    assert "empty.png has zero bytes" in unreadable.examples
    assert "more than 500 million" in unreadable.examples[2]
    assert folder.finding(report, Kind.TRUNCATED, part).count == 2
    size = folder.finding(report, Kind.SIZE_DIFFERS, part)
    assert "other.png: JSON 64 x 36, file 30 x 20" in size.examples
    assert folder.finding(report, Kind.UNLISTED, part).examples == ("extra.png",)
    assert report.has_errors
    assert report.parts[part].usable == report.parts[part].images - 6


def _png_that_claims(whole: bytes, width: int, height: int) -> bytes:
    content = bytearray(whole)
    struct.pack_into(">II", content, 16, width, height)
    struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    return bytes(content)


def test_ids_and_names_twice(folder: ContestFolder) -> None:
    folder.train["images"] += [folder.image(3, "c.png"), folder.image(4, folder.name)]
    folder.put("train", "c.png", folder.png())
    report = folder.check()
    assert folder.finding(report, Kind.ID_TWICE).examples == ("id 3: c.png",)
    assert folder.finding(report, Kind.ID_TWICE).severity is Severity.ERROR
    assert folder.finding(report, Kind.NAME_TWICE).examples == (f"{folder.name}: id 4",)
    assert folder.labels().clean().counts.tolist() == [1, 2, 0, 0]  # the boxes go to the first


def test_names_found_in_another_form(folder: ContestFolder) -> None:
    folder.train["images"][0]["file_name"] = unicodedata.normalize("NFD", folder.name)
    folder.train["images"][1]["file_name"] = "b.png"
    report = folder.check()
    assert folder.finding(report, Kind.NAME_UNICODE).count == 1
    assert folder.finding(report, Kind.NAME_LETTER_CASE).examples == ("b.png is B.PNG",)
    assert {f.severity for f in report.findings} == {Severity.NOTE}


def test_boxes_twice_and_images_that_lost_theirs(folder: ContestFolder) -> None:
    folder.put("train", "c.png", folder.png())
    folder.train["images"].insert(0, folder.image(9, "c.png"))
    again = [1, 2, 10, 12.5]
    folder.train["annotations"] += [folder.box(3, again, 2), folder.box(3, again, 1)]
    folder.train["annotations"].append(folder.box(9, [30, 2, 9, 9]))  # another image's is no repetition
    folder.train["annotations"][1]["bbox"][2] = 0
    report = folder.check()
    assert folder.finding(report, Kind.BOX_TWICE).count == 1
    assert folder.finding(report, Kind.BOX_TWICE).examples[0].startswith("annotations[3], B.PNG")
    assert folder.finding(report, Kind.BACKGROUND).examples == (f"{folder.name}: all 1 left out",)


def test_counts_are_whole_and_examples_five(folder: ContestFolder) -> None:
    folder.train["annotations"] += [folder.box(55, [1, 1, 2, 2])] * 9
    found = folder.finding(folder.check(), Kind.BOX_UNKNOWN_IMAGE)
    assert (found.count, len(found.examples)) == (9, 5)


def test_names_that_would_disturb_a_terminal_are_escaped(folder: ContestFolder) -> None:
    folder.train["images"].append(folder.image(9, "a\x1b[31m\n\ud800.png"))
    report = folder.check()
    assert folder.finding(report, Kind.MISSING).examples == ("a\\x1b[31m\\n\\ud800.png",)


def test_nothing_is_written(folder: ContestFolder) -> None:
    data = folder.data()
    before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")}
    check_data(data, decode=True)
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")} == before


def test_decoding_finds_what_both_ends_hide(folder: ContestFolder) -> None:
    image = np.kron(np.random.default_rng(3).integers(0, 255, (36, 64, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    half = len(jpeg) // 2
    lossy = jpeg[:half] + b"\xff\xd9" + jpeg[-2:]  # an end marker in the middle: libjpeg fills the rest
    good = folder.png(seed=5)
    broken = bytearray(good)
    broken[len(good) // 2] ^= 0x55
    warned = good[:33] + b"\0\0\0\x03iCCPabc\x00\x00\x00\x00" + good[33:]  # a profile that libpng refuses
    for number, (name, content) in enumerate(
        {"lossy.jpg": lossy, "good.jpg": jpeg, "broken.png": bytes(broken), "warned.png": warned}.items()
    ):
        folder.put("train", name, content)
        size = {"width": 640, "height": 360} if name.endswith(".jpg") else {}
        folder.train["images"].append(folder.image(20 + number, name, **size))
    shallow = folder.check()
    assert {f.kind for f in shallow.findings} == {Kind.BACKGROUND}
    steps = []
    report = check_data(folder.data(), True, lambda *step: steps.append(step))
    assert folder.finding(report, Kind.LOSSY).examples[0].startswith("lossy.jpg decodes with losses (Corrupt JPEG data")
    assert folder.finding(report, Kind.LOSSY).count == 1
    assert folder.finding(report, Kind.UNREADABLE).examples[0].startswith("broken.png cannot be decoded (libpng error")
    assert folder.finding(report, Kind.UNREADABLE).count == 1
    assert report.parts["train"].usable == 5
    assert ("train decoding", 6, 6) in steps


def test_real_data(shared: Path) -> None:
    folder = shared / "data" / "blood-cells"
    report = check_data(ContestData(folder))
    assert report.parts["train"].images == 205
    assert (report.boxes_listed, report.boxes_usable) == (2805, 2804)
    assert [f.kind for f in report.findings] == [Kind.BOX_NO_SIZE]
    truth = json.loads((folder / "train" / "label" / "Train.json").read_bytes())
    wanted = [sum(a["category_id"] == c and a["bbox"][2] > 0 for a in truth["annotations"]) for c in (1, 2, 3)]
    assert [c.boxes for c in report.classes] == wanted


@pytest.mark.bench
def test_a_data_set_of_the_contests_size(folder: ContestFolder) -> None:
    """Prints the seconds to check 24,650 training images with 134,741 boxes, warm cache."""
    rng = np.random.default_rng(0)
    content = _png_that_claims(folder.png(), 1920, 1080)
    names = [f"20201102_경기도_-_-_맑음_주간_실외_right_{i:06d}_0088055.png" for i in range(24_650)]
    for name in names:
        folder.put("train", name, content)
    corners = rng.uniform(0, 1800, (134_741, 2)).round(1)
    images = rng.integers(0, len(names), len(corners))
    folder.train["images"] = [folder.image(i, n, width=1920, height=1080) for i, n in enumerate(names)]
    folder.train["annotations"] = [
        folder.box(int(i), [float(x), float(y) / 2, 60.5, 40.25], id=row, area=1.0, iscrowd=0)
        for row, (i, (x, y)) in enumerate(zip(images, corners, strict=True))
    ]
    data = folder.data()
    for run in ("first", "warm"):
        start = time.perf_counter()
        report = check_data(data)
        print(f"{run}: {time.perf_counter() - start:.2f} s for 24,650 images and 134,741 boxes")
    assert report.boxes_usable == 134_741

"""The contest's layout: read strictly, matched by name, boxes cleaned."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parkdet.runtime.check_report import Kind, Severity
from parkdet.runtime.contest import (
    CONTEST_CLASSES,
    SUBMISSION_KEYS,
    BoxFault,
    ContestData,
    ImageList,
    ImageRecord,
    LabelledImages,
)
from parkdet.runtime.contest_check import check_data
from parkdet.runtime.contest_json import parse_annotations
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.image_names import Match, match_names

if TYPE_CHECKING:
    from tests.runtime.contest.conftest import ContestFolder

WIDTH, HEIGHT = 64, 36


# --- reading -----------------------------------------------------------------------------------------------


def test_an_empty_list_of_images(folder: ContestFolder) -> None:
    folder.train |= {"images": [], "annotations": []}
    labels = folder.labels()
    assert labels.records == ()
    assert len(labels.clean()) == 0
    assert labels.clean().counts.tolist() == []
    report = folder.check()
    assert folder.finding(report, Kind.NO_IMAGES).severity is Severity.ERROR
    assert report.train_ids == ()


def test_columns_are_as_read(folder: ContestFolder) -> None:
    labels = folder.labels()
    assert [record.image_id for record in labels.records] == [7, 3]
    assert labels.records[0].path == folder.root / "train" / "images" / folder.name
    assert labels.categories == {1: "sedan", 2: "van"}
    assert labels.class_names == ("sedan", "van")
    assert labels.image_index.tolist() == [1, 0, 1]
    assert labels.columns.xywh.tolist() == [[1, 2, 10, 12.5], [5, 5, 20, 20], [30, 2, 9, 9]]
    boxes = labels.clean()
    xyxy, class_ids = boxes.of(1)
    assert xyxy.tolist() == [[1, 2, 11, 14.5], [30, 2, 39, 11]]
    assert class_ids.tolist() == [1, 0]
    assert boxes.annotation.tolist() == [1, 0, 2]
    assert [record.image_id for record in folder.data().test_images()] == [1001]


def test_categories_that_are_absent(folder: ContestFolder) -> None:
    del folder.train["categories"]
    assert folder.labels().categories == dict(enumerate(CONTEST_CLASSES, start=1))
    folder.train["annotations"][0]["category_id"] = 15
    assert folder.labels().categories == {1: "category 1", 15: "category 15"}
    folder.train["categories"] = []
    assert folder.labels().class_names == ("category 1", "category 15")


def test_byte_order_mark(folder: ContestFolder) -> None:
    data = folder.data()
    data.train_json.write_bytes(b"\xef\xbb\xbf" + data.train_json.read_bytes())
    assert len(data.train_labels().records) == 2


@pytest.mark.parametrize(
    ("content", "part_of_message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"images": [\n {]', "Train.json:2:3: not JSON"),
        (b"[]", "the top level is the list []; it must be an object"),
        (b"{}", "the key 'images' is missing"),
        (b'{"images": {}, "annotations": []}', "the key 'images' is an object"),
        (b'{"images": [3], "annotations": []}', "images[0] is 3; it must be an object"),
        (b'{"images": []}', "the key 'annotations' is missing"),
        (b'{"images": "\xff"}', "byte 12 is not UTF-8"),
        (b"[" * 100_000, "not usable as JSON"),
        (b'{"images": ' + b"9" * 5000 + b"}", "not usable as JSON"),
    ],
)
def test_json_that_is_unusable(folder: ContestFolder, content: bytes, part_of_message: str) -> None:
    data = folder.data()
    data.train_json.write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.train_labels()
    assert str(caught.value).startswith(str(data.train_json))
    assert part_of_message in str(caught.value)
    report = check_data(data)
    assert part_of_message in folder.finding(report, Kind.JSON_UNUSABLE).examples[0]
    assert report.has_errors
    assert report.parts["test"].images == 1  # the other part is checked all the same


@pytest.mark.parametrize(
    ("array", "key", "value", "part_of_message"),
    [
        ("images", "id", True, "images[1].id is true; it must be an integer"),
        ("images", "id", 3.0, "images[1].id is 3.0; it must be an integer"),
        ("images", "id", "3", 'images[1].id is "3"; it must be an integer'),
        ("images", "id", None, "images[1].id is null"),
        ("images", "id", 2**70, "images[1].id is 1180591620717411303424"),
        ("images", "file_name", 3, "images[1].file_name is 3"),
        ("images", "file_name", "", 'images[1].file_name is ""'),
        ("images", "width", "64", 'images[1].width is "64"'),
        ("images", "height", True, "images[1].height is true"),
        ("annotations", "image_id", True, "annotations[1].image_id is true; it must be an integer"),
        ("annotations", "image_id", 7.5, "annotations[1].image_id is 7.5"),
        ("annotations", "category_id", "1", 'annotations[1].category_id is "1"'),
        ("annotations", "category_id", 2**70, "annotations[1].category_id is 118"),
        ("annotations", "bbox", [1, 2, 3], "annotations[1].bbox is the list [1, 2, 3]; it must be four numbers"),
        ("annotations", "bbox", [1, 2, 3, "4"], "annotations[1].bbox is the list"),
        ("annotations", "bbox", [1, 2, 3, True], "annotations[1].bbox is the list"),
        ("annotations", "bbox", [1, 2, 3, None], "annotations[1].bbox is the list"),
        ("annotations", "bbox", {"x": 1}, "annotations[1].bbox is an object"),
        ("annotations", "iscrowd", 2, "annotations[1].iscrowd is 2; it must be 0 or 1"),
        ("annotations", "iscrowd", [], "annotations[1].iscrowd is the list []"),
        ("categories", "id", "1", 'categories[1].id is "1"'),
        ("categories", "id", 2, "categories[1].id is 2, as an earlier category's"),
        ("categories", "name", 5, "categories[1].name is 5"),
    ],
)
def test_an_entry_of_the_wrong_type_is_named(
    folder: ContestFolder, array: str, key: str, value: Any, part_of_message: str
) -> None:
    folder.train[array][1][key] = value
    with pytest.raises(DataError) as caught:
        folder.labels()
    assert part_of_message in str(caught.value)
    if key != "iscrowd" and value != 2:
        del folder.train[array][1][key]
        if key not in ("width", "height"):
            with pytest.raises(DataError, match=rf"{array}\[1\]\.{key} is missing"):
                folder.labels()


def test_folders_and_files_that_are_absent(folder: ContestFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        ContestData(tmp_path / "nowhere")
    data = folder.data()
    with pytest.raises(UsageError, match="is not a folder"):
        ContestData(data.test_json)
    data.test_json.unlink()
    with pytest.raises(DataError, match=r"Test_Images_Information\.json: no such file"):
        data.test_images()
    assert folder.finding(check_data(data), Kind.JSON_UNUSABLE, "test").severity is Severity.ERROR
    (folder.root / "test" / "images" / "t.png").unlink()
    (folder.root / "test" / "images").rmdir()
    assert folder.finding(check_data(data), Kind.NO_TEST_SET, "test").severity is Severity.WARNING


def test_submission_keys(folder: ContestFolder) -> None:
    data = folder.data()
    assert data.submission_keys() == SUBMISSION_KEYS
    data.sample_submission.write_text("[]")
    assert data.submission_keys() == SUBMISSION_KEYS
    data.sample_submission.write_text('[{"score": 1, "bbox": [], "image_id": 3}]')
    assert data.submission_keys() == ("score", "bbox", "image_id")
    data.sample_submission.write_text('{"a": 1}')
    with pytest.raises(DataError, match="list of objects"):
        data.submission_keys()
    assert folder.finding(check_data(data), Kind.JSON_UNUSABLE, "sample").count == 1


# --- names -------------------------------------------------------------------------------------------------


def test_no_names_and_no_files() -> None:
    found = match_names([], [])
    assert (found.files, found.matches, found.unlisted) == ([], [], [])


def test_names_meet_files() -> None:
    nfc, nfd = (unicodedata.normalize(form, "주차장 é.png") for form in ("NFC", "NFD"))
    assert nfc != nfd
    assert match_names([nfc], [nfd]).matches == [Match.UNICODE]
    assert match_names([nfd], [nfc]).files == [nfc]
    assert match_names([nfd, nfc], [nfc, nfd]).matches == [Match.EXACT] * 2
    # The file already has its name: the second name means nothing that is there.
    assert match_names([nfc, nfd], [nfc]).matches == [Match.EXACT, Match.MISSING]
    assert match_names(["a.PNG"], ["A.png"]).matches == [Match.LETTER_CASE]
    assert match_names(["a.PNG"], ["A.png", "a.png"]).matches == [Match.AMBIGUOUS]
    assert match_names(["a.PNG", "A.PNG"], ["a.png"]).matches == [Match.AMBIGUOUS] * 2
    assert match_names(["a.PNG", "a.PNG"], ["a.png"]).files == ["a.png"] * 2
    assert match_names([nfd.upper()], [nfc]).matches == [Match.LETTER_CASE]
    assert match_names(["s/a.png", "./s//b.png"], ["s/b.png", "s/a.png"]).files == ["s/a.png", "s/b.png"]


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "s/../../a.png", "..", ".", "s/.."])
def test_names_that_lead_out_are_never_opened(folder: ContestFolder, name: str) -> None:
    (folder.root / "train" / "a.png").write_bytes(b"")
    folder.train["images"][1]["file_name"] = name
    assert folder.labels().records[1].path is None
    assert folder.finding(folder.check(), Kind.NAME_OUTSIDE).examples == (name,)


def test_unlisted_are_images_only() -> None:
    files = ["x.JPG", "Thumbs.db", ".hidden.png", "s/y.webp", "notes.txt", "a.png"]
    assert match_names(["a.png"], files).unlisted == ["s/y.webp", "x.JPG"]


def test_subfolders_and_links_to_them(folder: ContestFolder) -> None:
    folder.put("train", "camera 1/c.png", folder.png())
    (folder.root / "train" / "images" / "camera 1" / "up").symlink_to("..")  # a loop
    folder.train["images"].append(folder.image(9, "camera 1/c.png"))
    assert folder.labels().records[2].path == folder.root / "train" / "images" / "camera 1" / "c.png"
    assert not folder.check().has_errors


# --- boxes -------------------------------------------------------------------------------------------------


def test_each_fault_of_a_box(folder: ContestFolder) -> None:
    folder.train["annotations"] = [
        folder.box(99, [1, 1, 5, 5]),
        folder.box(7, [1, 1, 5, 5], 3),
        folder.box(7, [math.nan, 1, 5, 5]),
        folder.box(7, [1, 1, math.inf, 5]),
        folder.box(7, [1, 1, 10**400, 5]),
        folder.box(7, [1, 1, 5, 5], iscrowd=1),
        folder.box(7, [1, 1, 0, 5]),
        folder.box(7, [30, 30, -5, -5]),
        folder.box(7, [WIDTH, 1, 5, 5]),
        folder.box(7, [1, -8, 5, 8]),
        folder.box(7, [-3, -2.5, 10, 10]),
        folder.box(7, [60, 30, 10, 10]),
        folder.box(7, [1, 1, 5, 5]),
        folder.box(7, [0.7, 0.1, 63.3 + 1e-9, 35.9]),
    ]
    boxes = folder.labels().clean()
    assert {fault: rows.tolist() for fault, rows in boxes.faults.items()} == {
        BoxFault.UNKNOWN_IMAGE: [0],
        BoxFault.UNKNOWN_CATEGORY: [1],
        BoxFault.NOT_FINITE: [2, 3, 4],
        BoxFault.CROWD: [5],
        BoxFault.NO_SIZE: [6, 7],
        BoxFault.OUTSIDE: [8, 9],
        BoxFault.CLIPPED: [10, 11],
    }
    wanted = np.array([[0, 0, 7, 7.5], [60, 30, 64, 36], [1, 1, 6, 6], [0.7, 0.1, 64, 36]])
    np.testing.assert_allclose(boxes.xyxy, wanted, rtol=1e-12)
    report = folder.check()
    assert (report.boxes_listed, report.boxes_usable) == (14, 4)
    assert [c.boxes for c in report.classes] == [4, 0]
    assert [c.images for c in report.classes] == [1, 0]
    assert folder.finding(report, Kind.BOX_NOT_FINITE).count == 3
    assert folder.finding(report, Kind.BOX_CLIPPED).examples[1].endswith("bbox [60, 30, 10, 10] in 64 x 36")
    assert folder.finding(report, Kind.BACKGROUND).examples == ("B.PNG",)
    assert not report.has_errors


corner = st.one_of(st.floats(-40, 100), st.sampled_from([0.0, -0.0, 36.0, 64.0, math.nan, math.inf, 1e308]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([7, 3, 8]), st.sampled_from([1, 2, 3]), corner, corner, corner, corner), max_size=12
    )
)
def test_clean_is_what_a_loop_over_boxes_gives(rows: list[tuple[int, int, float, float, float, float]]) -> None:
    document = {"annotations": [{"image_id": r[0], "category_id": r[1], "bbox": list(r[2:])} for r in rows]}
    columns = parse_annotations(document, Path("x"))
    base = _labels_of_two_images()
    index = np.array([{7: 0, 3: 1}.get(r[0], -1) for r in rows], np.int64)
    boxes = LabelledImages(base.images, base.categories, index, columns).clean()
    expected: dict[int, list[list[float]]] = {0: [], 1: []}
    for image_id, category, x, y, w, h in rows:
        if image_id == 8 or category == 3 or not all(map(math.isfinite, (x, y, w, h))) or min(w, h) <= 0:
            continue
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, WIDTH), min(y + h, HEIGHT)
        if x2 > x1 and y2 > y1:
            expected[{7: 0, 3: 1}[image_id]].append([x1, y1, x2, y2, category - 1])
    for image, wanted in expected.items():
        xyxy, class_ids = boxes.of(image)
        assert np.column_stack((xyxy, class_ids)).tolist() == wanted
    left_out = sum(len(found) for fault, found in boxes.faults.items() if fault is not BoxFault.CLIPPED)
    assert len(boxes) + left_out == len(rows)


def _labels_of_two_images() -> LabelledImages:

    records = tuple(ImageRecord(i, f"{i}.png", None, WIDTH, HEIGHT) for i in (7, 3))
    images = ImageList(Path("x"), Path("x"), records, (Match.MISSING,) * 2, ())
    empty = parse_annotations({"annotations": []}, Path("x"))
    return LabelledImages(images, {1: "a", 2: "b"}, np.zeros(0, np.int64), empty)


def test_which_size_clips(folder: ContestFolder) -> None:
    folder.train["annotations"] = [folder.box(7, [0, 0, 500, 500])]
    del folder.train["images"][0]["width"]
    assert folder.labels().clean().xyxy.tolist() == [[0, 0, WIDTH, HEIGHT]]  # the file's header
    folder.train["images"][0]["width"] = 50
    assert folder.labels().clean().xyxy.tolist() == [[0, 0, 50, HEIGHT]]  # the JSON file's
    assert folder.labels().clean([[40, 30], [0, 0]]).xyxy.tolist() == [[0, 0, 40, 30]]  # the headers given
    (folder.root / "train" / "images" / folder.name).unlink()
    folder.train["images"][0] = {"id": 7, "file_name": folder.name}
    assert folder.labels().clean().xyxy.tolist() == [[0, 0, 500, 500]]  # nobody knows

"""What cannot be evaluated is refused, with the file, the number and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.evaluation import evaluate

BOX = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}
TRUTH = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 1, "name": "van"}], "annotations": [BOX]}
FOUND = BOX | {"score": 0.5}
TABLE = pl.DataFrame(
    {"image_id": [1], "category_id": [1], "x": [0.0], "y": [0.0], "w": [9.0], "h": [9.0], "score": [0.5]}
)


def test_what_is_right_is_taken() -> None:
    assert evaluate([FOUND], TRUTH).map == pytest.approx(1)
    assert evaluate(TABLE, TRUTH).map50 == pytest.approx(1)
    unsigned = TABLE.cast({"image_id": pl.UInt32, "category_id": pl.Int8, "x": pl.Int32, "score": pl.Float32})
    assert evaluate(unsigned, TRUTH).map50 == pytest.approx(1)


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ([FOUND, FOUND | {"image_id": 9}, FOUND | {"image_id": 8}],
         "the detections: 2 detections of images that the truth (the truth) lacks; both must be of the same data "
         "set; such as 9"),
        ([FOUND | {"image_id": "1"}], "1 detections of images that"),
        ([FOUND | {"category_id": 0}], "1 detections of categories that"),
        ([FOUND, BOX], "the detections: detection number 2 has no 'score'"),
        ([FOUND, 3], "detection number 2 has no 'bbox': 3"),
        ([FOUND | {"bbox": [0, 0, 1]}], "detection number 1: 'bbox' must be four numbers, not [0, 0, 1]"),
        ([FOUND, FOUND | {"bbox": [0, 0, 1, "1"]}], "detection number 2: 'bbox' must be four numbers"),
        ([FOUND | {"bbox": [0, 0, float("nan"), 1]}], "1 detections are not finite, such as number 1"),
        ([FOUND | {"score": float("inf")}], "1 detections are not finite"),
        ([FOUND | {"bbox": [0, 0, -1, 1]}], "1 detections are of negative width or height"),
        ([FOUND | {"score": "0.5"}], "detection number 1: 'score' must be a number, not \"0.5\""),
        ([FOUND | {"score": None}], "'score' must be a number, not null"),
        ([FOUND, FOUND | {"image_id": 1.5}], "detection number 2: 'image_id' must be a whole number, not 1.5"),
        ([FOUND, FOUND | {"image_id": "a"}], "detection number 2: 'image_id' must be a whole number, not \"a\""),
        ([FOUND | {"category_id": True}], "'category_id' must be a whole number, not true"),
        ({"annotations": [FOUND]}, "expected a list of detections, found dict"),
        (TABLE.drop("score"), "no column score"),
        (TABLE.with_columns(score=pl.lit("a")), "column score cannot be of type String"),
        (TABLE.with_columns(category_id=pl.lit(1.0)), "column category_id cannot be of type Float64"),
        (TABLE.with_columns(x=pl.lit(None, pl.Float64)), "1 rows have no x"),
        (TABLE.with_columns(h=pl.lit(float("nan"))), "1 detections are not finite"),
        (TABLE.with_columns(image_id=pl.lit(7)), "1 detections of images that"),
    ],
)  # fmt: skip
def test_wrong_detections_are_told(detections: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(detections, TRUTH)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([], "not a COCO truth"),
        ({"images": []}, "not a COCO truth"),
        (TRUTH | {"annotations": [BOX | {"image_id": 3}]}, "1 boxes of images that 'images' lacks"),
        (TRUTH | {"annotations": [BOX | {"category_id": 3}]}, "1 boxes of categories that 'categories' lacks"),
        (TRUTH | {"annotations": [BOX | {"bbox": [0, 0, 1, float("nan")]}]}, "1 boxes are not finite"),
        (TRUTH | {"annotations": [BOX | {"bbox": None}]}, "annotation number 1: 'bbox' must be four numbers"),
        (TRUTH | {"annotations": [BOX, {}]}, "annotation number 2 has no 'bbox'"),
        (TRUTH | {"annotations": [BOX | {"area": "big"}]}, "'area' must be a number"),
        (TRUTH | {"images": [{"id": 1}, {"id": 1}]}, "1 image ids stand there more than once, such as 1"),
        (TRUTH | {"categories": [{"id": "a"}]}, "category number 1: 'id' must be a whole number"),
    ],
)
def test_wrong_truth_is_told(truth: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluate([], truth)
    assert message in str(caught.value)


def test_files_are_named(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(TRUTH))
    broken = tmp_path / "submission.json"
    broken.write_text("[{")
    with pytest.raises(UsageError, match=r"lost\.json: no such file"):
        evaluate(tmp_path / "lost.json", truth)
    with pytest.raises(UsageError, match="a folder"):
        evaluate([], tmp_path)
    with pytest.raises(DataError, match=r"submission\.json: not JSON"):
        evaluate(broken, truth)
    broken.write_text(json.dumps([FOUND | {"image_id": 5}]))
    with pytest.raises(DataError, match=rf"{broken}: 1 detections of images that the truth \({truth}\) lacks"):
        evaluate(broken, truth)
    with pytest.raises(UsageError, match="max_det"):
        evaluate([], truth, max_det=0)

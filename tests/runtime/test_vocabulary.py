"""Detections and the model spec."""

from __future__ import annotations

import json

import numpy as np
import pytest

from parkdet.runtime import Detections, ModelSpec
from parkdet.runtime.errors import ArtifactError
from parkdet.runtime.model_spec import TensorSpec

SPEC = ModelSpec(
    class_names=("승용차", "bus"),
    category_ids=(3, 7),
    strides=(8, 16),
    anchors=(((1.5, 2.0),), ((3.0, 4.0),)),
    imgsz=640,
    inputs=(TensorSpec(name="images", dtype="uint8", shape=(-1, 64, 64, 3)),),
    checkpoint_sha256="ab",
)


def test_a_spec_comes_back_from_its_json() -> None:
    assert ModelSpec.from_json(SPEC.to_json(), "here") == SPEC
    assert "승용차" in SPEC.to_json()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 99}', "null", SPEC.to_json().replace("strides", "strudes")]
)
def test_a_damaged_spec_names_its_place_and_the_remedy(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"^here: .*parkdet export"):
        ModelSpec.from_json(text, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": []},
        {"category_ids": [1, 1]},
        {"category_ids": [1]},
        {"strides": [16, 8]},
        {"strides": [8]},
        {"anchors": [[[1, 1]], []]},
        {"imgsz": 0},
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    values = {**json.loads(SPEC.to_json()), **change}
    with pytest.raises(ArtifactError):
        ModelSpec.from_json(json.dumps(values), "here")


def test_categories_are_counted_from_one_when_none_are_given() -> None:
    assert ModelSpec(class_names=("a", "b"), strides=(8,), anchors=(((1.0, 1.0),),), imgsz=64).category_ids == (1, 2)


def test_detections_are_checked_and_sorted() -> None:
    assert len(Detections.sorted([], [], [])) == 0
    found = Detections.sorted([[0, 0, 1, 1], [2, 2, 3, 3]], [0.1, 0.9], [4, 5])
    assert [(class_id, round(score, 1)) for _, score, class_id in found] == [(5, 0.9), (4, 0.1)]
    with pytest.raises(ValueError, match="descend"):
        Detections(np.zeros((2, 4), np.float32), np.array([0.1, 0.2], np.float32), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="xyxy"):
        Detections(np.zeros((2, 5), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int32))


def test_boxes_without_area_are_dropped_and_counted() -> None:
    found = Detections.sorted(np.zeros((2, 4)), [0.5, 0.4], [0, 0])
    moved, dropped = found.moved(np.array([[0, 0, 2, 2], [5, 5, 5, 9]], np.float32))
    assert (len(moved), dropped) == (1, 1)

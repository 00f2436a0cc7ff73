"""The confusion matrix against one that looks for partners by trying all of them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.runtime.confusion import confusion_matrix
from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray

NO_BOXES = np.zeros((0, 4), np.float32)
NO_CLASSES = np.zeros(0, np.int32)


def test_no_images_and_images_without_anything() -> None:
    assert not confusion_matrix([], 2).any()
    assert not confusion_matrix([(Detections.empty(), NO_BOXES, NO_CLASSES)], 2).any()


def test_each_kind_of_outcome_by_hand() -> None:
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], np.float32)
    found = Detections.sorted(
        [[0, 0, 10, 9], [20, 0, 30, 8], [60, 0, 70, 10], [0, 0, 10, 9], [40, 0, 50, 10]],
        [0.9, 0.8, 0.7, 0.6, 0.25],
        [0, 0, 1, 1, 1],
    )
    counts = confusion_matrix([(found, truth, np.array([0, 1, 1], np.int32))], 2)
    # Right; class 0 for 1; 1 where nothing is, twice (once on a box that is taken); the last truth is missed, for
    # a score of 0.25 is not over it.
    assert counts.tolist() == [[1, 1, 0], [0, 0, 2], [0, 1, 0]]


@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_those_of_the_largest_overlap_left(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images: list[tuple[Detections, FloatArray, NDArray[np.int32]]] = []
    for count, found in ((5, 9), (0, 4), (7, 0), (12, 30)):
        truth, boxes = (
            np.asarray(np.sort(rng.uniform(0, 40, (n, 2, 2)), axis=1).reshape(n, 4), np.float32) for n in (count, found)
        )
        boxes[: found // 2] = truth[rng.integers(count, size=found // 2)] + 1 if count else boxes[: found // 2]
        detections = Detections.sorted(boxes, rng.uniform(0, 1, found), rng.integers(3, size=found))
        images.append((detections, truth, np.asarray(rng.integers(3, size=count), np.int32)))
    expected = np.zeros((4, 4), np.int64)
    for detections, truth, classes in images:
        free_truth = set(range(len(truth)))
        free = {i for i in range(len(detections)) if detections.scores[i] > 0.25}
        while pairs := [
            (overlap(detections.xyxy[i], truth[j]), -i, j)
            for i in free
            for j in free_truth
            if overlap(detections.xyxy[i], truth[j]) > 0.45
        ]:
            _, i, j = max(pairs)
            expected[detections.class_ids[-i], classes[j]] += 1
            free.remove(-i)
            free_truth.remove(j)
        for i in free:
            expected[detections.class_ids[i], 3] += 1
        for j in free_truth:
            expected[3, classes[j]] += 1
    assert expected[:3, :3].sum() > 0
    np.testing.assert_array_equal(confusion_matrix(images, 3), expected)


def overlap(a: FloatArray, b: FloatArray) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(width, 0) * max(height, 0)
    whole = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return float(common / whole) if whole else 0.0

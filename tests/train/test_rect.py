"""Rectangular training: which images stand together, on which canvas, and that their boxes stay on their paint."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from parkdet.train.data.augment import AugmentSettings
from parkdet.train.data.loader import TrainingLoader, TrainingSet
from parkdet.train.data.samples import Sample
from parkdet.train.data.sampling import grouped_by_aspect, rect_canvas

STILL = AugmentSettings(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0)


@pytest.mark.parametrize(
    ("aspects", "expected"),
    [
        ([9 / 16], (384, 640)),  # 360 in whole strides
        ([0.5, 0.75], (480, 640)),
        ([4 / 3, 2.0], (640, 480)),
        ([0.5, 2.0], (640, 640)),
        ([1.0], (640, 640)),
        ([0.01], (64, 640)),  # two strides at least
    ],
)
def test_the_canvas_is_the_smallest_that_holds_all(aspects: list[float], expected: tuple[int, int]) -> None:
    assert rect_canvas(np.array(aspects), 640, 32) == expected


def test_a_batch_holds_neighbours_in_aspect_and_every_sample_comes_once() -> None:
    aspects = np.random.default_rng(0).uniform(0.3, 2, 53)
    ranks = np.argsort(np.argsort(aspects))
    orders = [grouped_by_aspect(np.random.default_rng(e).permutation(53), aspects, 8, 5, e) for e in range(30)]
    for order in orders:
        assert sorted(order) == list(range(53))
        for start in range(0, 53, 8):
            batch = sorted(ranks[order[start : start + 8]])
            # Neighbours, but for the five that were taken out to stand at the end.
            assert batch[-1] - batch[0] < 8 + 5
    assert len({tuple(order[:8]) for order in orders}) > 6
    assert len({tuple(order[-5:]) for order in orders}) > 3
    again = grouped_by_aspect(np.random.default_rng(3).permutation(53), aspects, 8, 5, 3)
    np.testing.assert_array_equal(again, orders[3])
    assert sorted(grouped_by_aspect(np.arange(3), aspects, 8, 0, 0)) == [0, 1, 2]


def samples(folder: Path) -> list[Sample]:
    """Images of three shapes, black, with one white box each."""
    made = []
    for number in range(15):
        height, width = ((40, 80), (60, 60), (90, 45))[number % 3]
        image = np.zeros((height, width, 3), np.uint8)
        image[10:30, 12:36] = 255
        path = folder / f"{number}.png"
        path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
        made.append(
            Sample(number, path, (height, width), np.zeros(1, np.int32), np.array([[12, 10, 36, 30]], np.float32))
        )
    return made


@pytest.mark.parametrize("world", [1, 2])
def test_canvases_follow_their_images_and_are_the_same_for_all_processes(tmp_path: Path, world: int) -> None:
    made = samples(tmp_path)
    loaders = [
        TrainingLoader(
            TrainingSet(made, 128, STILL, 0), batch_size=4 // world, workers=0, rect_stride=32, rank=rank, world=world
        )
        for rank in range(world)
    ]
    seen: list[int] = []
    shapes = set()
    for step in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        ids = [image_id for batch in step for image_id in batch.image_ids]
        seen += ids
        aspects = [made[i].image_hw[0] / made[i].image_hw[1] for i in ids]
        height = math.ceil(min(max(aspects), 1) * 128 / 32) * 32
        width = math.ceil(min(1 / min(aspects), 1) * 128 / 32) * 32
        for batch in step:
            assert batch.images.shape[2:] == (height, width)
            shapes.add((height, width))
            for number, _, cx, cy, w, h in batch.targets.tolist():
                white = batch.images[int(number), 0].numpy() > 200
                rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
                painted = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                box = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
                np.testing.assert_allclose(box, painted, atol=1.5)
    assert set(seen) == set(range(15))
    assert len(shapes) >= 2


def test_a_replacement_of_another_shape_is_scaled_onto_the_canvas(tmp_path: Path) -> None:
    made = samples(tmp_path)
    wide = [sample for sample in made if sample.image_hw == (40, 80)]
    tall = next(sample for sample in made if sample.image_hw == (90, 45))
    for sample in wide:
        sample.path.unlink()
    source = TrainingLoader(TrainingSet([*wide, tall], 128, STILL, 0), batch_size=5, workers=0, rect_stride=32)
    shapes = {tuple(batch.images.shape[2:]) for batch in source.epoch(0)}
    assert (64, 128) in shapes
    assert len(source.unreadable) == 5

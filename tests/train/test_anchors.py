"""Automatic anchors against loops over boxes, scipy-free clusters known beforehand, and the network they end in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parkdet.train.anchors import (
    best_possible_recall,
    canvas_sizes,
    fit_anchors,
    fitness,
    fitted_anchors,
)
from parkdet.train.config import TrainSettings
from parkdet.train.data.samples import Sample
from parkdet.train.model.loss import DetectionLoss
from parkdet.train.model.network import build_network


def sample(boxes: list[tuple[float, float, float, float]], hw: tuple[int, int] = (100, 200)) -> Sample:
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(0, Path("x.png"), hw, np.zeros(len(boxes), np.int32), xyxy)


def test_sizes_are_those_on_the_canvas() -> None:
    assert canvas_sizes([sample([])], 640).shape == (0, 2)
    sizes = canvas_sizes([sample([(0, 0, 10, 20)]), sample([(5, 5, 25, 10)], (400, 300))], 640)
    np.testing.assert_allclose(sizes, [[32, 64], [32, 8]])


def test_recall_and_fitness_by_hand() -> None:
    anchors = np.array([[10.0, 10.0], [40.0, 20.0]])
    boxes = np.array([[10.0, 10.0], [39.0, 41.0], [200.0, 20.0], [1.0, 3.0]])
    total, matched = 0.0, 0
    for w, h in boxes:
        likeness = max(min(w / a, a / w, h / b, b / h) for a, b in anchors)
        matched += likeness > 1 / 4
        total += likeness if likeness > 1 / 4 else 0
    assert matched == 2
    assert best_possible_recall(boxes, anchors, 4.0) == matched / 4
    assert fitness(boxes, anchors, 4.0) == pytest.approx(total / 4)
    assert best_possible_recall(np.zeros((0, 2)), anchors, 4.0) == 1.0


def test_the_recall_is_what_the_loss_matches() -> None:
    rng = np.random.default_rng(0)
    network = build_network("yolov5n", ["a"], 640)
    boxes = np.exp(rng.uniform(np.log(2), np.log(640), (200, 2)))
    own = np.array(network.spec.anchors).reshape(-1, 2)
    loss = DetectionLoss(network.spec, anchor_t=4.0)
    found = set()
    targets = torch.tensor(np.concatenate((np.zeros((200, 2)), np.full((200, 2), 0.5), boxes / 640), 1)).float()
    for number, target in enumerate(targets):
        for level, stride in enumerate(network.spec.strides):
            if len(loss._match(target[None], level, (640 // stride, 640 // stride)).image):
                found.add(number)
    assert best_possible_recall(boxes, own, 4.0) == len(found) / 200


def clusters(centres: NDArray[np.float64], each: int = 60) -> NDArray[np.float64]:
    rng = np.random.default_rng(7)
    return np.concatenate([centre * rng.uniform(0.95, 1.05, (each, 2)) for centre in centres])


def test_clusters_are_found_and_equal_seeds_give_equal_anchors() -> None:
    centres = np.array([[4.0, 5.0], [9.0, 7.0], [12.0, 30.0], [40.0, 20.0], [60.0, 70.0], [200.0, 90.0]])
    fitted = fitted_anchors(clusters(centres), 6, 4.0, seed=0)
    order = np.argsort(centres.prod(axis=1))
    np.testing.assert_allclose(fitted, centres[order], rtol=0.06)
    np.testing.assert_array_equal(fitted, fitted_anchors(clusters(centres), 6, 4.0, seed=0))
    assert not np.array_equal(fitted, fitted_anchors(clusters(centres), 6, 4.0, seed=1))


def test_refinement_raises_fitness_over_kmeans() -> None:
    rng = np.random.default_rng(3)
    boxes = np.exp(rng.normal(3.5, 1.0, (800, 2)))
    plain = fitted_anchors(boxes, 9, 4.0, seed=0, generations=0)
    refined = fitted_anchors(boxes, 9, 4.0, seed=0)
    assert fitness(boxes, refined, 4.0) > fitness(boxes, plain, 4.0) + 0.005
    with pytest.raises(ValueError, match="too few"):
        fitted_anchors(boxes[:8], 9, 4.0, seed=0)


def test_equal_boxes_and_tiny_ones_fit_too() -> None:
    fitted = fitted_anchors(np.full((50, 2), 7.0), 9, 4.0, seed=0)
    assert best_possible_recall(np.full((50, 2), 7.0), fitted, 4.0) == 1
    assert np.isfinite(fitted).all()
    assert (fitted_anchors(np.full((20, 2), 0.5), 9, 4.0, seed=0) >= 2).all()


def test_anchors_that_fit_stay_and_others_reach_spec_loss_and_layer() -> None:
    said: list[str] = []
    network = build_network("yolov5n", ["a"], 640)
    before = network.spec.anchors
    rng = np.random.default_rng(1)

    def boxes(low: float, high: float) -> list[Sample]:
        sides = np.exp(rng.uniform(np.log(low), np.log(high), (300, 2)))
        return [sample([(0, 0, w, h)], (640, 640)) for w, h in sides]

    fit_anchors(network, boxes(20, 200), TrainSettings(), said.append)
    assert "they fit" in said[-1]
    assert network.spec.anchors == before
    fit_anchors(network, boxes(2, 2.2)[:3], TrainSettings(), said.append)
    assert "too few" in said[-1]
    fit_anchors(network, [sample([])], TrainSettings(), said.append)
    assert network.spec.anchors == before

    small = boxes(1.5, 6)
    fit_anchors(network, small, TrainSettings(), said.append)
    assert "fitted ones reach 1.0000" in said[-1]
    after = np.array(network.spec.anchors)
    assert after.shape == (3, 3, 2)
    assert (np.diff(after.prod(axis=2).ravel()) >= 0).all()
    cells = network.detect.anchors.numpy() * np.array([8, 16, 32]).reshape(3, 1, 1)
    np.testing.assert_allclose(cells, after, rtol=1e-6)
    wh = canvas_sizes(small, 640)
    assert best_possible_recall(wh[(wh >= 2).any(1)], after.reshape(-1, 2), 4.0) > 0.98

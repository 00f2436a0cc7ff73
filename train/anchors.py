"""Anchors that fit a data set: checked by the recall they allow, and fitted by k-means with genetic refinement.

Source: YOLOv5's AutoAnchor; k-means++ (Arthur and Vassilvitskii, 2007) for the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from parkdet.train.config import TrainSettings
from parkdet.train.data.samples import Sample
from parkdet.train.model.network import Yolov5

GOOD_RECALL = 0.98
"""Anchors that allow this best possible recall are left as they are."""
MIN_SIDE = 2.0
"""Boxes whose sides are both under this, in canvas pixels, do not take part."""
GENERATIONS = 1000
KMEANS_ROUNDS = 30
MUTATION_RATE, MUTATION_SIGMA = 0.9, 0.1
_STREAM = 0xA2C
"""Word that keeps the fitting's random numbers apart from others of the same seed."""

Floats = NDArray[np.float64]
Anchors = tuple[tuple[tuple[float, float], ...], ...]


def canvas_sizes(samples: Sequence[Sample], imgsz: int) -> Floats:
    """Width and height (n, 2) of every box once its image's long side is `imgsz` pixels."""
    sizes = [
        (sample.xyxy[:, 2:] - sample.xyxy[:, :2]).astype(np.float64) * (imgsz / max(sample.image_hw))
        for sample in samples
    ]
    return np.concatenate([np.zeros((0, 2)), *sizes])


def ratios(wh: Floats, anchors: Floats) -> Floats:
    """How alike boxes (n, 2) and anchors (k, 2) are, (n, k): the worse side's ratio, turned to be at most 1."""
    ratio = wh[:, None] / anchors[None]
    return np.asarray(np.minimum(ratio, 1 / ratio).min(axis=2))


def best_possible_recall(wh: Floats, anchors: Floats, anchor_t: float) -> float:
    """Share of boxes (n, 2) that at least one anchor (k, 2) is matched to; 1 where there is no box."""
    return float((ratios(wh, anchors).max(axis=1) > 1 / anchor_t).mean()) if len(wh) else 1.0


def fitness(wh: Floats, anchors: Floats, anchor_t: float) -> float:
    """Mean likeness of boxes to their best anchor, 0 for those that none is matched to."""
    best = ratios(wh, anchors).max(axis=1)
    return float((best * (best > 1 / anchor_t)).mean())


def fitted_anchors(wh: Floats, count: int, anchor_t: float, seed: int, generations: int = GENERATIONS) -> Floats:
    """`count` anchors (count, 2) for boxes (n, 2), by area: k-means, then mutations kept where fitness grows.

    ValueError where there are fewer boxes than anchors.
    """
    if len(wh) < count:
        raise ValueError(f"{len(wh)} boxes are too few for {count} anchors")
    rng = np.random.default_rng((seed, _STREAM))
    anchors = _kmeans(wh, count, rng)
    best = fitness(wh, anchors, anchor_t)
    for _ in range(generations):
        change = np.ones_like(anchors)
        while (change == 1).all():
            mutated = rng.random(anchors.shape) < MUTATION_RATE
            steps = mutated * rng.random() * rng.standard_normal(anchors.shape) * MUTATION_SIGMA
            change = np.clip(1 + steps, 0.3, 3.0)
        candidate = np.maximum(anchors * change, MIN_SIDE)
        found = fitness(wh, candidate, anchor_t)
        if found > best:
            anchors, best = candidate, found
    return np.asarray(anchors[np.argsort(anchors.prod(axis=1), kind="stable")])


def _kmeans(wh: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Geometric means of clusters of boxes, at least `MIN_SIDE` pixels: what counts is how many times larger."""
    points = np.log(np.maximum(wh, 1e-3))
    means = points[[rng.integers(len(points))]]
    while len(means) < count:
        distance = ((points[:, None] - means[None]) ** 2).sum(axis=2).min(axis=1)
        total = distance.sum()
        means = np.concatenate((means, points[[rng.choice(len(points), p=distance / total if total > 0 else None)]]))
    for _ in range(KMEANS_ROUNDS):
        nearest = ((points[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
        members = np.bincount(nearest, minlength=count)
        sums = np.stack([np.bincount(nearest, points[:, axis], count) for axis in range(2)], axis=1)
        moved = np.where(members[:, None] > 0, sums / np.maximum(members, 1)[:, None], means)
        if np.array_equal(moved, means):
            break
        means = moved
    return np.asarray(np.maximum(np.exp(means), MIN_SIDE))


def fit_anchors(
    network: Yolov5, samples: Sequence[Sample], settings: TrainSettings, say: Callable[[str], None]
) -> None:
    """Look whether the network's anchors fit the boxes at its image size; give it fitted ones where they do not."""
    spec = network.spec
    wh = canvas_sizes(samples, settings.imgsz)
    wh = wh[(wh >= MIN_SIDE).any(axis=1)]
    own = np.array(spec.anchors, np.float64).reshape(-1, 2)
    recall = best_possible_recall(wh, own, settings.anchor_t)
    told = f"anchors: best possible recall {recall:.4f} over {len(wh)} boxes"
    if recall > GOOD_RECALL:
        say(f"{told}; they fit")
        return
    if len(wh) < len(own):
        say(f"{told}; there are too few boxes to fit others")
        return
    fitted = np.round(fitted_anchors(wh, len(own), settings.anchor_t, settings.seed), 2)
    better = best_possible_recall(wh, fitted, settings.anchor_t)
    if better <= recall:
        say(f"{told}; fitted ones are no better ({better:.4f}), so they stay")
        return
    levels = fitted.reshape(len(spec.strides), -1, 2)
    network.set_anchors(tuple(tuple((float(w), float(h)) for w, h in level) for level in levels))
    shown = " | ".join(", ".join(f"{w:.0f}x{h:.0f}" for w, h in level) for level in levels)
    say(f"{told}; fitted ones reach {better:.4f}: {shown}")

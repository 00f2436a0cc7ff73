"""What a class is expected to gain as its detections are let in: `ap_curves`, freed of the chance of one sample.

A curve as measured rises in lumps, one for every true box that happened to be found, and in a class of few
boxes the lumps say more about the sample than about the class. Here the chance that a detection is right is a
logistic function of its score, with an offset, a slope and a bend that all classes share and each class's own
deviation from them, held near 0 by a normal prior: the fewer detections a class has, the more it is like all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from parkdet.submission.ap_curves import ApCurve, Matches

_OFFSET_DEVIATION = 1.0
"""Standard deviation of the prior of a class's own offset, in log odds."""
_SLOPE_DEVIATION = 0.3
_SHARED_DEVIATION = 30.0
"""Of what all classes share: next to no prior, but an optimum where every detection is wrong."""
_STEPS = 50


def expected_curves(matches: Matches) -> dict[int, ApCurve]:
    """The curves by category id, of the classes that have truth.

    The n best detections are expected to gain the sum of chance times precision over true boxes, the precision
    that of the chances so far. Half a true box is added to every class: a class of one may have been lucky.
    """
    counts = matches.truth_counts
    measured = np.flatnonzero(counts)
    own_places = {int(index): np.flatnonzero(matches.classes == index) for index in measured}
    values = {index: np.zeros(len(own) + 1) for index, own in own_places.items()}
    for threshold, outcome in matches.outcomes.items():
        chances = chances_right(matches.scores, matches.classes, outcome, len(counts))
        for index, own in own_places.items():
            precision = np.cumsum(chances[own]) / np.arange(1, len(own) + 1)
            gains = chances[own] * precision / (counts[index] + 0.5)
            values[index][1:] += matches.weights[threshold] / len(measured) * np.cumsum(gains)
    return {matches.category_ids[index]: ApCurve(matches.rows[own], values[index]) for index, own in own_places.items()}


def chances_right(
    scores: NDArray[np.float64], classes: NDArray[np.int64], outcome: NDArray[np.int8], class_count: int
) -> NDArray[np.float64]:
    """The chance (M,) that a detection of its score and class is right.

    `outcome` (M,): 1 right, 0 wrong, -1 neither, which teaches nothing.
    """
    if not len(scores):
        return np.zeros(0)
    inside = np.clip(scores, 1e-6, 1 - 1e-6)
    log_odds = np.log(inside / (1 - inside))
    x = (log_odds - log_odds.mean()) / (log_odds.std() or 1.0)
    design = np.zeros((len(x), 3 + 2 * class_count))
    design[:, 0], design[:, 1], design[:, 2] = 1.0, x, x * x
    rows = np.arange(len(x))
    design[rows, 3 + classes] = 1.0
    design[rows, 3 + class_count + classes] = x
    deviations = np.repeat([_SHARED_DEVIATION, _OFFSET_DEVIATION, _SLOPE_DEVIATION], [3, class_count, class_count])
    known = outcome >= 0
    weights = _most_likely(design[known], (outcome[known] == 1).astype(np.float64), deviations**-2.0)
    return _logistic(design @ weights)


def _most_likely(
    design: NDArray[np.float64], right: NDArray[np.float64], precisions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Maximum a posteriori of a logistic regression (N, P) under a normal prior around 0, by Newton's method."""
    weights = np.zeros(design.shape[1])
    loss = _loss(design, right, precisions, weights)
    for _ in range(_STEPS):
        chance = _logistic(design @ weights)
        gradient = design.T @ (right - chance) - precisions * weights
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + np.diag(precisions)
        step = np.linalg.solve(curvature, gradient)
        # The loss is convex; where a whole step overshoots, a part of it does not.
        for share in 0.5 ** np.arange(30):
            moved = _loss(design, right, precisions, weights + share * step)
            if moved <= loss:
                break
        else:
            return weights
        weights, gained, loss = weights + share * step, loss - moved, moved
        if gained <= 1e-9 * max(1.0, loss):
            break
    return weights


def _loss(
    design: NDArray[np.float64],
    right: NDArray[np.float64],
    precisions: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> float:
    log_odds = design @ weights
    return float(np.sum(np.logaddexp(0.0, log_odds) - right * log_odds) + 0.5 * np.sum(precisions * weights**2))


def _logistic(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(log_odds, -500, 500)))

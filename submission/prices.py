"""What the next bytes of a class buy, by score: the order in which classes give way when a file is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class PriceSteps:
    """One class: the score ranges of equal price, best first."""

    lower_scores: NDArray[np.float64]
    """(S,) descending: step i holds the scores from lower_scores[i] to, not including, lower_scores[i - 1]."""
    prices: NDArray[np.float64]
    """(S,) descending: what a byte buys there, in units of the metric. Below the last step it buys nothing."""

    def __post_init__(self) -> None:
        if len(self.lower_scores) != len(self.prices):
            raise ValueError(f"{len(self.lower_scores)} steps have {len(self.prices)} prices")
        if (
            (np.diff(self.lower_scores) >= 0).any()
            or (self.prices[1:] > self.prices[:-1]).any()
            or (self.prices < 0).any()
        ):
            raise ValueError("scores must descend, and prices descend to 0 or more")


class Prices:
    """The price steps of all classes, comparable with one another.

    A level is the rank of a price among all: 0 for what buys nothing, then higher for higher prices.
    A class without steps is of level 0 throughout.
    """

    def __init__(self, steps: Mapping[int, PriceSteps]) -> None:
        """`steps` by category id."""
        self.steps = dict(steps)
        positive = [step.prices[step.prices > 0] for step in steps.values()]
        distinct = np.unique(np.concatenate([np.zeros(0), *positive]))
        self._levels = {
            category_id: np.where(step.prices > 0, np.searchsorted(distinct, step.prices) + 1, 0).astype(np.int32)
            for category_id, step in steps.items()
        }

    def levels(self, table: pl.DataFrame) -> NDArray[np.int32]:
        """The level (N,) of every detection of a table with category_id and score."""
        category_ids, scores = table["category_id"].to_numpy(), table["score"].to_numpy()
        levels = np.zeros(table.height, np.int32)
        for category_id, step in self.steps.items():
            rows = np.flatnonzero(category_ids == category_id)
            # In ascending order the last lower score that is not above the score names the step.
            place = np.searchsorted(step.lower_scores[::-1], scores[rows].astype(np.float64), side="right") - 1
            ascending = self._levels[category_id][::-1]
            if len(ascending):
                levels[rows] = np.where(place >= 0, ascending[place], 0)
        return levels

    def thresholds(self, level: int, score: float) -> dict[int, float]:
        """By category: the score above which all is in, where the cut fell at this level and, within it, score."""
        found = {}
        for category_id, step in self.steps.items():
            levels = self._levels[category_id]
            whole, partial = step.lower_scores[levels > level], step.lower_scores[levels == level]
            # What is in whatever its price, and the score down to which this level reaches.
            upper = _below(whole[-1]) if len(whole) else 1.0
            lower = 0.0 if level == 0 else _below(partial[-1]) if len(partial) else upper
            found[category_id] = min(max(score, lower), upper)
        return found


def _below(score: float) -> float:
    """The next float32: scores are such numbers, so those above it are `score` and more."""
    return float(np.nextafter(np.float32(score), np.float32(-1)))

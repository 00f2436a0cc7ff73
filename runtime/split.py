"""The seeded split into training and validation images."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from parkdet.runtime.errors import DataError, UsageError

CONTEST_SEED = 100
CONTEST_COUNT = 3000
DEFAULT_FRACTION = 1 / 8


@dataclass(frozen=True, slots=True)
class Split:
    """Image ids of the two parts."""

    train_ids: tuple[int, ...]
    """In file order."""
    val_ids: tuple[int, ...]
    """In the order in which they were drawn."""


def split_ids(
    ids: Sequence[int],
    seed: int = CONTEST_SEED,
    count: int | None = None,
    fraction: float = DEFAULT_FRACTION,
) -> Split:
    """Draw the validation images: `random.Random(seed).sample(ids, n)`, ids in file order.

    n is `count`, or `fraction` of the images rounded down, at most 3,000 (the contest's number) and, from two
    images on, at least 1. Raises UsageError when `count` leaves no image to train on, or `fraction` is not in
    0 to 1; DataError when an id is there twice: it would train and validate at once.
    """
    ids = [int(image_id) for image_id in ids]
    if len(set(ids)) != len(ids):
        twice = next(image_id for image_id, times in Counter(ids).items() if times > 1)
        raise DataError(f"image id {twice} is there twice; give every image its own id, then split")
    if count is None:
        if not 0 <= fraction < 1:
            raise UsageError(f"a validation fraction of {fraction} cannot be; it must be in 0 to 1, below 1")
        count = min(CONTEST_COUNT, int(len(ids) * fraction))
        if count == 0 and len(ids) >= 2 and fraction > 0:
            count = 1
    elif not 0 <= count < max(len(ids), 1):
        raise UsageError(
            f"{count} validation images cannot be drawn from {len(ids)}; at least one image must be left to train on"
        )
    drawn = random.Random(seed).sample(ids, count)
    held_out = set(drawn)
    return Split(tuple(image_id for image_id in ids if image_id not in held_out), tuple(drawn))

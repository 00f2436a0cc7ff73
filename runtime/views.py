"""Test-time augmentation in numbers: the three views of a canvas and which heads each gives. Source: specification.

The views are made inside the graph (`export --tta`) or by torch (`train.model.tta`); this module says what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VIEW_PAD = 0.447
"""Value of the canvas (0 to 1) right of and below a scaled view: the mean of the public weights' training images."""


@dataclass(frozen=True, slots=True)
class View:
    """One look at the canvas: mirrored perhaps, then scaled; some of its heads are left out."""

    percent: int
    """The scale in hundredths: whole numbers, so that sizes come out alike in Python and in a graph."""
    mirrored: bool
    drops: Literal["coarsest", "finest"] | None
    """The level whose boxes another view sees better."""

    @property
    def scale(self) -> float:
        """What the view's boxes are divided by."""
        return self.percent / 100

    def levels(self, count: int) -> range:
        """The levels that are kept of `count`, finest first."""
        return range(1 if self.drops == "finest" else 0, count - 1 if self.drops == "coarsest" else count)

    def scaled(self, side: int) -> int:
        """Pixels of a canvas side once it is scaled."""
        return side * self.percent // 100

    def padded(self, side: int, stride: int) -> int:
        """Pixels of a canvas side once it is scaled and padded to a multiple of `stride`."""
        return (side * self.percent + 100 * stride - 1) // (100 * stride) * stride


FULL_VIEW = View(100, mirrored=False, drops=None)
"""What is looked at without test-time augmentation."""
TTA_VIEWS = (
    View(100, mirrored=False, drops="coarsest"),
    View(83, mirrored=True, drops=None),
    View(67, mirrored=False, drops="finest"),
)


@dataclass(frozen=True, slots=True)
class HeadSource:
    """Where one of a graph's raw heads comes from."""

    name: str
    """The graph's output: `head{level}`, with test-time augmentation `view{v}_head{level}`."""
    view: View
    level: int
    """Index in the model spec's strides and anchors."""


def head_sources(levels: int, tta: bool) -> tuple[HeadSource, ...]:
    """The raw heads of a graph with so many levels in the order of its outputs: view by view, finest level first."""
    if not tta:
        return tuple(HeadSource(f"head{level}", FULL_VIEW, level) for level in range(levels))
    return tuple(
        HeadSource(f"view{number}_head{level}", view, level)
        for number, view in enumerate(TTA_VIEWS)
        for level in view.levels(levels)
    )


def heads_of_first_views(levels: int, views: int) -> int:
    """How many of a test-time graph's heads, from the first on, are those of its first `views` views."""
    return sum(len(view.levels(levels)) for view in TTA_VIEWS[:views])

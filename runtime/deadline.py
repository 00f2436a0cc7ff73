"""Every image in time: which of several plans the next image is run by, from what images cost until now.

The plans are ordered from the best one to the cheapest. An image gets the current plan as long as all that come
after it can still be done by the next cheaper one; else the run steps down, and never up again: two plans that
share the images in that way use the time that there is. Seconds an image are measured between results as they come,
so decoding, post-processing and other programs on the machine are in them; the compiling of a graph for a canvas is
not, since it comes once. A plan that a decision would rest on and that was not yet run is tried on a few images first.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from parkdet.runtime.errors import UsageError

_MEASURED_MARGIN = 0.05
_GUESSED_MARGIN = 0.2
"""Share by which the images to come may be slower than those measured, or than the plans' costs let expect."""
_HORIZON = 0.1
"""Share of the time left over which a plan's speed is averaged: a short disturbance of a long run is no trend."""
_EVIDENCE = 0.02
"""Share of the time left over which a plan must have been measured before the run steps down from it for good."""
_TRIED = 0.01
"""The same of a plan to step down to."""


def parse_duration(text: str) -> float:
    """Seconds of `3h`, `1h30m`, `45m`, `90s` or a plain number of seconds. UsageError for anything else."""
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower())
    hours, minutes, rest = (float(part or 0) for part in parts.groups()) if parts else (0.0, 0.0, 0.0)
    seconds = 3600 * hours + 60 * minutes + rest
    if seconds <= 0:
        raise UsageError(f"'{text}' is no time span; write 3h, 1h30m, 45m or 90s")
    return seconds


@dataclass(slots=True)
class _Measured:
    """What is known of one plan."""

    cost: float
    handed_out: int = 0
    finished: int = 0
    seconds: float | None = None
    """An image, measured; None before."""
    evidence: float = 0.0
    """Seconds over which it was measured, as many as count."""
    cold: int = 0
    """Images whose canvas was new, or that waited for such a one: their time says nothing."""

    @property
    def in_progress(self) -> int:
        return self.handed_out - self.finished


@dataclass(slots=True)
class _Window:
    """A stretch of results of one plan, from which its speed is read."""

    plan: int = -1
    images: int = 0
    began: float = 0.0


@dataclass
class DeadlinePlanner:
    """Chooses the plan of every image (`pipeline.PlanChooser`). May be told of results by several threads."""

    costs: Sequence[float]
    """What an image costs the model by each plan, relative to one another, best plan first."""
    deadline: float
    """When the last result must be there, on the clock."""
    lanes: int = 1
    """Images in the model at once: their results come together."""
    clock: Callable[[], float] = time.monotonic
    reserve: float = 0.0
    """Seconds before the deadline that writing and ending take."""
    on_step: Callable[[int], None] = lambda _: None
    """Told the plan when it steps down."""
    current: int = 0
    """The plan in use."""
    _plans: list[_Measured] = field(init=False)
    _window: _Window = field(init=False, default_factory=_Window)
    _pace: float = field(init=False, default=1.0)
    """How slow the newest measurement was, relative to what is known: a plan that is tried then is not slow itself."""
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._plans = [_Measured(cost) for cost in self.costs]

    def next_plan(self, left: int) -> int | None:
        """See `PlanChooser.next_plan`: None when not even the cheapest plan has time for another image."""
        with self._lock:
            plan = self._choose(left)
            if plan is not None:
                self._plans[plan].handed_out += 1
            return plan

    def finished(self, plan: int, images: int, cold: bool = False) -> None:
        """See `PlanChooser.finished`."""
        with self._lock:
            self._plans[plan].finished += images
            now, window = self.clock(), self._window
            if cold:
                self._plans[plan].cold += images
                window.plan = -1
                return
            if window.plan != plan:
                # The first results bring the filling of the pipeline.
                self._window = _Window(plan, -self.lanes, now)
                window = self._window
            window.images += images
            if window.images <= 0:
                window.began = now
            elif window.images >= 2 * self.lanes:
                self._learn(plan, now - window.began, window.images)
                window.images, window.began = 0, now

    def _learn(self, plan: int, elapsed: float, images: int) -> None:
        learnt = self._plans[plan]
        if learnt.seconds is None:
            learnt.seconds, learnt.evidence = elapsed / images / self._pace, elapsed
            return
        time_left = self.deadline - self.reserve - self.clock()
        learnt.evidence = min(learnt.evidence + elapsed, max(_HORIZON * time_left, elapsed))
        if not elapsed or not learnt.seconds:
            return
        weight, pace = elapsed / learnt.evidence, elapsed / images / learnt.seconds
        # Speeds are averaged over the time. A machine that has become slower, or faster, has become so for every plan.
        drift = 1 / (1 - weight + weight / pace)
        self._pace = pace / drift
        for measured in self._plans:
            if measured.seconds is not None:
                measured.seconds *= drift

    def seconds_an_image(self, plan: int) -> float | None:
        """As measured, else from the nearest measured plan by what they cost; None before any was."""
        known = [index for index, measured in enumerate(self._plans) if measured.seconds is not None]
        if not known:
            return None
        nearest = min(known, key=lambda index: abs(index - plan))
        seconds = self._plans[nearest].seconds
        assert seconds is not None
        return seconds * self._plans[plan].cost / self._plans[nearest].cost

    def _choose(self, left: int) -> int | None:
        time_left = self.deadline - self.reserve - self.clock()
        if time_left <= 0:
            return None
        committed = sum((self.seconds_an_image(i) or 0.0) * plan.in_progress for i, plan in enumerate(self._plans))
        last = len(self._plans) - 1
        while True:
            own = self.seconds_an_image(self.current)
            if own is None:
                return self.current
            if self.current == last:
                return last if committed + own <= time_left else None
            rest = self.seconds_an_image(self.current + 1)
            assert rest is not None
            margin = _GUESSED_MARGIN if self._plans[self.current + 1].seconds is None else _MEASURED_MARGIN
            uncertain = self._plans[self.current].evidence < _EVIDENCE * time_left
            if uncertain or committed + own + (left - 1) * own * (1 + _MEASURED_MARGIN) <= time_left:
                return self.current  # the whole rest fits by the plan in use, or it is early to say
            if (trial := self._trial(time_left)) is not None:
                return trial
            if committed + own + (left - 1) * rest * (1 + margin) <= time_left:
                return self.current
            self.current += 1
            self.on_step(self.current)

    def _trial(self, time_left: float) -> int | None:
        """A plan that the decision rests on and that is not yet tried well: the next cheaper one, and the cheapest."""
        for plan in (self.current + 1, len(self._plans) - 1):
            measured = self._plans[plan]
            few = measured.handed_out - measured.cold < 3 * self.lanes + 1
            if few if measured.seconds is None else measured.evidence < _TRIED * time_left:
                return plan
        return None

"""A time budget: how long batches and validations take, and so where a stage must end for the run to end in time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from parkdet.runtime.errors import UsageError
from parkdet.train.schedule import Schedule

UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
FIRST_PLAN_BATCHES = 8
"""Batches that are measured before the first plan, after the ones below."""
COLD_BATCHES = 2
"""First batches of a session, which also load libraries and choose kernels: not measured."""
HORIZON = 100
"""Batches over which the measured time of one is averaged."""
MARGIN_SECONDS, MARGIN, MOST_MARGIN, MOST_SHARE = 10.0, 0.01, 60.0, 0.1
"""What is kept for the pictures at the end and what else is not measured: so many seconds and a share of the budget,
but no more than so many seconds and such a share."""
WORTH_SAYING = 0.02
"""A plan is changed upwards, and said, when its end moves by this share of itself."""


def parse_duration(text: str) -> float:
    """Seconds of `36h`, `90m`, `1h30m`, `45s` or a plain number of seconds. UsageError where it is something else."""
    cleaned = text.strip().lower().replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)(min|[dhms])?", cleaned)
    if (
        not parts
        or "".join(number + unit for number, unit in parts) != cleaned
        or (len(parts) > 1 and not parts[-1][1])
    ):
        raise UsageError(f"--time-budget '{text}': give a duration such as 36h, 90m or 1h30m")
    seconds = sum(float(number) * UNITS[unit or "s"] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"--time-budget '{text}': must be longer than nothing")
    return seconds


def duration(seconds: float) -> str:
    """`35 h 12 min`, `4 min 10 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


class TimeBudget:
    """The seconds that a run may take, and those it has taken: of this session and of those before it."""

    def __init__(self, seconds: float, used: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self._started = clock() - used

    def used(self) -> float:
        return self.clock() - self._started

    def left(self) -> float:
        return self.seconds - self.used()

    def add_used(self, seconds: float) -> None:
        """Count what an earlier session of the run took."""
        self._started -= seconds

    @property
    def margin(self) -> float:
        return min(MARGIN_SECONDS + MARGIN * self.seconds, MOST_MARGIN, MOST_SHARE * self.seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWork:
    """What a stage is to do by its recipe, in units that stages can be compared by."""

    epochs: int
    pixels_per_epoch: float
    """Images an epoch times the area of the canvas."""
    val_images: int
    val_period: int

    @property
    def pixels(self) -> float:
        return self.epochs * self.pixels_per_epoch


class StagePlanner:
    """Watches one stage and moves its end when the budget asks for it. Only rank 0 has one."""

    def __init__(
        self, budget: TimeBudget, schedule: Schedule, work: StageWork, later: tuple[StageWork, ...],
        say: Callable[[str], None],
    ):  # fmt: skip
        self.budget, self.schedule, self.work, self.later, self.say = budget, schedule, work, later, say
        self.recipe_end = schedule.settings.epochs * schedule.batches
        self.seconds_a_batch = 0.0
        self.seconds_a_validation: float | None = None
        self.seconds_a_save = 0.0
        self._batches = 0
        self._mark = budget.clock()
        self._said_end: int | None = None

    def start_clock(self) -> None:
        """The next batch begins now: what was before is not its time."""
        self._mark = self.budget.clock()

    def batch_done(self, step: int) -> int:
        """Batch `step` is done; returns where the stage should now end (a batch's number), which may be before it."""
        now = self.budget.clock()
        seconds, self._mark = now - self._mark, now
        self._batches += 1
        measured = self._batches - COLD_BATCHES
        if measured > 0:
            weight = 1 / min(measured, HORIZON)
            self.seconds_a_batch += weight * (seconds - self.seconds_a_batch)
        if measured < FIRST_PLAN_BATCHES:
            # Too early for a plan; but a budget that is over is over.
            if self._seconds_for(step + 1) > 0:
                return self.schedule.end_step
            left, done = duration(max(self.budget.left(), 0)), (step + 1) / self.schedule.batches
            self.say(
                f"time budget: {left} left of {duration(self.budget.seconds)}, which is too little for more; this "
                f"stage ends after {done:.3g} epochs in place of the recipe's {self.work.epochs}"
            )
            return step + 1
        end = self._fitting_end(step + 1)
        now_end = self.schedule.end_step
        # Of the plan, not of the recipe, which may be many times as long.
        slack = max(WORTH_SAYING * now_end, 1)
        # Ends move down at once, and up only when much time was gained.
        if end < now_end or end >= now_end + slack or (end == self.recipe_end and end != now_end):
            now_end = end
        self._say_plan(now_end)
        return now_end

    def validation_done(self, seconds: float) -> None:
        self.seconds_a_validation = max(seconds, self.seconds_a_validation or 0.0)
        self.start_clock()

    def save_done(self, seconds: float) -> None:
        self.seconds_a_save = max(seconds, self.seconds_a_save)
        self.start_clock()

    def _validation(self, work: StageWork) -> float:
        """Seconds of one validation: as measured, or as if an image took as long as one in training, which is more."""
        if self.seconds_a_validation is not None:
            return self.seconds_a_validation
        return work.val_images * self.seconds_a_batch / self.schedule.batch_size

    def _seconds_for(self, step: int) -> float:
        """Seconds left for this stage's batches from `step` on, and its validations within epochs."""
        ends = self._validation(self.work) + 2 * self.seconds_a_save
        ends += sum(self._validation(stage) + 2 * self.seconds_a_save for stage in self.later)
        left = self.budget.left() - self.budget.margin - ends
        own = (1 - self.schedule.progress(step)) * self.work.pixels
        later = sum(stage.pixels for stage in self.later)
        # A stage whose schedule is through has no claim to more.
        return left * own / (own + later) if own > 0 else 0.0

    def _fitting_end(self, step: int) -> int:
        each = self.seconds_a_batch
        if self.work.val_period:
            each += self._validation(self.work) / (self.work.val_period * self.schedule.batches)
        each += self.seconds_a_save / self.schedule.batches
        fitting = step + max(int(self._seconds_for(step) / max(each, 1e-9)), 0)
        return min(fitting, self.recipe_end)

    def _say_plan(self, end: int) -> None:
        batches, recipe = self.schedule.batches, self.work.epochs
        first = self._said_end is None
        if not first and abs(end - (self._said_end or 0)) < max(WORTH_SAYING * end, 1):
            return
        before, self._said_end = self._said_end, end
        pace = f"time budget: {self.seconds_a_batch:.3g} s a batch, {duration(self.budget.left())} left of "
        pace += duration(self.budget.seconds)
        if end == self.recipe_end:
            self.say(f"{pace}; the recipe's {recipe} epochs fit" + ("" if first else " again"))
            return
        was = f"{recipe} of the recipe" if first else f"{(before or 0) / batches:.1f} planned before"
        self.say(
            f"{pace}; this stage ends after {end / batches:.1f} epochs in place of the {was}, and its learning rate "
            "falls to its end by then"
        )

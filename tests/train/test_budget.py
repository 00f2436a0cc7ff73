"""Time budgets by a clock that the test moves: what fits, what is cut, how the rate falls, what is said."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from parkdet.runtime.errors import UsageError
from parkdet.train.budget import StagePlanner, StageWork, TimeBudget, duration, parse_duration
from parkdet.train.config import TrainSettings
from parkdet.train.schedule import Schedule

BATCHES = 200
IMAGES = 3200


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Played:
    """What a stage did, played through without a network."""

    rates: list[float]
    steps: int
    said: list[str] = field(default_factory=list)


def play(
    budget: TimeBudget,
    clock: Clock,
    settings: TrainSettings,
    seconds: Callable[[int], float],
    *,
    val_seconds: float = 30.0,
    later: tuple[StageWork, ...] = (),
) -> Played:
    """The loop's order of events, each of which moves the clock."""
    schedule = Schedule(settings, BATCHES)
    work = StageWork(
        epochs=settings.epochs, pixels_per_epoch=IMAGES * 640**2, val_images=400, val_period=settings.val_period
    )
    said: list[str] = []
    planner = StagePlanner(budget, schedule, work, later, said.append)
    rates: list[float] = []
    step = epoch = 0
    while step < schedule.end_step:
        planner.start_clock()
        for step in range(epoch * BATCHES, (epoch + 1) * BATCHES):
            rates.append(schedule.plan(step).lr)
            clock.now += seconds(step)
            end = planner.batch_done(step)
            if end != schedule.end_step:
                schedule.move_end(step + 1, end)
            if step + 1 >= schedule.end_step:
                break
        step += 1
        epoch += 1
        last = step >= schedule.end_step
        if last or (settings.val_period and epoch % settings.val_period == 0):
            clock.now += val_seconds
            planner.validation_done(val_seconds)
        clock.now += 1.0
        planner.save_done(1.0)
    return Played(rates, step, said)


def settings(**changes: object) -> TrainSettings:
    return TrainSettings.model_validate({"epochs": 50, "warmup_epochs": 3.0, "lrf": 0.01, **changes})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("36h", 129600), ("90m", 5400), ("1h30m", 5400), ("45", 45), ("45s", 45), ("1.5 h", 5400), ("2d", 172800),
     ("10min", 600), ("1H 5M 3S", 3903)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "36 hours", "-3h", "0", "1h30", "nan", "1e3", "3h x"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--time-budget"):
        parse_duration(text)


def test_durations_are_told_as_people_say_them() -> None:
    assert [duration(s) for s in (9.4, 61, 3600, 129599)] == ["9 s", "1 min 01 s", "1 h 00 min", "35 h 59 min"]


def test_a_budget_that_is_enough_changes_nothing() -> None:
    clock = Clock()
    wanted = settings()
    played = play(TimeBudget(50 * BATCHES * 1.0 + 51 * 31 + 200, clock=clock), clock, wanted, lambda _step: 1.0)
    plain = Schedule(wanted, BATCHES)
    assert played.rates == [plain.plan(step).lr for step in range(50 * BATCHES)]
    assert len(played.said) == 1
    assert "the recipe's 50 epochs fit" in played.said[0]


def falls_to_its_end(played: Played, wanted: TrainSettings) -> None:
    """After the warm-up the rate only falls, and its last value is the recipe's last, within a batch's fall."""
    peak = played.rates.index(max(played.rates))
    falling = played.rates[peak:]
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert falling[-1] < wanted.lr0 * (wanted.lrf + 0.02)
    assert max(falling) > 0.8 * wanted.lr0


@pytest.mark.parametrize("cos_lr", [False, True])
@pytest.mark.parametrize("hours", [0.3, 1.0, 2.5])
def test_epochs_that_do_not_fit_are_cut_and_the_rate_falls_all_the_way(hours: float, cos_lr: bool) -> None:
    clock, seconds = Clock(), hours * 3600
    start, wanted = clock.now, settings(cos_lr=cos_lr)
    played = play(TimeBudget(seconds, clock=clock), clock, wanted, lambda _step: 1.0)
    assert 0.9 * seconds < clock.now - start <= seconds
    assert played.steps < 50 * BATCHES
    falls_to_its_end(played, wanted)
    assert "in place of the 50 of the recipe" in played.said[0]
    assert len(played.said) < 6


def test_a_machine_that_slows_down_is_planned_for_again() -> None:
    clock, seconds = Clock(), 2 * 3600.0
    start, wanted = clock.now, settings()
    played = play(TimeBudget(seconds, clock=clock), clock, wanted, lambda step: 1.0 if step < 2000 else 3.0)
    assert 0.9 * seconds < clock.now - start <= seconds
    falls_to_its_end(played, wanted)
    assert any("planned before" in line for line in played.said)


def test_a_machine_that_gets_faster_trains_longer_but_never_longer_than_the_recipe() -> None:
    clock, seconds = Clock(), 2 * 3600.0
    start, wanted = clock.now, settings()
    played = play(TimeBudget(seconds, clock=clock), clock, wanted, lambda step: 1.0 if step < 2000 else 0.5)
    assert 0.9 * seconds < clock.now - start <= seconds
    assert played.steps > 7000
    falls_to_its_end(played, wanted)
    clock = Clock()
    played = play(TimeBudget(seconds, clock=clock), clock, wanted, lambda step: 1.0 if step < 500 else 0.1)
    assert played.steps == 50 * BATCHES
    falls_to_its_end(played, wanted)


@pytest.mark.parametrize("epochs", [80, 300, 3000])
def test_however_long_the_recipe_is_time_that_is_gained_is_used(epochs: int) -> None:
    clock, seconds = Clock(), 3600.0
    start, wanted = clock.now, settings(epochs=epochs)
    played = play(TimeBudget(seconds, clock=clock), clock, wanted, lambda step: 1.6 if step < 300 else 0.9)
    assert 0.93 * seconds < clock.now - start <= seconds
    falls_to_its_end(played, wanted)
    assert any("planned before" in line for line in played.said)
    assert len(played.said) < 30


def test_less_than_an_epoch_still_anneals() -> None:
    clock = Clock()
    start, wanted = clock.now, settings()
    played = play(TimeBudget(120, clock=clock), clock, wanted, lambda _step: 1.0, val_seconds=5.0)
    assert clock.now - start <= 120
    assert 60 < played.steps < BATCHES
    assert played.rates[-1] < 0.05 * wanted.lr0
    # The warm-up is shortened too, or the rate would never have risen.
    assert max(played.rates) > 0.6 * wanted.lr0


def test_a_budget_that_is_over_ends_the_stage_after_a_batch() -> None:
    clock = Clock()
    budget = TimeBudget(10, clock=clock)
    clock.now += 11
    played = play(budget, clock, settings(), lambda _step: 1.0)
    assert played.steps == 1
    assert played.said == [
        "time budget: 0 s left of 10 s, which is too little for more; this stage ends after 0.005 epochs in place of "
        "the recipe's 50"
    ]


def test_a_later_stage_gets_its_share() -> None:
    clock, seconds = Clock(), 3600.0
    start = clock.now
    first, second = settings(epochs=50, val_period=0), settings(epochs=15, lr0=0.0032, lrf=0.12, val_period=0)
    budget = TimeBudget(seconds, clock=clock)
    tuning = StageWork(epochs=15, pixels_per_epoch=IMAGES * 640**2, val_images=400, val_period=0)
    play(budget, clock, first, lambda _step: 1.0, later=(tuning,))
    used = clock.now - start
    assert used == pytest.approx(seconds * 50 / 65, rel=0.05)
    played = play(budget, clock, second, lambda _step: 1.0)
    assert 0.9 * seconds < clock.now - start <= seconds
    assert played.rates[-1] == pytest.approx(0.0032 * 0.12, rel=0.1)


def test_time_of_an_earlier_session_counts() -> None:
    clock = Clock()
    budget = TimeBudget(100, clock=clock)
    budget.add_used(60)
    clock.now += 10
    assert (budget.used(), budget.left()) == (70, 30)


def test_a_schedule_that_was_moved_is_restored() -> None:
    schedule = Schedule(settings(), BATCHES)
    schedule.move_end(300, 4000)
    schedule.move_end(900, 3000)
    again = Schedule(settings(), BATCHES)
    again.load_state(schedule.state())
    for step in range(900, 3000, 7):
        assert again.plan(step) == schedule.plan(step)
    assert again.end_step == 3000

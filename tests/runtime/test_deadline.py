"""The deadline: plans by the time that is left, on a clock and a slow backend of the test's own."""

from __future__ import annotations

from collections import Counter, deque

import pytest

from parkdet.runtime.deadline import DeadlinePlanner, parse_duration
from parkdet.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h", 10800), ("1h30m", 5400), ("45m", 2700), ("90s", 90), ("90", 90), (" 2.5H ", 9000), ("1h0m1s", 3601)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-3h", "3 hours", "h", "3d", "nan", "inf", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="no time span"):
        parse_duration(text)


class Machine:
    """Runs images as the planner says, `lanes` at a time, `ahead` of them handed out before their turn."""

    def __init__(self, seconds: list[float], deadline: float, lanes: int = 1, ahead: int = 6) -> None:
        self.now = 0.0
        self.seconds = list(seconds)
        self.ahead = ahead
        self.lanes = lanes
        self.costs = [s / seconds[-1] for s in seconds]
        self.planner = DeadlinePlanner(self.costs, deadline, lanes, clock=lambda: self.now)
        self.done: list[int] = []
        self.currents: list[int] = []
        self.busy_from = float("inf")
        """For a minute from here on, another program has most of the machine."""
        self.compiles: tuple[float, int] | None = None
        """Seconds that the first image of a canvas costs in a plan, and how many canvases come in turn."""
        self.met: set[tuple[int, int]] = set()

    def run(self, images: int, slower_after: int | None = None) -> Counter[int]:
        waiting: deque[int] = deque()
        handed_out = 0
        while True:
            while handed_out < images and len(waiting) < self.ahead:
                plan = self.planner.next_plan(images - handed_out)
                self.currents.append(self.planner.current)
                if plan is None:
                    break
                waiting.append(plan)
                handed_out += 1
            if not waiting:
                return Counter(self.done)
            together: list[tuple[int, bool]] = []
            for _ in range(min(self.lanes, len(waiting))):
                plan = waiting.popleft()
                busy = self.busy_from <= self.now < self.busy_from + 60
                self.now += self.seconds[plan] * (6 if busy else 1)
                cold = False
                if self.compiles is not None:
                    seconds, canvases = self.compiles
                    cold = (plan, len(self.done) % canvases) not in self.met
                    self.met.add((plan, len(self.done) % canvases))
                    self.now += seconds * cold
                self.done.append(plan)
                together.append((plan, cold))
            for plan, cold in together:
                self.planner.finished(plan, 1, cold)
            if slower_after is not None and len(self.done) >= slower_after:
                self.seconds = [2 * s for s in self.seconds]
                slower_after = None


PLANS = [2.14, 1.69, 1.0, 0.5]


def test_no_plan_is_needed_for_no_image() -> None:
    assert Machine(PLANS, 1.0).run(0) == Counter()


@pytest.mark.parametrize("lanes", [1, 3])
def test_time_enough_for_all_by_the_best_plan(lanes: int) -> None:
    machine = Machine(PLANS, 100 * 2.14 * 1.1, lanes)
    assert machine.run(100) == {0: 100}


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("share", [0.98, 0.9, 0.75, 0.6, 0.45, 0.35, 0.28])
def test_a_deadline_that_is_too_short_for_the_best_plan_is_kept_by_cheaper_ones(lanes: int, share: float) -> None:
    images = 400
    machine = Machine(PLANS, images * PLANS[0] * share, lanes)
    plans = machine.run(images)
    assert plans.total() == images
    assert machine.now <= machine.planner.deadline
    # And it is used: the next better plan for all would not have fitted.
    assert machine.now >= 0.85 * machine.planner.deadline
    worst = max(plan for plan, count in plans.items() if count > 12)
    assert images * PLANS[worst] <= machine.planner.deadline * 1.05


def test_a_machine_that_becomes_slower_makes_it_step_down_further() -> None:
    images = 400
    machine = Machine(PLANS, images * PLANS[1])
    plans = machine.run(images, slower_after=100)
    assert plans.total() == images
    assert machine.now <= machine.planner.deadline
    assert plans[3] > 100


def test_costs_that_were_guessed_wrongly_are_measured_before_they_are_relied_on() -> None:
    images = 400
    machine = Machine(PLANS, images * 1.2)
    machine.seconds[3] = 0.9  # decoding sets the pace: the small canvas saves next to nothing
    plans = machine.run(images)
    assert plans.total() == images
    assert machine.now <= machine.planner.deadline


def test_a_deadline_that_no_plan_keeps_gets_what_fits_and_not_more() -> None:
    machine = Machine(PLANS, 150.0)  # all of them by the cheapest plan take 200
    plans = machine.run(400)
    assert machine.now <= 150.0
    assert 240 < plans.total() < 300
    assert plans[3] > plans.total() - 30


def test_a_deadline_that_is_over_hands_out_nothing() -> None:
    machine = Machine(PLANS, 0.0)
    assert machine.run(5) == Counter()


def test_it_never_steps_up_again() -> None:
    images = 300
    machine = Machine(PLANS, images * 1.3)
    machine.run(images)
    assert machine.currents == sorted(machine.currents)
    assert machine.currents[-1] > 0


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("canvases", [1, 6])
def test_compiling_is_not_taken_for_slowness(lanes: int, canvases: int) -> None:
    """Once a canvas, and far longer than an image: a run of hours that has time for the best plan keeps it."""
    images = 5_000
    machine = Machine([0.5, 0.4, 0.2], images * 0.5 * 1.15, lanes)
    machine.compiles = (15.0, canvases)
    assert machine.run(images) == {0: images}


@pytest.mark.parametrize("canvases", [1, 6])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.55])
def test_a_deadline_that_is_too_short_is_kept_where_graphs_are_compiled_too(canvases: int, share: float) -> None:
    images = 5_000
    machine = Machine([0.5, 0.4, 0.2], images * 0.5 * share)
    machine.compiles = (15.0, canvases)
    plans = machine.run(images)
    assert plans.total() == images
    assert 0.85 * machine.planner.deadline <= machine.now <= machine.planner.deadline


@pytest.mark.parametrize("busy_from", [0.0, 20.0, 1_500.0])
def test_a_short_disturbance_of_a_long_run_is_no_trend(busy_from: float) -> None:
    images = 20_000
    machine = Machine([0.5, 0.4, 0.2], images * 0.5 * 1.15, lanes=2)
    machine.busy_from = busy_from
    plans = machine.run(images)
    assert plans.total() == images
    assert plans[0] >= images - 200

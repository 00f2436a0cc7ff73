"""results.csv and the progress lines: what YOLOv5's users and their scripts find there."""

from __future__ import annotations

import csv
import io
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from parkdet.runtime.evaluation import Evaluation
from parkdet.train.run_log import EpochLine, ResultsFile
from parkdet.train.validate import Validation

# The names and their order are those of YOLOv5's results.csv.
YOLOV5_HEADER = (
    "epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
    "metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2"
)
YOLOV5_COLUMNS = tuple(YOLOV5_HEADER.split(","))


def validation(map50: float = 0.625) -> Validation:
    evaluation = Evaluation(
        map=0.5, map50=map50, map75=0.25, map_small=math.nan, map_medium=0.1, map_large=0.2, precision=0.75,
        recall=0.125, confidence=0.3, images=4, truths=9, max_det=50, per_class=(),
    )  # fmt: skip
    return Validation(evaluation=evaluation, losses=(0.01, 0.02, 0.03), unreadable=())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_an_epoch_under_yolov5s_columns(tmp_path: Path) -> None:
    path = tmp_path / "run" / "stage" / "results.csv"
    results = ResultsFile(path)
    results.add(0, (0.1, 0.2, 0.3), None, (0.1, 0.01, 0.001))
    row = results.add(1, (1 / 3, 2.0, 0.0), validation(), (0.05, 0.02, 0.02))
    assert path.read_text().splitlines()[0] == f"{YOLOV5_HEADER},metrics/mAP_0.75"
    first, second = rows_of(path)
    assert [first[name] for name in YOLOV5_COLUMNS] == [
        "0", "0.1", "0.2", "0.3", "", "", "", "", "", "", "", "0.1", "0.01", "0.001",
    ]  # fmt: skip
    assert [second[name] for name in YOLOV5_COLUMNS] == [
        "1", "0.333333", "2", "0", "0.75", "0.125", "0.625", "0.5", "0.01", "0.02", "0.03", "0.05", "0.02", "0.02",
    ]  # fmt: skip
    assert row["metrics/mAP_0.5"] == 0.625
    assert (first["metrics/mAP_0.75"], second["metrics/mAP_0.75"]) == ("", "0.25")
    assert row["train/box_loss"] == 1 / 3


def test_a_resumed_run_writes_its_epochs_once(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "results.csv")
    results.keep_before(3)  # nothing yet
    assert not results.path.exists()
    for epoch in range(12):
        results.add(epoch, (epoch, 0, 0), None, (0, 0, 0))
    results.keep_before(11)
    assert [row["epoch"] for row in rows_of(results.path)] == [str(n) for n in range(11)]
    results.add(11, (99, 0, 0), None, (0, 0, 0))
    rows = rows_of(results.path)
    assert [row["epoch"] for row in rows] == [str(n) for n in range(12)]
    assert rows[11]["train/box_loss"] == "99"
    results.keep_before(0)
    assert results.path.read_text().splitlines() == [f"{YOLOV5_HEADER},metrics/mAP_0.75"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


@pytest.mark.parametrize("torn", ["1", "12,0.1", "\x00\x00", ""])
def test_a_row_that_a_kill_cut_off_goes(tmp_path: Path, torn: str) -> None:
    results = ResultsFile(tmp_path / "results.csv")
    for epoch in range(2):
        results.add(epoch, (0, 0, 0), None, (0, 0, 0))
    with results.path.open("a") as file:
        file.write(torn)
    results.keep_before(12)
    results.add(12, (0, 0, 0), None, (0, 0, 0))
    assert [row["epoch"] for row in rows_of(results.path)] == ["0", "1", "12"]


def test_an_empty_file_gets_its_header(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "results.csv")
    results.path.touch()
    results.keep_before(0)
    results.add(0, (0, 0, 0), None, (0, 0, 0))
    assert [row["epoch"] for row in rows_of(results.path)] == ["0"]


@contextmanager
def short_files(most_bytes: int) -> Iterator[None]:
    """The system refuses to write files that are longer, as a full disk would, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress lines see: a list of one number."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def show(monkeypatch: pytest.MonkeyPatch, clock: list[float], terminal: bool) -> str:
    """An epoch of 30 batches, a second each."""
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    line = EpochLine(2, 10, 30)
    for batch in range(1, 31):
        clock[0] += 1
        line.update(batch, (0.012345, 1.5, 0.0), 7, 64)
    return screen.getvalue()


def test_a_terminal_sees_one_line_rewritten(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    text = show(monkeypatch, clock, terminal=True)
    header, line = text.strip("\n").split("\n")
    assert header.split() == ["Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size"]
    states = line.split("\r")[1:]
    assert len(states) == 30
    assert states[-1].split() == ["2/9", "0G", "0.01235", "1.5", "0", "7", "64", "30/30", "30s"]
    assert text.endswith("\n")


def test_elsewhere_plain_lines_come_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    text = show(monkeypatch, clock, terminal=False)
    assert "\r" not in text
    _, *lines = text.strip("\n").split("\n")
    assert [line.split()[-2:] for line in lines] == [["10/30", "10s"], ["20/30", "20s"], ["30/30", "30s"]]


def test_a_short_epoch_has_its_last_line(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = Screen(False)
    monkeypatch.setattr(sys, "stderr", screen)
    EpochLine(0, 1, 1).update(1, (1.0, 1.0, math.nan), 0, 64)
    assert screen.getvalue().splitlines()[-1].split()[-2:] == ["1/1", "0s"]
    assert clock == [100.0]


def test_events_hold_the_rows_of_results(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from parkdet.train.run_log import EventsFile

    events = EventsFile(tmp_path, 0, print)
    events.add({"epoch": 0.0, "train/box_loss": 0.5, "x/lr0": 0.1})
    events.add({"epoch": 1.0, "train/box_loss": 0.25})
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/box_loss")] == [(0, 0.5), (1, 0.25)]
    assert [event.step for event in read.Scalars("x/lr0")] == [0]


def test_a_resumed_run_takes_the_place_of_what_the_stopped_one_drew(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from parkdet.train.run_log import EventsFile

    stopped = EventsFile(tmp_path, 0, print)
    for epoch in range(3):
        stopped.add({"epoch": float(epoch), "x/lr0": 1.0})
    EventsFile(tmp_path, 2, print).add({"epoch": 2.0, "x/lr0": 0.5})
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("x/lr0")] == [(0, 1.0), (1, 1.0), (2, 0.5)]


def test_events_that_cannot_be_written_are_said_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from parkdet.train.run_log import EventsFile

    said: list[str] = []
    events = EventsFile(tmp_path, 0, said.append)
    events.add({"epoch": 0.0, "x/lr0": 0.1})
    with short_files(events.path.stat().st_size + 10):
        events.add({"epoch": 1.0, "x/lr0": 0.1})
        events.add({"epoch": 2.0, "x/lr0": 0.1})
    events.add({"epoch": 3.0, "x/lr0": 0.1})
    (line,) = said
    assert "File too large" in line and str(events.path) in line
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("x/lr0")] == [0]

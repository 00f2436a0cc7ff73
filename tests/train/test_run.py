"""A whole run: sizes that do not fit, one image, folders that are used again, what a resumed run needs."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.runtime.errors import ArtifactError, DataError, Interrupted, ParkdetError, UsageError
from parkdet.runtime.settings import dump_settings, load_settings
from parkdet.train import load_checkpoint, loop, save_checkpoint
from parkdet.train.budget import TimeBudget
from parkdet.train.config import load_recipe
from parkdet.train.interrupt import StopSwitch
from parkdet.train.learner import Learner
from parkdet.train.loop import StageTrainer
from parkdet.train.model.network import build_network
from parkdet.train.run import RunSettings, resume_run, start_run, whole_cells
from parkdet.train.validate import validate

TINY = ("imgsz=64", "batch_size=4", "epochs=1", "cache=none", "precision=fp32", "mosaic=0.0")


def write_data(root: Path, count: int, categories: tuple[int, ...] = (9, 4)) -> Path:
    """`count` images of 40 x 60; their categories' ids have gaps and no order."""
    (root / "train" / "images").mkdir(parents=True)
    (root / "train" / "label").mkdir()
    images, annotations = [], []
    for number in range(count):
        name = f"사진 {number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        (root / "train" / "images" / name).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        images.append({"id": number + 1, "file_name": name})
        annotations.append(
            {"id": number + 1, "image_id": number + 1, "category_id": categories[number % len(categories)],
             "bbox": [5, 5, 30, 20]}
        )  # fmt: skip
    entries = [{"id": category, "name": f"class {category}"} for category in categories]
    content = {"images": images, "annotations": annotations, "categories": entries}
    (root / "train" / "label" / "Train.json").write_text(json.dumps(content))
    return root


def run_settings(data: Path, *overrides: str) -> RunSettings:
    return RunSettings(
        data=str(data), device="cpu", workers=0, plots=False, recipe=load_recipe("small", (*TINY, *overrides))
    )


def started(folder: Path, settings: RunSettings) -> tuple[Path, str]:
    said: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    return start_run(folder, settings, said.append), "\n".join(said)


def test_sizes_are_rounded_up_to_whole_cells() -> None:
    # What YOLOv5's check_img_size gives with a floor of two strides.
    for imgsz, stride, expected in ((640, 32, 640), (641, 32, 672), (1, 32, 64), (64, 64, 128), (1536, 64, 1536)):
        assert whole_cells(imgsz, stride) == expected


def test_a_size_that_does_not_fit_is_rounded_and_said(tmp_path: Path) -> None:
    best, said = started(tmp_path / "run", run_settings(write_data(tmp_path / "data", 6), "imgsz=70"))
    assert "imgsz 70 becomes 96" in said
    assert load_checkpoint(best).spec.imgsz == 96


def test_one_image_trains_and_nothing_is_validated(tmp_path: Path) -> None:
    best, said = started(tmp_path / "run", run_settings(write_data(tmp_path / "data", 1)))
    assert "1 images with 1 boxes to train, 0 to validate" in said
    assert "warning: there is no image to validate on" in said
    assert best.is_file()
    row = (tmp_path / "run" / "results.csv").read_text().splitlines()[1].split(",")
    assert row[4:11] == [""] * 7


def test_categories_with_gaps_come_through(tmp_path: Path) -> None:
    best, _ = started(tmp_path / "run", run_settings(write_data(tmp_path / "data", 6)))
    spec = load_checkpoint(best).spec
    assert dict(zip(spec.category_ids, spec.class_names, strict=True)) == {4: "class 4", 9: "class 9"}


def test_one_class_trains(tmp_path: Path) -> None:
    best, _ = started(tmp_path / "run", run_settings(write_data(tmp_path / "data", 5, categories=(7,))))
    assert load_checkpoint(best).spec.category_ids == (7,)
    assert (tmp_path / "run" / "results.csv").read_text().splitlines()[1].split(",")[3] == "0"


def test_stages_of_a_fresh_folder_each_write_their_own(tmp_path: Path) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text("base: small.yaml\nstages:\n- {name: a}\n- {name: b, lr0: 0.001}\n")
    settings = run_settings(write_data(tmp_path / "data", 6))
    settings = settings.model_copy(update={"recipe": load_recipe(str(recipe), TINY)})
    best, said = started(tmp_path / "run", settings)
    assert best == tmp_path / "run" / "b" / "weights" / "best.pt"
    for stage in "ab":
        assert len((tmp_path / "run" / stage / "results.csv").read_text().splitlines()) == 2
    assert f"tensors from {tmp_path / 'run' / 'a' / 'weights' / 'last.pt'}" in said


def test_a_folder_used_again_begins_anew(tmp_path: Path) -> None:
    settings = run_settings(write_data(tmp_path / "data", 6))
    best, _ = started(tmp_path / "run", settings)
    first = best.read_bytes()
    again, said = started(tmp_path / "run", settings.model_copy(
        update={"recipe": load_recipe("small", (*TINY, "train.seed=1", "epochs=2"))}
    ))  # fmt: skip
    assert again == best
    assert "going on" not in said
    assert best.read_bytes() != first
    assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 3


def test_weights_that_the_run_would_write_over_are_left_alone(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 6)
    best, _ = started(tmp_path / "run", run_settings(data))
    before = best.read_bytes()
    with pytest.raises(UsageError, match="another --name"):
        started(tmp_path / "run", run_settings(data, f"weights='{best}'"))
    assert best.read_bytes() == before


def stop_after_one_epoch(folder: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    train_epoch = StageTrainer._train_epoch

    def stopping(self: StageTrainer, stop: StopSwitch) -> None:
        if self.epoch == 1:
            self._interrupt()
        train_epoch(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_train_epoch", stopping)
        with pytest.raises(Interrupted):
            started(folder, settings)


def test_a_resumed_run_needs_nothing_but_its_folder_and_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data", 6)
    weights = tmp_path / "start.pt"
    # Other layers than the recipe names: the file's are trained, and resumed.
    save_checkpoint(weights, build_network("yolov5n6", ["x"], 64))
    stop_after_one_epoch(tmp_path / "run", run_settings(data, "epochs=2", f"weights='{weights}'"), monkeypatch)
    weights.unlink()
    monkeypatch.chdir(tmp_path / "run" / "weights")
    said: list[str] = []
    with pytest.raises(UsageError, match="not a training run"):
        resume_run(tmp_path / "run" / "nothing", said.append)
    best = resume_run(Path("last.pt"), said.append)
    assert "going on in epoch 1 at batch 0" in said
    assert len(load_checkpoint(best).spec.strides) == 4
    with pytest.raises(UsageError, match="is finished"):
        resume_run(tmp_path / "run", said.append)


def test_other_classes_are_not_resumed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", 6)
    stop_after_one_epoch(tmp_path / "run", run_settings(data, "epochs=2"), monkeypatch)
    labels = data / "train" / "label" / "Train.json"
    labels.write_text(labels.read_text().replace("class 9", "class nine"))
    with pytest.raises(DataError, match=r"last\.pt.*class 9.*class nine"):
        resume_run(tmp_path / "run", lambda _line: None)


def test_a_run_that_had_saved_nothing_begins_anew_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.yaml").write_text(dump_settings(run_settings(write_data(tmp_path / "data", 7))))
    said: list[str] = []
    assert resume_run(folder, said.append).is_file()
    assert said[1] == "nothing was saved before it was stopped: it begins anew"


def test_a_data_set_that_moved_is_resumed_with_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = write_data(tmp_path / "data", 7), tmp_path / "run"
    stop_after_one_epoch(folder, run_settings(data, "epochs=2"), monkeypatch)
    moved = data.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="--data"):
        resume_run(folder, lambda _line: None)
    labels = moved / "train" / "label" / "Train.json"
    content = json.loads(labels.read_text())
    last = folder / "weights" / "last.pt"
    for change in ("a box that moved", "an image fewer"):
        other = json.loads(labels.read_text())
        if change == "a box that moved":
            other["annotations"][0]["bbox"][0] += 1
        else:  # two batches an epoch as before: six images train, now five
            other["images"].pop()
        labels.write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"elsewhere: is not the data set that .*last\.pt was trained on"):
            resume_run(folder, lambda _line: None, data_folder=moved)
        assert not load_checkpoint(last).training.get("finished")
        labels.write_text(json.dumps(content))
    assert resume_run(folder, lambda _line: None, data_folder=moved, workers=1, plots=False).is_file()
    settings = load_settings(RunSettings, folder / "args.yaml")
    # Where the data lie holds for sessions to come, the rest for this one.
    assert (settings.data, settings.workers) == (str(moved), 0)


def test_a_data_set_that_changed_between_stages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text("base: small.yaml\nstages:\n- {name: a}\n- {name: b}\n")
    settings = run_settings(write_data(tmp_path / "data", 7))
    settings = settings.model_copy(update={"recipe": load_recipe(str(recipe), TINY)})

    def stopping(trainer: StageTrainer) -> None:
        finish(trainer)
        raise Interrupted

    finish = StageTrainer._finish
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_finish", stopping)
        with pytest.raises(Interrupted):
            started(tmp_path / "run", settings)
    labels = tmp_path / "data" / "train" / "label" / "Train.json"
    labels.write_text(labels.read_text().replace("[5, 5, 30, 20]", "[5, 5, 30, 21]"))
    with pytest.raises(DataError, match=r"a/weights/last\.pt was trained on"):
        resume_run(tmp_path / "run", lambda _line: None)
    assert not (tmp_path / "run" / "b").exists()


def test_weights_without_a_state_are_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    stop_after_one_epoch(folder, run_settings(write_data(tmp_path / "data", 7), "epochs=2"), monkeypatch)
    (folder / "weights" / "last.pt").write_bytes((folder / "weights" / "best.pt").read_bytes())
    with pytest.raises(ArtifactError, match=r"last\.pt: holds weights, but no state to go on from"):
        resume_run(folder, lambda _line: None)


def test_settings_that_were_edited_are_named_unless_they_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    stop_after_one_epoch(folder, run_settings(write_data(tmp_path / "data", 7), "epochs=2"), monkeypatch)
    args = folder / "args.yaml"
    before = args.read_text()
    args.write_text(before.replace("optimizer: AdamW", "optimizer: SGD").replace("epochs: 2", "epochs: 5"))
    with pytest.raises(UsageError, match=r"args\.yaml: epochs is 5 and was 2; optimizer is 'SGD' and was 'AdamW' when"):
        resume_run(folder, lambda _line: None)
    args.write_text(before.replace("cache: none", "cache: ram").replace("patience: 100", "patience: 7"))
    assert args.read_text() != before
    assert resume_run(folder, lambda _line: None).is_file()


def test_a_killed_worker_is_named_and_the_run_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does it where memory is short."""
    folder = tmp_path / "run"
    settings = run_settings(write_data(tmp_path / "data", 14), "epochs=3", "batch_size=2", "save_minutes=0.0001")
    take_in = Learner.take_in

    def killing(learner: Learner, *batch: Any) -> Any:
        if batch[3] == 3:
            for worker in multiprocessing.active_children():
                worker.kill()
        return take_in(learner, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "take_in", killing)
        with pytest.raises(ParkdetError, match=rf"loads images has ended[^\n]*\(pid.*\n.*--resume {folder} --workers"):
            started(folder, settings.model_copy(update={"workers": 2}))
    assert multiprocessing.active_children() == []
    assert load_checkpoint(resume_run(folder, lambda _line: None)).spec.imgsz == 64


class StepClock:
    """A clock that a training moves: two seconds a batch, three a validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        take_in, measure = Learner.take_in, validate

        def taking_in(learner: Learner, *batch: Any) -> Any:
            self.now += 2
            return take_in(learner, *batch)

        def measuring(*arguments: Any, **options: Any) -> Any:
            self.now += 3
            return measure(*arguments, **options)

        monkeypatch.setattr(Learner, "take_in", taking_in)
        monkeypatch.setattr(loop, "validate", measuring)

    def __call__(self) -> float:
        return self.now


def test_a_time_budget_spans_stages_and_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text("base: small.yaml\nstages:\n- {name: a, epochs: 30}\n- {name: b, epochs: 10, lr0: 0.001}\n")
    # Seven images train and one validates: two batches an epoch. By the recipe 40 epochs and 163 seconds.
    settings = run_settings(write_data(tmp_path / "data", 8)).model_copy(
        update={"recipe": load_recipe(str(recipe), (*TINY[:2], *TINY[3:], "val_period=0", "warmup_epochs=0.0"))}
    )
    clock = StepClock(monkeypatch)
    said: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()

    interrupted: list[float] = []

    def stopping(trainer: StageTrainer, stop: StopSwitch) -> None:
        if trainer.epoch == 9 and not interrupted:
            interrupted.append(clock.now)
            trainer._interrupt()
        train_epoch(trainer, stop)

    train_epoch = StageTrainer._train_epoch
    monkeypatch.setattr(StageTrainer, "_train_epoch", stopping)
    with pytest.raises(Interrupted):
        start_run(folder, settings, said.append, budget=TimeBudget(100, clock=clock))
    assert "30 of the recipe" in "\n".join(said)
    clock.now += 10_000  # what lies between two sessions does not count
    resumed_at = clock.now
    best = resume_run(folder, said.append, budget=TimeBudget(100, clock=clock))
    used = interrupted[0] + clock.now - resumed_at
    assert 80 < used <= 100
    rows = {
        stage: [row.split(",") for row in (folder / stage / "results.csv").read_text().splitlines()[1:]]
        for stage in "ab"
    }
    assert len(rows["a"]) < 30 and len(rows["b"]) < 10
    assert len(rows["a"]) > 2 * len(rows["b"])
    # Both annealed: the last rate of a stage is near its lr0 * lrf.
    assert float(rows["a"][-1][13]) < 0.08 * 0.01
    assert float(rows["b"][-1][13]) < 0.2 * 0.001
    assert load_checkpoint(best).training["used_seconds"] == pytest.approx(used, abs=4)
    assert said[-1].startswith("time budget: 1 min")
    # The budget that a session was given holds for the next ones.
    assert "time_budget: 100" in (folder / "args.yaml").read_text()


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", 6)
    stop_after_one_epoch(tmp_path / "run", run_settings(data, "epochs=3"), monkeypatch)
    last = tmp_path / "run" / "weights" / "last.pt"
    before = last.read_bytes()
    # A kill within a save leaves this; the next session takes it away.
    (last.parent / ".last.pt.12345.tmp").write_bytes(b"half")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        again = rf"^{tmp_path / 'run'}\S*: No space left.*parkdet train --resume {tmp_path / 'run'}$"
        with pytest.raises(ParkdetError, match=again):
            resume_run(tmp_path / "run", lambda _line: None)
        patch.undo()
        patch.setattr(loop, "save_checkpoint", lambda *_: full(0))
        with pytest.raises(ParkdetError, match=r"nothing was saved yet.*--project"):
            started(tmp_path / "other", run_settings(data))
    assert last.read_bytes() == before
    assert [path.name for path in last.parent.iterdir() if path.suffix == ".tmp"] == []
    assert resume_run(tmp_path / "run", lambda _line: None).is_file()
    assert load_checkpoint(last).training["finished"]

"""A whole training: data set, split, networks, the stages in a row, from the first one or from where it stopped."""

from __future__ import annotations

import dataclasses
import errno
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from parkdet.runtime.errors import ArtifactError, DataError, ParkdetError, UsageError
from parkdet.runtime.run_folder import sole_writer
from parkdet.runtime.settings import Settings, dump_settings, load_settings
from parkdet.runtime.shards import write_atomically
from parkdet.train.anchors import fit_anchors
from parkdet.train.batch_size import choose_batch_size
from parkdet.train.budget import StagePlanner, StageWork, TimeBudget, duration
from parkdet.train.checkpoint import Checkpoint, load_checkpoint, remove_leftovers
from parkdet.train.config import Recipe, TrainSettings
from parkdet.train.loop import StageJob, StageTrainer
from parkdet.train.model.network import Yolov5
from parkdet.train.ranks import ALONE, Ranks
from parkdet.train.schedule import Schedule
from parkdet.train.starting import starting_network, stopped_network
from parkdet.train.training_data import TrainingData, count_boxes, read_training_data

ARGS_FILE = "args.yaml"
CHANGEABLE = frozenset({"cache", "cache_dir", "patience", "save_minutes", "save_period"})
"""Settings that may be edited in `args.yaml` before a run is resumed: what is learned from a batch does not depend on
them."""
Say = Callable[[str], None]


class RunSettings(Settings):
    """Everything a run was started with: `args.yaml` in its folder, from which it is resumed."""

    data: str
    device: str = "auto"
    workers: int = 1
    plots: bool = True
    time_budget: float | None = Field(default=None, gt=0)
    """Seconds that the whole run may take; None: as long as the recipe takes."""
    recipe: Recipe


def start_run(
    folder: Path,
    settings: RunSettings,
    say: Say,
    data: TrainingData | None = None,
    *,
    ranks: Ranks = ALONE,
    device_name: str | None = None,
    budget: TimeBudget | None = None,
) -> Path:
    """Train from the beginning; returns the best checkpoint's path.

    Checkpoints of an older run in the folder are removed: they would be taken for this one's. `data` is what
    `read_training_data` gave, if it was read already; `device_name` is this process's, where it is not the
    settings'; `budget` is the settings' time budget, where its clock runs already. InUseError where another process
    trains in the folder. Of several processes, all call it.
    """
    with sole_writer(folder) if ranks.first else nullcontext(), _full_disk_explained(folder):
        if ranks.first:
            _make_way(folder, settings)
        data = data or read_training_data(Path(settings.data), settings.recipe)
        return _Run(folder, settings, data, say, ranks, device_name or settings.device, budget).train()


def _make_way(folder: Path, settings: RunSettings) -> None:
    for name, _ in settings.recipe.stage_settings():
        for old in ("last.pt", "best.pt"):
            path = folder / name / "weights" / old
            if settings.recipe.weights and path.resolve() == Path(settings.recipe.weights).resolve():
                raise UsageError(f"{path}: would be overwritten by the run that starts from it; give another --name")
            path.unlink(missing_ok=True)
    write_atomically(folder / ARGS_FILE, dump_settings(settings).encode())


def resume_run(
    run: Path,
    say: Say,
    *,
    ranks: Ranks = ALONE,
    device_name: str = "auto",
    workers: int | None = None,
    plots: bool = True,
    data_folder: Path | None = None,
    budget: TimeBudget | None = None,
) -> Path:
    """Go on with a run, given by its folder or a checkpoint in it; returns the best checkpoint's path.

    `device_name`, `workers` and no `plots` replace the run's own for this session; `data_folder`, where the same data
    set lies now, and `budget` from now on. Time that the run took before counts.
    Of several processes, rank 0 alone needs the folder.
    """
    stopped = ranks.from_first(_stopped_run(run) if ranks.first else None)
    assert stopped is not None
    folder, settings = stopped
    say(f"resuming {folder}")
    if ranks.first and not any(folder.rglob("weights/last.pt")):
        say("nothing was saved before it was stopped: it begins anew")
    device = settings.device if device_name == "auto" and ranks.world == 1 else device_name
    with sole_writer(folder) if ranks.first else nullcontext(), _full_disk_explained(folder):
        changed: dict[str, Any] = {} if budget is None else {"time_budget": budget.seconds}
        if data_folder is not None:
            changed["data"] = str(data_folder.resolve())
        settings = settings.model_copy(update=changed)
        data = read_training_data(Path(settings.data), settings.recipe)
        if changed and ranks.first:
            # What is resumed once more must not fall back to a budget that is used up, or to where the data was.
            write_atomically(folder / ARGS_FILE, dump_settings(settings).encode())
        settings = settings.model_copy(
            update={
                "workers": settings.workers if workers is None else workers,
                "plots": settings.plots and plots,
            }
        )
        return _Run(folder, settings, data, say, ranks, device, budget).train()


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    """Say how a run goes on that a full disk has ended: the same command again would begin another one."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if any(folder.rglob("weights/last.pt")):
            remedy = f"what was saved before is whole; free some space, then: parkdet train --resume {folder}"
        else:
            remedy = "nothing was saved yet; free some space, or name a folder on another disk with --project"
        raise ParkdetError(f"{error.filename or folder}: {error.strerror}; {remedy}") from error


def _stopped_run(run: Path) -> tuple[Path, RunSettings]:
    folder = run.resolve() if run.is_dir() else run.resolve().parent
    while not run.exists() or not (folder / ARGS_FILE).is_file():
        if folder.parent == folder or not run.exists():
            raise UsageError(f"{run}: is not a training run (no {ARGS_FILE}); name the folder that train printed")
        folder = folder.parent
    return folder, load_settings(RunSettings, folder / ARGS_FILE)


def latest_run(project: Path) -> Path:
    """The run in `project` that saved last. UsageError where there is none."""
    saved = [path for run in project.glob("*/" + ARGS_FILE) for path in run.parent.rglob("weights/last.pt")]
    if not saved:
        raise UsageError(f"{project}: no run has saved anything there; name the run: --resume RUN")
    return max(saved, key=lambda path: path.stat().st_mtime)


class _Run:
    """The stages of a run in a row."""

    def __init__(
        self, folder: Path, settings: RunSettings, data: TrainingData, say: Say, ranks: Ranks, device_name: str,
        budget: TimeBudget | None,
    ):  # fmt: skip
        self.folder, self.settings, self.data, self.say, self.ranks = folder, settings, data, say, ranks
        self.recipe = settings.recipe
        self.data_now = data.described()
        self.stages = self.recipe.stage_settings()
        self.device = pick_device(device_name)
        if budget is None and settings.time_budget is not None:
            budget = TimeBudget(settings.time_budget)
        self.budget = budget if ranks.first else None
        self._used_before = 0.0

    def train(self) -> Path:
        data, say = self.data, self.say
        say(
            f"data: {len(data.train)} images with {count_boxes(data.train)} boxes to train, {len(data.val)} to "
            f"validate, {len(data.class_names)} classes; device: {self.device}"
            + (f", {self.ranks.world} processes" if self.ranks.world > 1 else "")
        )
        if not data.val:
            say("warning: there is no image to validate on; best.pt will hold the last weights")
        self._same_data_everywhere()
        start = Path(self.recipe.weights) if self.recipe.weights else None
        best = self.folder / "weights" / "best.pt"
        trained_any, data_before = False, None
        for number, (name, stage) in enumerate(self.stages):
            stage_folder = self.folder / name if name else self.folder
            last, best = (stage_folder / "weights" / file for file in ("last.pt", "best.pt"))
            before = self._stopped_in(last, stage)
            if before is not None:
                data_before = before.training.get("data")
            if before is not None and before.training.get("finished"):
                start = last
                continue
            trained_any = True
            if len(self.stages) > 1:
                say(f"stage {number + 1} of {len(self.stages)}: {name} ({stage_folder})")
            if self.ranks.first:
                remove_leftovers(stage_folder / "weights")
            network, settled = self._network(number, stage, before, start)
            if data_before is not None and data_before != self.data_now:
                raise DataError(self._other_data(last if before is not None else start, data_before))
            self._train_stage(number, stage_folder, network, settled, before)
            start = last
        if not trained_any:
            raise UsageError(
                f"{self.folder}: this run is finished; to train on from its weights: parkdet train --weights {best}"
            )
        if self.budget is not None:
            say(f"time budget: {duration(self.budget.used())} of {duration(self.budget.seconds)} used")
        return best

    def _stopped_in(self, last: Path, stage: TrainSettings) -> Checkpoint | None:
        """Where a session before this one left a stage; None where it has not begun."""
        before = self.ranks.from_first(load_checkpoint(last) if self.ranks.first and last.is_file() else None)
        if before is None:
            return None
        if not (before.training.get("finished") or "state" in before.training):
            raise ArtifactError(
                f"{last}: holds weights, but no state to go on from, as best.pt and public files do; bring the run's "
                f"own last.pt back, or begin anew with --weights {last}"
            )
        started, now = before.training.get("settings", {}), stage_record(stage)
        changed = [f"{key} is {now.get(key)!r} and was {was!r}" for key, was in started.items() if now.get(key) != was]
        if changed and not before.training.get("finished"):
            raise UsageError(
                f"{self.folder / ARGS_FILE}: {'; '.join(changed)} when the run was started; put it back, or begin "
                f"anew with --weights {last}"
            )
        if self.budget is not None:
            self._count_used(before.training)
        return before

    def _network(
        self, number: int, stage: TrainSettings, before: Checkpoint | None, start: Path | None
    ) -> tuple[Yolov5, TrainSettings]:
        """The network of a stage, the same in all processes, and the stage's settings with what was found out."""
        network = self.ranks.from_first(
            self._network_of_first(number, stage, before, start) if self.ranks.first else None
        )
        assert network is not None
        stage = stage.model_copy(update={"imgsz": network.spec.imgsz})
        if before is not None:
            stage = stage.model_copy(update={"batch_size": int(before.training["state"]["batch_size"])})
        if stage.batch_size == -1:
            size = choose_batch_size(network, stage, self.device, self.say)
            size = min(self.ranks.gather(size)) * self.ranks.world
            stage = stage.model_copy(update={"batch_size": size})
        if stage.batch_size % self.ranks.world:
            raise UsageError(
                f"batch_size {stage.batch_size} is that of all {self.ranks.world} processes together, and must be a "
                f"multiple of their number; give {math.ceil(stage.batch_size / self.ranks.world) * self.ranks.world}"
            )
        return network, stage

    def _network_of_first(
        self, number: int, stage: TrainSettings, before: Checkpoint | None, start: Path | None
    ) -> Yolov5:
        if before is not None:
            network = stopped_network(before, self.data)
        else:
            opened = load_checkpoint(start) if start else None
            network = starting_network(self.recipe, self.data, stage, opened, self.say)
        stride = network.spec.stride_max
        imgsz = whole_cells(stage.imgsz, stride)
        if imgsz != stage.imgsz:
            self.say(f"imgsz {stage.imgsz} becomes {imgsz}: a multiple of the largest stride, {stride}")
        split = self.recipe.split
        network.spec = dataclasses.replace(network.spec, imgsz=imgsz, split_seed=split.seed, split_count=split.count)
        # A later stage has learned with the anchors of the one before.
        if before is None and number == 0 and stage.autoanchor:
            fit_anchors(network, self.data.train, stage.model_copy(update={"imgsz": imgsz}), self.say)
        return network

    def _train_stage(
        self, number: int, folder: Path, network: Yolov5, stage: TrainSettings, before: Checkpoint | None
    ) -> None:
        job = StageJob(
            settings=stage,
            val=self.recipe.val,
            network=network,
            train_samples=self.data.train,
            val_samples=self.data.val,
            folder=folder,
            device=self.device,
            workers=self.settings.workers,
            plots=self.settings.plots,
            provenance={
                "run": str(self.folder),
                "images_folder": str(self.data.images_folder),
                "stage": self.stages[number][0],
                "split": self.recipe.split.model_dump(),
                "data": self.data_now,
                "settings": stage_record(self.stages[number][1]),
            },
            ranks=self.ranks,
        )
        trainer = StageTrainer(job, self.say, self._planner(number))
        if before is not None:
            trainer.resume_from(before.training)
            self.say(f"going on in epoch {trainer.epoch} at batch {trainer.batch}")
        trainer.run()
        unreadable = {path for paths in self.ranks.gather(list(trainer.loader.unreadable)) for path in paths}
        if unreadable:
            self.say(f"{len(unreadable)} images could not be read and others took their place")

    def _planner(self, number: int) -> Callable[[Schedule], StagePlanner] | None:
        if self.budget is None:
            return None
        works = [
            StageWork(
                epochs=stage.epochs,
                pixels_per_epoch=max(len(self.data.train) / stage.epoch_parts, 1) * stage.imgsz**2,
                val_images=len(self.data.val),
                val_period=stage.val_period,
            )
            for _, stage in self.stages[number:]
        ]
        budget = self.budget
        return lambda schedule: StagePlanner(budget, schedule, works[0], tuple(works[1:]), self.say)

    def _count_used(self, training: Mapping[str, Any]) -> None:
        """A checkpoint of the run says how long the run took until then; of several the last one's counts."""
        assert self.budget is not None
        used = float(training.get("used_seconds", 0.0))
        self.budget.add_used(used - self._used_before)
        self._used_before = used

    def _other_data(self, last: Path | None, before: Mapping[str, Any]) -> str:
        words = "{train_images} images with {train_boxes} boxes, and {val_images} to validate"
        return (
            f"{self.settings.data}: is not the data set that {last} was trained on ({words.format(**before)}; now "
            f"{words.format(**self.data_now)}, or other labels); bring it back as it was, name where it lies with "
            f"--data, or begin anew with --weights {last}"
        )

    def _same_data_everywhere(self) -> None:
        everywhere = self.ranks.gather(self.data_now)
        if any(there != self.data_now for there in everywhere):
            counts = ", ".join(str(there["train_images"]) for there in everywhere)
            raise DataError(
                f"{self.settings.data}: is not the same data set for all processes ({counts} images to train on, or "
                "other labels); give every machine the same files"
            )


def stage_record(stage: TrainSettings) -> dict[str, Any]:
    """The settings that a stage is only resumed with, as plain values."""
    return stage.model_dump(mode="json", exclude=set(CHANGEABLE))


def whole_cells(imgsz: int, stride_max: int) -> int:
    """The size rounded up to a multiple of the largest stride, at least two: of one cell there are no statistics."""
    return max(math.ceil(imgsz / stride_max), 2) * stride_max


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `0` or `cuda:0`. UsageError where there is no such device."""
    text = name.strip().lower()
    if text in ("", "auto"):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if text == "cpu":
        return torch.device("cpu")
    index = text.removeprefix("cuda").removeprefix(":") or "0"
    if not index.isdigit():
        raise UsageError(f"--device '{name}' is not auto, cpu, or the number of a CUDA device")
    if int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return torch.device(f"cuda:{index}")

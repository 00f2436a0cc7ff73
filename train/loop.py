"""The training loop of one stage: batches to weights, with everything needed to go on exactly where it stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parkdet.runtime.errors import DataError, Interrupted, ParkdetError
from parkdet.runtime.evaluation import evaluation_note, evaluation_table, metric
from parkdet.train.budget import StagePlanner
from parkdet.train.checkpoint import load_checkpoint, save_checkpoint
from parkdet.train.config import TrainSettings, ValSettings
from parkdet.train.data.loader import WORKER_ENDED, TrainingBatch, TrainingLoader, TrainingSet
from parkdet.train.data.samples import Sample
from parkdet.train.data.sampling import class_weights, image_weights
from parkdet.train.interrupt import StopSwitch
from parkdet.train.learner import Learner
from parkdet.train.model.network import Yolov5
from parkdet.train.precision import repeatable
from parkdet.train.ranks import ALONE, Ranks
from parkdet.train.run_log import EpochLine, EventsFile, ResultsFile
from parkdet.train.run_pictures import RunPictures
from parkdet.train.schedule import Schedule, scale_of_batch
from parkdet.train.validate import Validation, validate

DRAWING_SECONDS = 10.0
"""A time budget with less left than this does without the pictures of the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """What one stage trains, on what, and where it writes."""

    settings: TrainSettings
    """Its `batch_size` is that of all processes together."""
    val: ValSettings
    network: Yolov5
    train_samples: Sequence[Sample]
    val_samples: Sequence[Sample]
    folder: Path
    device: torch.device
    workers: int
    provenance: Mapping[str, Any]
    """Plain values that every checkpoint of the stage carries along."""
    ranks: Ranks = ALONE
    plots: bool = True
    """Whether to draw what there is to look at."""

    @property
    def last(self) -> Path:
        return self.folder / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        return self.folder / "weights" / "best.pt"


class StageTrainer:
    """One stage from its first batch, or from where `resume_from` says, to its last."""

    def __init__(
        self, job: StageJob, say: Callable[[str], None], planner: Callable[[Schedule], StagePlanner] | None = None
    ):
        s = job.settings
        self.job, self.say, self.ranks = job, say, job.ranks
        self.loader = TrainingLoader(
            TrainingSet(job.train_samples, s.imgsz, s, s.seed, s.cache, Path(s.cache_dir) if s.cache_dir else None),
            batch_size=s.batch_size // self.ranks.world,
            workers=job.workers,
            parts=s.epoch_parts,
            rect_stride=job.network.spec.stride_max if s.rect else None,
            rank=self.ranks.rank,
            world=self.ranks.world,
            pin_memory=job.device.type == "cuda",
        )
        self.batches = self.loader.batches_per_epoch
        self.schedule = Schedule(s, self.batches)
        self.planner = planner(self.schedule) if planner else None
        self.clock = self.planner.budget.clock if self.planner else time.monotonic
        self.learner = Learner(job.network, s, self.schedule.weight_decay, job.device, self.ranks)
        self.results = ResultsFile(job.folder / "results.csv")
        self.events: EventsFile | None = None
        self.pictures = RunPictures(job.folder, job.network.spec, say, wanted=job.plots and self.ranks.first)
        self.best_validation: Validation | None = None
        self.epoch = self.batch = 0
        self.loss_sums = np.zeros(3)
        self.best_fitness = -1.0
        self.best_epoch = 0
        self.ap_per_class = np.zeros(job.network.spec.num_classes)
        self.saved_at = self.clock()

    @property
    def step(self) -> int:
        """Number of the next batch, counted from 0 over the whole stage."""
        return self.epoch * self.batches + self.batch

    def run(self) -> Validation | None:
        """Train to the end; returns the last validation, None where there was nothing to validate.

        Interrupted after Ctrl-C, with last.pt saved; DataError when the loss is not finite.
        """
        validation: Validation | None = None
        if self.ranks.first:
            self.job.folder.mkdir(parents=True, exist_ok=True)
            self.results.keep_before(self.epoch)
            self.events = self.pictures.events = EventsFile(self.job.folder, self.epoch, self.say)
        self.pictures.labels(self.job.train_samples)
        with StopSwitch() as stop, repeatable(self.job.device, self.job.settings.deterministic):
            try:
                # A run that was stopped in its last validation has that to do yet.
                while self.step < self.schedule.end_step or self.batch:
                    self._train_epoch(stop)
                    validation = self._end_epoch(stop) or validation
                    self.epoch, self.batch = self.epoch + 1, 0
                    self.loss_sums = np.zeros(3)
                    if self.step < self.schedule.end_step:
                        self._save_last()
            except RuntimeError as error:
                if not str(error).startswith(WORKER_ENDED):
                    raise
                raise ParkdetError(
                    f"a process that loads images has ended: {error}\nThe system does that where memory is short: "
                    f"lower --workers. {self._saved()}; go on with: parkdet train --resume {self._run} --workers N"
                ) from error
            finally:
                self.loader.close()
        self._finish()
        if self.ranks.first:
            self._show_best(validation)
        return validation

    def _train_epoch(self, stop: StopSwitch) -> None:
        if self.step >= self.schedule.end_step:
            return
        line = EpochLine(self.epoch, self.schedule.epochs, self.batches) if self.ranks.first else None
        self.learner.network.train()
        if self.planner is not None:
            self.planner.start_clock()
        mosaics = self.epoch < self.schedule.epochs - self.job.settings.close_mosaic
        for batch in self.loader.epoch(self.epoch, weights=self._weights(), start_batch=self.batch, mosaics=mosaics):
            self.pictures.training_batch(self.epoch, self.batch, batch)
            plan, size_hw = self.schedule.plan(self.step), self._size_hw(batch.images)
            parts = self.learner.take_in(batch.images, batch.targets, plan, self.step, size_hw)
            told = self._agree(parts, stop.asked)
            if not np.isfinite(told.parts).all() or not self.learner.step_if_due(plan, self.step):
                self._refuse(batch, "gradient" if np.isfinite(told.parts).all() else "loss")
            self.batch += 1
            self.loss_sums += told.parts
            if told.end_step != self.schedule.end_step:
                self.schedule.move_end(self.step, told.end_step)
            if line is not None:
                line.update(self.batch, (self.loss_sums / self.batch).tolist(), len(batch.targets), max(size_hw))
            if told.stop:
                self._interrupt()
            if self.step >= self.schedule.end_step:
                return
            if told.save:
                self._save_last()

    def _agree(self, parts: Tensor, stop_asked: bool) -> _Told:
        """What all processes go by after a batch: the sum of the loss's parts, and what rank 0's clock says."""
        save, end_step = False, 0
        if self.ranks.first:
            save = self.clock() - self.saved_at > self.job.settings.save_minutes * 60
            end_step = self.schedule.end_step if self.planner is None else self.planner.batch_done(self.step)
        own = torch.tensor([stop_asked, save, end_step], dtype=torch.float64)
        of_all = self.ranks.sum(torch.cat((parts.double().cpu(), own)))
        stop, save_now, end = of_all[3:].tolist()
        return _Told(of_all[:3].numpy(), stop > 0, save_now > 0, int(end))

    def _size_hw(self, images: Tensor) -> tuple[int, int]:
        """Height and width at which the network sees a batch: its own, or what a multi-scale training has drawn."""
        s = self.job.settings
        height, width = images.shape[2:]
        if not s.multi_scale:
            return height, width
        stride = self.job.network.spec.stride_max
        factor = scale_of_batch(s.seed, self.step, s.imgsz, stride) / max(height, width)
        return tuple(math.ceil(round(side * factor / stride, 6)) * stride for side in (height, width))  # type: ignore[return-value]

    def _refuse(self, batch: TrainingBatch, what: str) -> None:
        """Stop: the loss of some process's batch is not finite, or the gradients of batches since the last step."""
        files = [names for of_rank in self.ranks.gather(batch.paths) for names in of_rank]
        names = "\n".join(f"  {Path(of_canvas[0]).name}" for of_canvas in files)
        raise DataError(
            f"the {what} is not finite in epoch {self.epoch}, batch {self.batch}; the images were\n{names}\n"
            f"lower lr0 or look at these images; {self._saved()}"
        )

    def _saved(self) -> str:
        return f"{self.job.last} is from before" if self.job.last.is_file() else "nothing was saved yet"

    @property
    def _run(self) -> Path:
        """The run's folder, by which it is resumed."""
        return Path(self.job.provenance.get("run", self.job.folder))

    def _weights(self) -> NDArray[np.float64] | None:
        if not self.job.settings.image_weights:
            return None
        class_ids = [sample.class_ids for sample in self.job.train_samples]
        per_class = class_weights(class_ids, self.job.network.spec.num_classes)
        return image_weights(class_ids, per_class, self.ap_per_class)

    def _end_epoch(self, stop: StopSwitch) -> Validation | None:
        s = self.job.settings
        last = (self.epoch + 1) * self.batches >= self.schedule.end_step
        due = last or (s.val_period > 0 and (self.epoch + 1) % s.val_period == 0)
        validation = self._validate(stop, last) if due and self.job.val_samples else None
        if self.ranks.first:
            rates = [group["lr"] for group in self.learner.optimizer.param_groups]
            losses = (self.loss_sums / max(self.batch, 1)).tolist()
            row = self.results.add(self.epoch, losses, validation, rates)
            if self.events is not None:
                self.events.add(row)
            self.pictures.epoch_ended(self.epoch, validation)
            if s.save_period > 0 and (self.epoch + 1) % s.save_period == 0:
                self._save(self.job.folder / "weights" / f"epoch{self.epoch}.pt")
        if validation is not None:
            self._judge(validation, last)
        return validation

    def _validate(self, stop: StopSwitch, last: bool) -> Validation | None:
        """Measure the average. None where the time budget is over; Interrupted where a stop was asked for."""
        s = self.job.settings
        if last:
            # Whatever happens to the validation, the weights that it looks at are there.
            self._save_last()
        started = self.clock()

        def over() -> bool:
            return last and self.planner is not None and self.planner.budget.left() < 0

        validation = validate(
            self.learner.average.network, self.job.val_samples, self.job.val, imgsz=s.imgsz,
            batch_size=max(s.batch_size // self.ranks.world, 1), loss=self.learner.loss,
            stop=lambda: stop.asked or over(), ranks=self.ranks,
        )  # fmt: skip
        if validation is None:
            if self.ranks.from_first(over()) and not any(self.ranks.gather(stop.asked)):
                self.say("time budget: it ended within the validation, whose figures are missing")
                return None
            self._interrupt()
            return None
        if self.planner is not None:
            self.planner.validation_done(self.clock() - started)
        self.say(evaluation_table(validation.evaluation, per_class=False))
        return validation

    def _judge(self, validation: Validation, last: bool) -> None:
        """Keep the best weights; end the stage where nothing got better for long."""
        by_class = validation.ap_by_class(self.job.network.spec)
        self.ap_per_class = np.array([by_class[i] for i in range(len(by_class))])
        fitness = metric(validation.evaluation, {str(key): weight for key, weight in self.job.val.metric.items()})
        # Without any truth AP is not a number: nothing is best, and `_finish` takes the last weights.
        if fitness > self.best_fitness:
            self.best_fitness, self.best_epoch, self.best_validation = fitness, self.epoch, validation
            self._save(self.job.best)
        patience = self.job.settings.patience
        if patience and not last and self.best_fitness >= 0 and self.epoch - self.best_epoch >= patience:
            self.say(
                f"no better validation in {patience} epochs (patience={patience}): the stage ends after epoch "
                f"{self.epoch}; epoch {self.best_epoch} is the best"
            )
            self.schedule.move_end((self.epoch + 1) * self.batches, (self.epoch + 1) * self.batches)

    def _interrupt(self) -> None:
        self._save_last()
        raise Interrupted(
            f"stopped in epoch {self.epoch} after {self.batch} of {self.batches} batches; saved {self.job.last}; "
            f"go on with: parkdet train --resume {self._run}"
        )

    def _save(self, path: Path, state: Mapping[str, Any] | None = None) -> None:
        if not self.ranks.first:
            return
        about = {**self.job.provenance, "epoch": self.epoch}
        if self.planner is not None:
            about["used_seconds"] = self.planner.budget.used()
        save_checkpoint(path, self.learner.average.network, {**about, **(state or {})})

    def _save_last(self) -> None:
        started = self.clock()
        state = {
            **self.learner.state(),
            "batch": self.batch,
            "batches": self.batches,
            "batch_size": self.job.settings.batch_size,
            "world": self.ranks.world,
            "schedule": self.schedule.state(),
            "loss_sums": self.loss_sums.tolist(),
            "best_fitness": self.best_fitness,
            "best_epoch": self.best_epoch,
            "ap_per_class": self.ap_per_class.tolist(),
        }
        self._save(self.job.last, {"state": state})
        self.saved_at = self.clock()
        if self.planner is not None:
            self.planner.save_done(self.saved_at - started)

    def _finish(self) -> None:
        self._save(self.job.last, {"finished": True})
        if self.ranks.first and not self.job.best.exists():
            self._save(self.job.best)

    def _show_best(self, last: Validation | None) -> None:
        """The table and the pictures of best.pt; it is validated again where the process before this one found it."""
        s = self.job.settings
        # Where nothing was ever best, best.pt holds the last weights.
        best = self.best_validation if self.best_fitness >= 0 else last
        if self.planner is not None and self.planner.budget.left() < DRAWING_SECONDS:
            self.say(f"time budget: too little is left to draw; 'parkdet val --weights {self.job.best}' does it")
            return
        if best is None and self.job.val_samples:
            network = load_checkpoint(self.job.best).model.to(self.job.device)
            best = validate(network, self.job.val_samples, self.job.val, imgsz=s.imgsz, batch_size=s.batch_size)
        if best is not None:
            self.say(f"{self.job.best}:\n{evaluation_table(best.evaluation)}\n{evaluation_note(best.evaluation)}")
            self.pictures.validation(best)
        self.pictures.results()

    def resume_from(self, training: Mapping[str, Any]) -> None:
        """Take over everything that `_save_last` kept. DataError where an epoch has another length now."""
        state = training["state"]
        if int(state["batches"]) != self.batches:
            raise DataError(
                f"{self.job.last}: was stopped in epochs of {state['batches']} batches, now they have {self.batches}; "
                "bring the data set back as it was, or begin anew with --weights"
            )
        if int(state["world"]) != self.ranks.world:
            raise DataError(
                f"{self.job.last}: was stopped in {state['world']} processes, now there are {self.ranks.world}; "
                f"resume it with torchrun and {state['world']} processes"
            )
        self.epoch, self.batch = int(training["epoch"]), int(state["batch"])
        self.learner.load_state(state)
        self.schedule.load_state(state["schedule"])
        self.loss_sums = np.array(state["loss_sums"])
        self.best_fitness, self.best_epoch = float(state["best_fitness"]), int(state["best_epoch"])
        self.ap_per_class = np.array(state["ap_per_class"])


@dataclass(frozen=True, slots=True)
class _Told:
    """What all processes know of a batch."""

    parts: NDArray[np.float64]
    """Box, objectness and class loss (3,) of the whole batch."""
    stop: bool
    save: bool
    end_step: int
    """The batch before which the stage is to end."""

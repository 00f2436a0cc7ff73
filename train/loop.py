"""The training loop of one stage: batches to weights, with everything needed to go on exactly where it stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parkdet.runtime.errors import DataError, Interrupted
from parkdet.runtime.evaluation import evaluation_table, metric
from parkdet.train.checkpoint import save_checkpoint
from parkdet.train.config import TrainSettings, ValSettings
from parkdet.train.data.loader import TrainingBatch, TrainingLoader, TrainingSet
from parkdet.train.data.samples import Sample
from parkdet.train.data.sampling import class_weights, image_weights
from parkdet.train.ema import WeightAverage
from parkdet.train.interrupt import StopSwitch
from parkdet.train.model.loss import DetectionLoss, scaled_gains
from parkdet.train.model.network import Yolov5
from parkdet.train.optimizer import apply_plan, make_optimizer
from parkdet.train.run_log import EpochLine, EventsFile, ResultsFile
from parkdet.train.schedule import Schedule
from parkdet.train.validate import Validation, validate

SAVE_SECONDS = 300.0
"""last.pt is also written in the middle of an epoch when it is older than this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """What one stage trains, on what, and where it writes."""

    settings: TrainSettings
    val: ValSettings
    network: Yolov5
    train_samples: Sequence[Sample]
    val_samples: Sequence[Sample]
    folder: Path
    device: torch.device
    workers: int
    provenance: Mapping[str, Any]
    """Plain values that every checkpoint of the stage carries along."""

    @property
    def last(self) -> Path:
        return self.folder / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        return self.folder / "weights" / "best.pt"


class StageTrainer:
    """One stage from its first batch, or from where `resume_from` says, to its last."""

    def __init__(self, job: StageJob, say: Any):
        s = job.settings
        self.job, self.say = job, say
        # Channels last is the layout that convolutions compute in, on CPUs and GPUs alike.
        self.network = job.network.to(job.device).float()
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks this form
        self.network.requires_grad_(True)
        self.loader = TrainingLoader(
            TrainingSet(job.train_samples, s.imgsz, s, s.seed, s.cache),
            batch_size=s.batch_size,
            workers=job.workers,
            parts=s.epoch_parts,
            pin_memory=job.device.type == "cuda",
        )
        self.batches = self.loader.batches_per_epoch
        self.schedule = Schedule(s, self.batches)
        self.optimizer = make_optimizer(self.network, s, self.schedule.weight_decay)
        self.average = WeightAverage(self.network, s.ema_decay, s.ema_ramp)
        self.precision = _Precision(s.precision, job.device)
        gains = scaled_gains(self.network.spec, s.imgsz, s.box, s.cls, s.obj)
        self.loss = DetectionLoss(
            self.network.spec, **gains, cls_pw=s.cls_pw, obj_pw=s.obj_pw, anchor_t=s.anchor_t,
            fl_gamma=s.fl_gamma, label_smoothing=s.label_smoothing,
        )  # fmt: skip
        self.results = ResultsFile(job.folder / "results.csv")
        self.events: EventsFile | None = None
        self.epoch = self.batch = 0
        self.last_step = -1
        self.loss_sums = np.zeros(3)
        self.best_fitness = -1.0
        self.ap_per_class = np.zeros(self.network.spec.num_classes)
        self.saved_at = time.monotonic()

    def run(self) -> Validation | None:
        """Train to the end; returns the last validation, None where there was nothing to validate.

        Interrupted after Ctrl-C, with last.pt saved; DataError when the loss is not finite.
        """
        validation: Validation | None = None
        self.results.keep_before(self.epoch)
        self.events = EventsFile(self.job.folder, self.epoch)
        with StopSwitch() as stop, repeatable(self.job.device):
            try:
                while self.epoch < self.job.settings.epochs:
                    self._train_epoch(stop)
                    validation = self._end_epoch(stop) or validation
                    self.epoch, self.batch = self.epoch + 1, 0
                    self.loss_sums = np.zeros(3)
                    if self.epoch < self.job.settings.epochs:
                        self._save_last()
            finally:
                self.loader.close()
                self.events.close()
        self._finish()
        return validation

    def _train_epoch(self, stop: StopSwitch) -> None:
        s = self.job.settings
        line = EpochLine(self.epoch, s.epochs, self.batches)
        self.network.train()
        mosaics = self.epoch < s.epochs - s.close_mosaic
        for batch in self.loader.epoch(self.epoch, weights=self._weights(), start_batch=self.batch, mosaics=mosaics):
            parts = self._step(batch)
            self.batch += 1
            self.loss_sums += parts
            line.update(self.batch, (self.loss_sums / self.batch).tolist(), len(batch.targets), s.imgsz)
            if stop.asked:
                self._interrupt()
            if time.monotonic() - self.saved_at > SAVE_SECONDS:
                self._save_last()

    def _step(self, batch: TrainingBatch) -> Any:
        """Forward and backward of a batch, and the optimizer's step when it is due; returns the loss's parts."""
        step = self.epoch * self.batches + self.batch
        plan = self.schedule.plan(self.epoch, step)
        apply_plan(self.optimizer, plan)
        images = batch.images.to(self.job.device, non_blocking=True, memory_format=torch.channels_last).float() / 255
        with self.precision.context():
            heads = self.network(images)
        loss, parts = self.loss(heads, batch.targets.to(self.job.device))
        numbers = parts.cpu().numpy()
        if not np.isfinite(numbers).all():
            names = "\n".join(f"  {Path(files[0]).name}" for files in batch.paths)
            saved = f"{self.job.last} is from before" if self.job.last.is_file() else "nothing was saved yet"
            raise DataError(
                f"the loss is not finite in epoch {self.epoch}, batch {self.batch}; the images were\n{names}\n"
                f"lower lr0 or look at these images; {saved}"
            )
        self.precision.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if step - self.last_step >= plan.accumulate:
            self.precision.scaler.unscale_(self.optimizer)
            if self.job.settings.grad_clip:
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.job.settings.grad_clip)
            self.precision.scaler.step(self.optimizer)
            self.precision.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update(self.network)
            self.last_step = step
        return numbers

    def _weights(self) -> Any:
        if not self.job.settings.image_weights:
            return None
        class_ids = [sample.class_ids for sample in self.job.train_samples]
        per_class = class_weights(class_ids, self.network.spec.num_classes)
        return image_weights(class_ids, per_class, self.ap_per_class)

    def _end_epoch(self, stop: StopSwitch) -> Validation | None:
        s = self.job.settings
        last = self.epoch + 1 == s.epochs
        due = last or (s.val_period > 0 and (self.epoch + 1) % s.val_period == 0)
        validation = None
        if due and self.job.val_samples:
            validation = validate(
                self.average.network, self.job.val_samples, self.job.val, imgsz=s.imgsz,
                batch_size=s.batch_size, loss=self.loss, stop=lambda: stop.asked,
            )  # fmt: skip
            if validation is None:
                self._interrupt()
                return None
            self.say(evaluation_table(validation.evaluation, per_class=last))
            by_class = validation.ap_by_class(self.network.spec)
            self.ap_per_class = np.array([by_class[i] for i in range(len(by_class))])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        row = self.results.add(self.epoch, (self.loss_sums / max(self.batch, 1)).tolist(), validation, rates)
        if self.events is not None:
            self.events.add(row)
        if s.save_period and (self.epoch + 1) % s.save_period == 0:
            self._save(self.job.folder / "weights" / f"epoch{self.epoch}.pt")
        if validation is not None:
            fitness = metric(validation.evaluation, {str(key): weight for key, weight in self.job.val.metric.items()})
            # Without any truth AP is not a number: nothing is best, and `_finish` takes the last weights.
            if fitness > self.best_fitness:
                self.best_fitness = fitness
                self._save(self.job.best)
        return validation

    def _interrupt(self) -> None:
        self._save_last()
        raise Interrupted(
            f"stopped in epoch {self.epoch} after {self.batch} of {self.batches} batches; saved {self.job.last}; "
            f"go on with: parkdet train --resume {self.job.provenance.get('run', self.job.folder)}"
        )

    def _save(self, path: Path, state: Mapping[str, Any] | None = None) -> None:
        save_checkpoint(path, self.average.network, {**self.job.provenance, "epoch": self.epoch, **(state or {})})

    def _save_last(self) -> None:
        gradients = {
            name: parameter.grad for name, parameter in self.network.named_parameters() if parameter.grad is not None
        }
        state = {
            "batch": self.batch,
            "batches": self.batches,
            "last_step": self.last_step,
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict(),
            "updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "gradients": gradients,
            "loss_sums": self.loss_sums.tolist(),
            "best_fitness": self.best_fitness,
            "ap_per_class": self.ap_per_class.tolist(),
        }
        self._save(self.job.last, {"state": state})
        self.saved_at = time.monotonic()

    def _finish(self) -> None:
        self._save(self.job.last, {"finished": True})
        if not self.job.best.exists():
            self._save(self.job.best)

    def resume_from(self, training: Mapping[str, Any]) -> None:
        """Take over everything that `_save_last` kept. DataError where an epoch has another length now."""
        state = training["state"]
        if int(state["batches"]) != self.batches:
            raise DataError(
                f"{self.job.last}: was stopped in epochs of {state['batches']} batches, now they have {self.batches}; "
                "bring the data set back as it was, or begin anew with --weights"
            )
        self.epoch, self.batch = int(training["epoch"]), int(state["batch"])
        self.last_step = int(state["last_step"])
        self.network.load_state_dict(state["network"])
        self.average.network.load_state_dict(state["average"])
        self.average.updates = int(state["updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        parameters = dict(self.network.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(self.job.device)
        self.loss_sums = np.array(state["loss_sums"])
        self.best_fitness = float(state["best_fitness"])
        self.ap_per_class = np.array(state["ap_per_class"])


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a CPU, let equal runs give equal bits: scattered gradients are summed in one order, not by whichever thread.

    Elsewhere nothing changes: some of the network's CUDA kernels have no such form.
    """
    if device.type != "cpu":
        yield
        return
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory finds reads of it, which is for debugging, and costs time.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


class _Precision:
    """The arithmetic of the forward pass, and the loss scaler that float16 needs."""

    def __init__(self, name: str, device: torch.device):
        if name in ("auto", "fast"):
            if device.type == "cuda":
                # From Ampere on; torch also counts older GPUs (a T4), which emulate it slowly.
                name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
            else:
                # Without instructions for it, bf16 is slower than fp32.
                has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
                name = "bf16" if name == "fast" and has_bf16 else "fp32"
        self.device = device
        self.dtype: torch.dtype | None = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype is not None else nullcontext()

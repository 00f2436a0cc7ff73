"""Learning rate, momentum and accumulation as functions of the step, and where a stage ends.

A stage keeps to its recipe's epochs unless a time budget or want of progress moves its end; then the rate falls
from where it is to its last value over the batches that are left.

Source: specification, 'Training'; the YOLOv5 training loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parkdet.train.config import TrainSettings

MIN_WARMUP_STEPS = 100
_SIZES = 0x517E
"""Word that keeps the random sizes' stream apart from others of the same seed and step."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one batch is trained with."""

    bias_lr: float
    lr: float
    """Rate of norm weights and other weights."""
    momentum: float
    accumulate: int
    """Batches whose gradients are summed before the optimizer steps."""


class Schedule:
    """The plan of every batch of a training of `batches_per_epoch` batches an epoch."""

    def __init__(self, settings: TrainSettings, batches_per_epoch: int):
        self.settings = settings
        self.batches = batches_per_epoch
        self.batch_size = settings.batch_size
        self.warmup_steps = max(round(settings.warmup_epochs * batches_per_epoch), MIN_WARMUP_STEPS)
        self.full_accumulate = max(round(settings.nominal_batch / self.batch_size), 1)
        self.end_step = settings.epochs * batches_per_epoch
        """Batches of the whole stage, counted from 0: training ends before the batch of this number."""
        self._warmup_from = (0, 0.0)
        self._moved_at: tuple[int, float] | None = None
        """The batch at which the end was last moved, and the progress then."""

    @property
    def weight_decay(self) -> float:
        """The recipe's decay, stated for the nominal batch, scaled to what is really accumulated."""
        s = self.settings
        return s.weight_decay * self.batch_size * self.full_accumulate / s.nominal_batch

    @property
    def epochs(self) -> int:
        """Epochs until the end, the last one perhaps not whole."""
        return -(-self.end_step // self.batches)

    def progress(self, step: int) -> float:
        """How much of the schedule is behind batch `step`: as of its epoch's start, or exact once the end moved."""
        if self._moved_at is None:
            return step // self.batches / self.settings.epochs
        at, done = self._moved_at
        return done + (1 - done) * (step - at) / max(self.end_step - at, 1)

    def move_end(self, step: int, end_step: int) -> None:
        """From batch `step` on, go through what is left of the schedule until batch `end_step`.

        A warm-up that would fill more than a fifth of the stage is shortened to that.
        """
        self._moved_at = (step, self.progress(step))
        self.end_step = max(end_step, step)
        shorter = max(self.end_step // 5, 1)
        if step < self.warmup_steps and shorter < self.warmup_steps:
            self._warmup_from = (step, self._warmup_share(step))
            self.warmup_steps = max(shorter, step + 1)

    def lr_share(self, progress: float) -> float:
        """Share of `lr0` when `progress`, from 0 to 1, is behind: linear or half a cosine from 1 to `lrf`."""
        s = self.settings
        if s.cos_lr:
            return (1 - math.cos(progress * math.pi)) / 2 * (s.lrf - 1) + 1
        return (1 - progress) * (1 - s.lrf) + s.lrf

    def plan(self, step: int) -> StepPlan:
        """Plan of batch `step`, counted from 0 over the whole training."""
        s = self.settings
        lr = s.lr0 * self.lr_share(self.progress(step))
        if step > self.warmup_steps:
            return StepPlan(lr, lr, s.momentum, self.full_accumulate)
        share = self._warmup_share(step)
        return StepPlan(
            bias_lr=s.warmup_bias_lr + (lr - s.warmup_bias_lr) * share,
            lr=lr * share,
            momentum=s.warmup_momentum + (s.momentum - s.warmup_momentum) * share,
            accumulate=max(1, round(1 + (s.nominal_batch / self.batch_size - 1) * share)),
        )

    def _warmup_share(self, step: int) -> float:
        at, done = self._warmup_from
        return done + (1 - done) * (step - at) / (self.warmup_steps - at)

    def state(self) -> dict[str, Any]:
        """What moved, as plain values."""
        return {
            "end_step": self.end_step,
            "moved_at": self._moved_at,
            "warmup_steps": self.warmup_steps,
            "warmup_from": self._warmup_from,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.end_step, self.warmup_steps = int(state["end_step"]), int(state["warmup_steps"])
        moved, (at, share) = state["moved_at"], state["warmup_from"]
        self._moved_at = None if moved is None else (int(moved[0]), float(moved[1]))
        self._warmup_from = (int(at), float(share))


def scale_of_batch(seed: int, step: int, imgsz: int, stride: int) -> int:
    """The size in pixels at which a multi-scale training sees batch `step`: from half to one and a half of `imgsz`.

    A multiple of the stride, two strides at least. Source: YOLOv5's `--multi-scale`.
    """
    rng = np.random.default_rng((seed, step, _SIZES))
    low, high = int(imgsz * 0.5), int(imgsz * 1.5) + stride
    return max(int(rng.integers(low, high)) // stride, 2) * stride

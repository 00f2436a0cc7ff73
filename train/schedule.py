"""Learning rate, momentum and accumulation as functions of the step: no state, so a resumed run has the same.

Source: specification, 'Training'; the YOLOv5 training loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parkdet.train.config import TrainSettings

MIN_WARMUP_STEPS = 100


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
        self.warmup_steps = max(round(settings.warmup_epochs * batches_per_epoch), MIN_WARMUP_STEPS)
        self.full_accumulate = max(round(settings.nominal_batch / settings.batch_size), 1)

    @property
    def weight_decay(self) -> float:
        """The recipe's decay, stated for the nominal batch, scaled to what is really accumulated."""
        s = self.settings
        return s.weight_decay * s.batch_size * self.full_accumulate / s.nominal_batch

    def lr_share(self, epoch: int) -> float:
        """Share of `lr0` in an epoch, counted from 0: linear or half a cosine from 1 to `lrf`."""
        s = self.settings
        if s.cos_lr:
            return (1 - math.cos(epoch * math.pi / s.epochs)) / 2 * (s.lrf - 1) + 1
        return (1 - epoch / s.epochs) * (1 - s.lrf) + s.lrf

    def plan(self, epoch: int, step: int) -> StepPlan:
        """Plan of batch `step`, counted from 0 over the whole training, which lies in `epoch`."""
        s = self.settings
        lr = s.lr0 * self.lr_share(epoch)
        if step > self.warmup_steps:
            return StepPlan(lr, lr, s.momentum, self.full_accumulate)
        share = step / self.warmup_steps
        return StepPlan(
            bias_lr=s.warmup_bias_lr + (lr - s.warmup_bias_lr) * share,
            lr=lr * share,
            momentum=s.warmup_momentum + (s.momentum - s.warmup_momentum) * share,
            accumulate=max(1, round(1 + (s.nominal_batch / s.batch_size - 1) * share)),
        )

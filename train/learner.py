"""What learns: the network, its optimizer and its average. A batch in, gradients, and a step when one is due."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from parkdet.runtime.errors import UsageError
from parkdet.train.config import TrainSettings
from parkdet.train.ema import WeightAverage
from parkdet.train.model.loss import DetectionLoss, scaled_gains
from parkdet.train.model.network import Yolov5
from parkdet.train.optimizer import apply_plan, make_optimizer
from parkdet.train.precision import Precision
from parkdet.train.ranks import ALONE, Ranks
from parkdet.train.schedule import StepPlan

LEAST_SCALE = 1.0
"""A loss scaler that is asked for less than this does not lack scale: the gradients themselves are too large."""


class Learner:
    """A network in training on one device, one of several processes perhaps, all of which hold the same weights."""

    def __init__(
        self,
        network: Yolov5,
        settings: TrainSettings,
        weight_decay: float,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        s = settings
        self.settings, self.device, self.ranks = s, device, ranks
        # Channels last is the layout that convolutions compute in, on CPUs and GPUs alike.
        self.network = network.to(device).float()
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks this form
        self.network.requires_grad_(True)
        for index in frozen_layers(s.freeze, len(network.model)):
            self.network.model[index].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise UsageError("freeze: no layer is left to learn; leave out the last one at least")
        self.shares_norms = ranks.world > 1 and device.type == "cuda" and s.sync_bn
        if self.shares_norms:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)  # type: ignore[no-untyped-call]
        self.parallel: nn.Module = self.network
        if ranks.world > 1:
            # It gives every process rank 0's weights and buffers. From three processes on, a sum depends on its order;
            # looking for unused parameters keeps the buckets' first order, that a resumed run has again.
            self.parallel = DistributedDataParallel(
                self.network,
                device_ids=[device.index] if device.type == "cuda" else None,
                forward_sync_buffers=False,
                find_unused_parameters=device.type == "cpu" and ranks.world > 2,
            )
        self.optimizer = make_optimizer(self.network, s, weight_decay)
        self.average = WeightAverage(self.network, s.ema_decay, s.ema_ramp)
        self.precision = Precision(s.precision, device)
        gains = scaled_gains(self.network.spec, s.imgsz, s.box, s.cls, s.obj)
        self.loss = DetectionLoss(
            self.network.spec, **gains, cls_pw=s.cls_pw, obj_pw=s.obj_pw, anchor_t=s.anchor_t,
            fl_gamma=s.fl_gamma, label_smoothing=s.label_smoothing,
        )  # fmt: skip
        self.last_step = -1
        """The batch after which the optimizer last stepped, counted over the whole stage."""

    def take_in(
        self, images: Tensor, targets: Tensor, plan: StepPlan, step: int, size_hw: tuple[int, int] | None = None
    ) -> Tensor:
        """Forward and backward of batch `step`; gradients add to those that wait. Returns the loss's parts (3,).

        `images` (B, 3, H, W) uint8 and `targets` (M, 6) on any device; the network sees the images at `size_hw`.
        With several processes the parts are this one's share: their sum is the loss of the whole batch.
        """
        apply_plan(self.optimizer, plan)
        floats = images.to(self.device, non_blocking=True, memory_format=torch.channels_last).float() / 255
        if size_hw is not None and size_hw != tuple(images.shape[2:]):
            floats = F.interpolate(floats, size=size_hw, mode="bilinear", align_corners=False)
        targets = targets.to(self.device, non_blocking=True)
        waits = isinstance(self.parallel, DistributedDataParallel) and not self.is_due(plan, step)
        with self.parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with self.precision.context():
                heads = self.parallel(floats)
            loss, parts = self.loss(heads, targets, self.ranks.sum if self.ranks.world > 1 else None)
            # Processes average their gradients, while the loss's shares are to be summed.
            self.precision.scaler.scale(loss * self.ranks.world).backward()  # type: ignore[no-untyped-call]
        if self.ranks.world > 1 and not self.shares_norms:
            self._average_norms()
        return parts

    def is_due(self, plan: StepPlan, step: int) -> bool:
        """Whether the optimizer steps after batch `step`."""
        return step - self.last_step >= plan.accumulate

    def step_if_due(self, plan: StepPlan, step: int) -> bool:
        """Let the optimizer step after batch `step` if enough batches were taken in; the average follows.

        False where the gradients are not finite: nothing was changed then. A loss scaler skips such steps while it
        looks for its scale; when it has none left, they are not finite by themselves.
        """
        if not self.is_due(plan, step):
            return True
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        trained = [parameter for parameter in self.network.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, self.settings.grad_clip or torch.inf)
        if not bool(torch.isfinite(norm)) and not (scaler.is_enabled() and scaler.get_scale() >= LEAST_SCALE):
            return False
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.network)
        self.last_step = step
        return True

    def state(self) -> dict[str, Any]:
        """Everything that the next batch depends on. With several processes, all of them must ask at once."""
        gradients = {
            name: parameter.grad for name, parameter in self.network.named_parameters() if parameter.grad is not None
        }
        if self.ranks.world > 1:
            gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
        return {
            "last_step": self.last_step,
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict(),
            "updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            # Gradients of batches that no step has used yet are each process's own.
            "gradients": self.ranks.gather(gradients),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.last_step = int(state["last_step"])
        self.network.load_state_dict(state["network"])
        self.average.network.load_state_dict(state["average"])
        self.average.updates = int(state["updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        parameters = dict(self.network.named_parameters())
        for name, gradient in state["gradients"][self.ranks.rank].items():
            parameters[name].grad = gradient.to(self.device)

    @torch.no_grad()
    def _average_norms(self) -> None:
        """Let the running statistics of normalisation be those of all processes' images."""
        statistics = [
            buffer for name, buffer in self.network.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        flat = self.ranks.sum(torch.cat([buffer.flatten() for buffer in statistics])) / self.ranks.world
        means = torch.split(flat, [buffer.numel() for buffer in statistics])
        for buffer, mean in zip(statistics, means, strict=True):
            buffer.copy_(mean.view_as(buffer))


def frozen_layers(freeze: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Which of `count` layers do not learn: the first `freeze`, or those listed. UsageError where one is not there."""
    indices = tuple(range(freeze)) if isinstance(freeze, int) else freeze
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise UsageError(f"freeze: there is no layer {wrong[0]}; the network has {count}, counted from 0")
    return indices

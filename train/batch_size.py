"""How many images a batch may have: measured on a GPU by training steps of growing batches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from parkdet.runtime.errors import UsageError
from parkdet.train.config import TrainSettings
from parkdet.train.learner import Learner
from parkdet.train.model.network import Yolov5
from parkdet.train.schedule import StepPlan

DEFAULT_ON_CPU = 16
FRACTION = 0.8
"""Share of the free memory that a batch may take; the rest is for sizes that vary and for fragmentation."""
MEASURED = (1, 2, 4, 8, 16)
"""Batches that are measured, until one does not fit; the rest is a straight line through them."""

Probe = Callable[[int], int | None]
"""Bytes in use at the height of a training step with so many images; None where they did not fit."""


def largest_batch(probe: Probe, free_bytes: int) -> int:
    """The largest batch whose training step fits `FRACTION` of the free bytes, as measured where it was chosen.

    UsageError where not even one image fits.
    """
    wanted = FRACTION * free_bytes
    sizes: list[int] = []
    peaks: list[int] = []
    for size in MEASURED:
        peak = probe(size)
        if peak is None or peak > wanted:
            break
        sizes.append(size)
        peaks.append(peak)
    if not sizes:
        raise UsageError(
            f"batch_size=-1: not even one image fits {wanted / 1e9:.1f} GB of GPU memory; lower imgsz or choose a "
            "smaller model"
        )
    chosen = sizes[-1]
    if len(sizes) == len(MEASURED):
        # The last two tell most: small batches leave the caches of the libraries unused.
        each = max((peaks[-1] - peaks[-2]) / (sizes[-1] - sizes[-2]), 1)
        chosen = sizes[-1] + int((wanted - peaks[-1]) / each)
    elif len(sizes) > 1:
        each = max((peaks[-1] - peaks[-2]) / (sizes[-1] - sizes[-2]), 1)
        chosen = min(sizes[-1] + int((wanted - peaks[-1]) / each), MEASURED[len(sizes)] - 1)
    while chosen > sizes[-1]:
        peak = probe(chosen)
        if peak is not None and peak <= wanted:
            break
        chosen -= max((chosen - sizes[-1] + 1) // 2, 1)
    return chosen


def choose_batch_size(
    network: Yolov5, settings: TrainSettings, device: torch.device, say: Callable[[str], None]
) -> int:
    """The batch size for one device: what fits the GPU, `DEFAULT_ON_CPU` on a CPU."""
    if device.type != "cuda":
        say(f"batch_size=-1: there is no GPU whose memory could be measured; {DEFAULT_ON_CPU} images a batch")
        return DEFAULT_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    size = largest_batch(_GpuProbe(network, settings, device), free)
    say(f"batch_size=-1: {size} images fit {FRACTION:.0%} of the {free / 1e9:.1f} GB of GPU memory that are free")
    return size


class _GpuProbe:
    """A training step as it will be, on a copy of the network and noise, and the memory that it took."""

    def __init__(self, network: Yolov5, settings: TrainSettings, device: torch.device):
        self.network, self.settings, self.device = network, settings, device

    def __call__(self, batch: int) -> int | None:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            # With its optimizer's state and its average, which the training holds too.
            learner = Learner(copy.deepcopy(self.network), self.settings, 0.0, self.device)
            side = self.settings.imgsz + (self.settings.imgsz // 2 if self.settings.multi_scale else 0)
            images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
            boxes = torch.rand(batch * 20, 6) * 0.4 + 0.3
            boxes[:, 0], boxes[:, 1] = torch.arange(len(boxes)) % batch, 0
            plan = StepPlan(bias_lr=0.0, lr=0.0, momentum=0.9, accumulate=1)
            learner.network.train()
            for step in range(2):
                learner.take_in(images, boxes, plan, step)
                learner.step_if_due(plan, step)
            return torch.cuda.max_memory_allocated(self.device) - before
        except torch.cuda.OutOfMemoryError:
            return None

"""Exponential moving average of a network's weights and buffers."""

from __future__ import annotations

import copy
import math

import torch

from parkdet.train.model.network import Yolov5


class WeightAverage:
    """The averaged copy, updated after each optimizer step; a young average forgets faster (a ramp)."""

    def __init__(self, network: Yolov5, decay: float = 0.9999, ramp: float = 2000):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.ramp = decay, ramp
        self.updates = 0

    @torch.no_grad()
    def update(self, network: Yolov5) -> None:
        self.updates += 1
        decay = ema_decay(self.updates, self.decay, self.ramp)
        live = network.state_dict()
        for name, averaged in self.network.state_dict().items():
            if averaged.is_floating_point():
                averaged.mul_(decay).add_(live[name], alpha=1 - decay)
            else:
                averaged.copy_(live[name])


def ema_decay(updates: int, decay: float = 0.9999, ramp: float = 2000) -> float:
    """Share of the old average that stays at update n, counted from 1: decay (1 - exp(-n / ramp))."""
    return decay * (1 - math.exp(-updates / ramp))

"""Exponential moving average of a network's weights and buffers."""

from __future__ import annotations

import copy
import math

import torch

from parkdet.train.model.network import Yolov5

MAX_DECAY = 0.9999
RAMP_UPDATES = 2000


class WeightAverage:
    """The averaged copy, updated after each optimizer step; a young average forgets faster (a ramp)."""

    def __init__(self, network: Yolov5):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self, network: Yolov5) -> None:
        self.updates += 1
        decay = ema_decay(self.updates)
        live = network.state_dict()
        for name, averaged in self.network.state_dict().items():
            if averaged.is_floating_point():
                averaged.mul_(decay).add_(live[name], alpha=1 - decay)
            else:
                averaged.copy_(live[name])


def ema_decay(updates: int) -> float:
    """Share of the old average that stays at update n, counted from 1: 0.9999 (1 - exp(-n / 2000))."""
    return MAX_DECAY * (1 - math.exp(-updates / RAMP_UPDATES))

"""The automatic batch size against a memory that the test makes up."""

from __future__ import annotations

import pytest
import torch

from parkdet.runtime.errors import UsageError
from parkdet.train.batch_size import DEFAULT_ON_CPU, FRACTION, MEASURED, choose_batch_size, largest_batch
from parkdet.train.config import TrainSettings
from parkdet.train.model.network import build_network

GB = 1_000_000_000


class Memory:
    """A GPU where a step takes `fixed + each * images` bytes, and beyond the measured sizes `extra` more an image."""

    def __init__(self, free: int, fixed: int, each: int, extra: int = 0):
        self.free, self.fixed, self.each, self.extra = free, fixed, each, extra
        self.asked: list[int] = []

    def taken(self, images: int) -> int:
        return self.fixed + self.each * images + self.extra * max(images - MEASURED[-1], 0)

    def __call__(self, images: int) -> int | None:
        self.asked.append(images)
        return None if self.taken(images) > self.free else self.taken(images)


@pytest.mark.parametrize(
    ("free", "fixed", "each"),
    [
        (16 * GB, 2 * GB, GB // 10),
        (16 * GB, 2 * GB, GB),
        (80 * GB, 3 * GB, GB // 7),
        (16 * GB, 1, 12 * GB),
        (16 * GB, GB, 5 * GB),
    ],
)
def test_it_is_the_largest_that_fits_the_share(free: int, fixed: int, each: int) -> None:
    memory = Memory(free, fixed, each)
    size = largest_batch(memory, free)
    fits = [n for n in range(1, 2000) if memory.taken(n) <= FRACTION * free]
    assert size == max(fits)


@pytest.mark.parametrize("extra", [GB // 20, -GB // 20])
def test_memory_that_does_not_grow_in_a_line_is_measured_where_it_was_chosen(extra: int) -> None:
    memory = Memory(16 * GB, GB, GB // 10, extra)
    size = largest_batch(memory, 16 * GB)
    assert memory.taken(size) <= FRACTION * 16 * GB
    assert size in memory.asked
    assert size >= MEASURED[-1]


def test_one_image_too_many_is_said() -> None:
    with pytest.raises(UsageError, match="lower imgsz"):
        largest_batch(Memory(GB, 2 * GB, GB), GB)


def test_without_a_gpu_it_is_the_default_and_said() -> None:
    said: list[str] = []
    network = build_network("yolov5n", ["a"], 64)
    settings = TrainSettings(batch_size=-1)
    assert choose_batch_size(network, settings, torch.device("cpu"), said.append) == DEFAULT_ON_CPU == 16
    assert "no GPU" in said[0]

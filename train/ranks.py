"""The processes that train together, one a device: who they are, what they agree on, and how.

`torchrun` starts them and says in the environment who is who. A training of one process is the same code with
`ALONE`, in which nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parkdet.runtime.errors import UsageError

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""How long a process waits for another one: rank 0 may read a large data set or measure a validation meanwhile."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process's place among those that train together."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the device where `values` is; itself where there is one process."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, for everyone. Any picklable object."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value, for everyone; what the others pass is not looked at. Any picklable object."""
        if self.world == 1:
            return value
        box: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[no-any-return]


ALONE = Ranks()


@contextmanager
def process_group(device_name: str) -> Iterator[tuple[Ranks, str]]:
    """Join the processes that `torchrun` started; gives this one's place and the name of its device.

    Without torchrun, `ALONE` and `device_name` as it is. UsageError where a device is named that several
    processes cannot share.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world == 1:
        yield ALONE, device_name
        return
    text = device_name.strip().lower()
    on_cpu = text == "cpu" or (text in ("", "auto") and not torch.cuda.is_available())
    if text not in ("", "auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {device_name}: under torchrun every process takes the GPU of its local rank; leave --device "
            "out, and choose among the GPUs with CUDA_VISIBLE_DEVICES"
        )
    local = os.environ.get("LOCAL_RANK", str(rank))
    if not on_cpu:
        torch.cuda.set_device(int(local))
    # Objects and counts travel by gloo, which needs no GPU memory; gradients by NCCL where there are GPUs.
    dist.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    try:
        yield Ranks(rank, world), "cpu" if on_cpu else local
    finally:
        dist.destroy_process_group()

"""Memory for the images of batches that workers write once and their parent reads, used again and again.

A fresh piece of shared memory for every batch costs a page fault for each 4 KB: a seventh of the time of small images.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import os
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_numbers = itertools.count()
_memories: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()
"""The memories of this process by their numbers, which its forked workers know too."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the images of a batch are: all that a worker has to send of them."""

    memory: int
    number: int
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """What the worker wrote, in its parent; call it once. The slot is free again when no tensor shows it."""
        return _memories[self.memory].seen(self.number, self.shape)


class BatchMemory:
    """Slots of one size in memory that processes forked later share.

    A worker takes a free slot and sends its number. The parent sees it as a tensor; when that and all views of it are
    gone, the slot is free again.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._bytes = np.frombuffer(mmap.mmap(-1, slots * slot_bytes), np.uint8).reshape(slots, slot_bytes)
        self._taken = np.frombuffer(mmap.mmap(-1, slots), np.bool_)
        self._lock = multiprocessing.Lock()
        self._seen = np.zeros(slots, np.bool_)
        """Slots that this process, the parent, has a tensor of."""
        self._parent = os.getpid()
        self.number = next(_numbers)
        _memories[self.number] = self

    def take(self, shape: tuple[int, ...]) -> tuple[Slot, Tensor] | None:
        """A free slot and its bytes (*shape), for a worker to write to; None where none is free, or large enough."""
        size = math.prod(shape)
        with self._lock:
            free = np.flatnonzero(~self._taken)
            if not len(free) or size > self._bytes.shape[1]:
                return None
            slot = int(free[0])
            self._taken[slot] = True
        return Slot(self.number, slot, shape), torch.from_numpy(self._bytes[slot, :size].reshape(shape))

    def seen(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The tensor (*shape) of a slot that a worker has written to."""
        pixels = self._bytes[slot, : math.prod(shape)].reshape(shape)
        self._seen[slot] = True
        # The tensor's memory holds on to this very array, whatever views of the tensor are made.
        weakref.finalize(pixels, self._free, slot).atexit = False
        return torch.from_numpy(pixels)

    def reclaim(self) -> None:
        """Free what workers that are gone have taken and the parent has never seen."""
        self._taken &= self._seen

    def _free(self, slot: int) -> None:
        if os.getpid() != self._parent:  # a worker's copy of what its parent still looks at
            return
        # No lock, which a finalizer might find held by its own thread: this byte is set by workers, while it is
        # clear, and cleared by the parent, while it is set.
        self._seen[slot] = False
        self._taken[slot] = False

"""The images decoded lately, in memory that the workers of a loader share."""

from __future__ import annotations

import mmap
import multiprocessing

import numpy as np

from parkdet.runtime.geometry import ImageArray

_NONE = -1


class RecentImages:
    """A ring of slots of one size: a new image takes the place of the one that has been here longest.

    It saves decoding and decides nothing: an image that is not here is decoded again. Processes that are forked
    share the ring; one that is started in another way gets an empty ring of its own.

    What `get` gives is a view. No process writes to it until this one has called `release`.
    """

    def __init__(self, images: int, slots: int, slot_bytes: int) -> None:
        self._sizes = (images, slots, slot_bytes)
        # Anonymous memory, unlike /dev/shm, of which containers have little; it is not there until it is written to.
        self._pixels = np.frombuffer(mmap.mmap(-1, slots * slot_bytes), np.uint8).reshape(slots, slot_bytes)
        tables = np.frombuffer(mmap.mmap(-1, 4 * (images + 2 * slots + 1)), np.int32)
        self._slot_of, self._image_in, self._readers, self._next = np.split(tables, np.cumsum([images, slots, slots]))
        self._slot_of.fill(_NONE)
        self._image_in.fill(_NONE)
        self._lock = multiprocessing.Lock()
        self._reading: list[int] = []
        """Slots that this process looks at."""

    def __reduce__(self) -> tuple[type[RecentImages], tuple[int, int, int]]:
        return RecentImages, self._sizes

    def get(self, image: int, hw: tuple[int, int]) -> ImageArray | None:
        """The pixels (h, w, 3) of an image, not to be written to; None where they are not here."""
        with self._lock:
            slot = int(self._slot_of[image])
            if slot == _NONE:
                return None
            self._readers[slot] += 1
        self._reading.append(slot)
        pixels = self._view(slot, hw)
        pixels.flags.writeable = False
        return pixels

    def put(self, image: int, pixels: ImageArray) -> None:
        """Keep a copy of an image's pixels (h, w, 3), unless it is here or every slot is being looked at."""
        slot = self._taken_slot(image)
        if slot is None:
            return
        np.copyto(self._view(slot, pixels.shape[:2]), pixels)
        with self._lock:
            self._readers[slot] -= 1
            if self._slot_of[image] == _NONE:  # else another worker has decoded it at the same time
                self._slot_of[image], self._image_in[slot] = slot, image

    def release(self) -> None:
        """This process has done with what it got."""
        with self._lock:
            for slot in self._reading:
                self._readers[slot] -= 1
        self._reading.clear()

    def _taken_slot(self, image: int) -> int | None:
        """The slot that has been in use longest, emptied, and kept from others as if it were read."""
        with self._lock:
            if self._slot_of[image] != _NONE:
                return None
            for _ in range(len(self._readers)):
                slot = int(self._next[0])
                self._next[0] = (slot + 1) % len(self._readers)
                if self._readers[slot] == 0:
                    if self._image_in[slot] != _NONE:
                        self._slot_of[self._image_in[slot]] = _NONE
                        self._image_in[slot] = _NONE
                    self._readers[slot] = 1
                    return slot
        return None

    def _view(self, slot: int, hw: tuple[int, int]) -> ImageArray:
        return self._pixels[slot, : hw[0] * hw[1] * 3].reshape(*hw, 3)

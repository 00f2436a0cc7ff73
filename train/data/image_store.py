"""The training images at the size they are used: read from disk each time, or kept in memory."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.images import read_image, reduction
from parkdet.train.data.augment import Tile, to_long_side
from parkdet.train.data.disk_cache import DiskCache, default_cache_dir
from parkdet.train.data.recent_images import RecentImages
from parkdet.train.data.samples import Sample

log = logging.getLogger(__name__)

RECENT_BYTES = 2_000_000_000
"""The most that images kept after their use take, for all workers together; less where a quarter of the memory that is
available is less."""
RECENT_WINDOWS = 1.25
"""Images kept, in mosaic windows: those of a window, and what else comes in while it is needed."""

CacheMode = Literal["none", "ram", "disk"]

_CGROUP_FILES: tuple[tuple[str, str], ...] = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and use of memory in a container: the kernel's interface in version 2 and in version 1."""


class UnreadableImageError(DataError):
    """One image of the set cannot be used; `index` says which."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(index, message)
        self.index = index
        self.message = message

    def __str__(self) -> str:
        return self.message


class ImageStore:
    """Gives every sample's image scaled to `imgsz` on its long side (linear), and its boxes at that scale.

    With `cache="ram"` all images are decoded at once into one buffer, which workers forked later share.
    UsageError when that would take more than half of the memory that is available. With `cache="disk"` an image is
    written as it is scaled when it is first used, and read from there afterwards, by later runs too.

    Otherwise the images used lately are kept, those of somewhat more than a mosaic `window` (0: as many as may be).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: int,
        cache: CacheMode = "none",
        cache_dir: Path | None = None,
        window: int = 0,
    ) -> None:
        self._samples = samples
        self._boxes = [Letterbox.fit(sample.image_hw, imgsz, 1, canvas=(imgsz, imgsz)) for sample in samples]
        self._offsets = np.concatenate(
            (
                [0],
                np.cumsum([3 * box.resized_hw[0] * box.resized_hw[1] for box in self._boxes], dtype=np.int64),
            )
        )
        self._cached: ImageArray | None = None
        self._recent: RecentImages | None = None
        self.unreadable: dict[int, str] = {}
        """What was found wrong while the cache was filled, by index."""
        self._disk: DiskCache | None = None
        if cache == "ram":
            self._fill()
        elif cache == "disk":
            self._disk = DiskCache(cache_dir or default_cache_dir())
            sizes = np.diff(self._offsets).tolist()
            self._disk.check_space(
                (sample.path, box.resized_hw, size)
                for sample, box, size in zip(samples, self._boxes, sizes, strict=True)
            )
        if cache != "ram":
            self._recent = self._room_for_recent(window)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def cache_bytes(self) -> int:
        """What all images take in memory at this size."""
        return int(self._offsets[-1])

    def tile(self, index: int) -> Tile:
        """The sample as augmentation wants it; its image is read when the tile's `load` is called."""
        sample, box = self._samples[index], self._boxes[index]
        scale_y, scale_x = (now / before for now, before in zip(box.resized_hw, box.image_hw, strict=True))
        xyxy = sample.xyxy * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
        return Tile(box.resized_hw, sample.class_ids, xyxy, lambda: self.image(index))

    def image(self, index: int) -> ImageArray:
        """The scaled image (h, w, 3) BGR, not to be written to, and valid until `release`.

        UnreadableImageError when there is none.
        """
        if index in self.unreadable:
            raise UnreadableImageError(index, self.unreadable[index])
        if self._cached is not None:
            return self._slot(self._cached, index)
        if self._recent is None:
            return self._read(index)
        image = self._recent.get(index, self._boxes[index].resized_hw)
        if image is None:
            image = self._read(index)
            self._recent.put(index, image)
        return image

    def release(self) -> None:
        """The images that this process got from `image` are no longer looked at."""
        if self._recent is not None:
            self._recent.release()

    def _room_for_recent(self, window: int) -> RecentImages | None:
        """Room for the images of a window, or for as many as the memory allows; None where it holds none."""
        largest = int(np.diff(self._offsets).max())
        slots = min(RECENT_BYTES, available_memory() // 4) // largest
        slots = min(slots, math.ceil(window * RECENT_WINDOWS) or slots, len(self))
        return RecentImages(len(self), slots, largest) if slots else None

    def _slot(self, buffer: ImageArray, index: int) -> ImageArray:
        pixels = buffer[self._offsets[index] : self._offsets[index + 1]]
        return pixels.reshape(*self._boxes[index].resized_hw, 3)

    def _read(self, index: int) -> ImageArray:
        resized_hw, path = self._boxes[index].resized_hw, self._samples[index].path
        if self._disk is None:
            return self._decoded(index)
        kept = self._disk.get(path, resized_hw)
        if kept is None:
            kept = self._decoded(index)
            self._disk.put(path, kept)
        return kept

    def _decoded(self, index: int) -> ImageArray:
        sample, resized_hw = self._samples[index], self._boxes[index].resized_hw
        try:
            image = read_image(sample.path, least_hw=resized_hw)
            part = reduction(sample.image_hw, resized_hw)
            if image.shape[:2] not in (sample.image_hw, tuple(-(-side // part) for side in sample.image_hw)):
                found_h, found_w = read_image(sample.path).shape[:2]
                height, width = sample.image_hw
                raise DataError(
                    f"{sample.path}: it decodes to {found_w} x {found_h} pixels, its boxes are for "
                    f"{width} x {height}; run 'parkdet prepare' to have the data set checked"
                )
        except DataError as error:
            raise UnreadableImageError(index, str(error)) from error
        return to_long_side(image, resized_hw)

    def _fill(self) -> None:
        available = available_memory()
        if self.cache_bytes > available // 2:
            raise UsageError(
                f"cache=ram: {len(self)} images take {self.cache_bytes / 1e9:.1f} GB at this size, more than "
                f"half of the {available / 1e9:.1f} GB of memory that are available; use cache=none"
            )
        buffer = np.empty(self.cache_bytes, np.uint8)

        def fill(index: int) -> None:
            try:
                self._slot(buffer, index)[:] = self._read(index)
            except UnreadableImageError as error:
                self.unreadable[index] = error.message

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        self._cached = buffer
        log.info("cache=ram: %d images, %.2f GB", len(self), self.cache_bytes / 1e9)


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated without swapping: the system's, or less where a container has a limit."""
    bounds = []
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        bounds += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        bounds.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    for limit_name, used_name in _CGROUP_FILES:
        try:
            limit, used = ((cgroup / name).read_text().strip() for name in (limit_name, used_name))
        except OSError:
            continue
        if limit.isdigit():  # version 2 says "max" where there is no limit
            bounds.append(max(int(limit) - int(used), 0))
    return min(bounds)

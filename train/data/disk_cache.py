"""Scaled images as raw pixels on disk, one file an image: shared by runs and processes, whole or not there at all."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from parkdet.runtime.errors import UsageError
from parkdet.runtime.geometry import ImageArray

log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """`parkdet/images` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parkdet" / "images"


_SCALING = 2
"""Number of the way in which images are scaled down: pixels made in another way have other names."""


class DiskCache:
    """Pixels (h, w, 3) by the file they come from, its size and time of change, and the size they are scaled to.

    A file that changes gets another name, so what is found is never out of date.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writes = True

    def get(self, source: Path, resized_hw: tuple[int, int]) -> ImageArray | None:
        """The pixels (h, w, 3) of `source` scaled to `resized_hw`, None where they are not there in full."""
        try:
            pixels = np.fromfile(self._path(source, resized_hw), np.uint8)
        except OSError:
            return None
        height, width = resized_hw
        return pixels.reshape(height, width, 3) if pixels.size == height * width * 3 else None

    def put(self, source: Path, image: ImageArray) -> None:
        """Keep the pixels of a scaled image. Where there is no room left, nothing more is written, with a warning."""
        if not self._writes:
            return
        temporary: Path | None = None
        try:
            path = self._path(source, (image.shape[0], image.shape[1]))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            image.tofile(temporary)
            temporary.replace(path)
        except OSError as error:
            self._writes = False
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            log.warning("cache=disk: %s (%s); the images after this one are read as they are", self.folder, error)

    def check_space(self, images: Iterable[tuple[Path, tuple[int, int], int]]) -> None:
        """UsageError where the images (file, scaled size, bytes) that are not there yet do not fit the disk."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cache=disk: {self.folder} cannot be made ({error.strerror}); name a folder with cache_dir"
            ) from error
        missing = sum(size for source, resized_hw, size in images if not self._has(source, resized_hw, size))
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise UsageError(
                f"cache=disk: the images take {missing / 1e9:.1f} GB more, {self.folder} has {free / 1e9:.1f} GB free; "
                "name a folder on another disk with cache_dir, or use cache=none"
            )

    def _has(self, source: Path, resized_hw: tuple[int, int], size: int) -> bool:
        try:
            return self._path(source, resized_hw).stat().st_size == size
        except OSError:
            return False

    def _path(self, source: Path, resized_hw: tuple[int, int]) -> Path:
        """OSError where `source` is not there."""
        status = source.stat()
        about = f"{source.resolve()}|{status.st_size}|{status.st_mtime_ns}|{resized_hw[0]}x{resized_hw[1]}|{_SCALING}"
        name = hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}.bgr"

"""Image files to canvases, ahead of the model: decoded and letterboxed by threads in the order of the list."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from parkdet.runtime.errors import DataError
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.image_headers import read_header
from parkdet.runtime.images import read_image

Job = TypeVar("Job")
Result = TypeVar("Result")

_LARGE_PIXELS = 64_000_000
_one_large = threading.Lock()
"""Held from the decoding of an image of more pixels until it is scaled: at the limit one takes 3 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageItem:
    """One image to be done."""

    image_id: int
    file_name: str
    path: Path | None
    """None for one that is known to be missing."""
    problem: str = "does not exist"
    """Why there is no path."""

    def file_bytes(self) -> int:
        """Size of the file; -1 where there is none."""
        try:
            return -1 if self.path is None else self.path.stat().st_size
        except OSError:
            return -1


@dataclass(slots=True)
class LoadedImage:
    """An image ready for the backend, or the reason why not."""

    item: ImageItem
    plan: int = 0
    """Index of the plan by which it was prepared, and is to be run."""
    pixels: ImageArray | None = None
    """Its canvas; the decoded image where the backend letterboxes."""
    letterbox: Letterbox | None = None
    file_bytes: int = -1
    reason: str = ""
    decode_s: float = 0.0
    letterbox_s: float = 0.0

    def take_pixels(self) -> ImageArray:
        """The pixels, handed over: a batch in progress must not hold them twice."""
        pixels, self.pixels = self.pixels, None
        assert pixels is not None
        return pixels


def load_image(
    item: ImageItem, plan: int, fit: Callable[[tuple[int, int]], Letterbox], onto_canvas: bool
) -> LoadedImage:
    """Decode one image and, if `onto_canvas`, letterbox it; `fit` chooses the letterbox by the image's (h, w)."""
    import cv2

    if item.path is None:
        return LoadedImage(item, plan, reason=item.problem)
    header = read_header(item.path)
    large = header.width * header.height > _LARGE_PIXELS
    with _one_large if large else nullcontext():
        started = time.perf_counter()
        try:
            image = read_image(item.path, header=header)
        except DataError as error:
            return LoadedImage(item, plan, reason=str(error).removeprefix(f"{item.path}: "))
        decoded = time.perf_counter()
        letterbox = fit((image.shape[0], image.shape[1]))
        try:
            pixels = letterbox.apply(image) if onto_canvas else image
        except (cv2.error, MemoryError) as error:
            return LoadedImage(item, plan, reason=f"cannot be scaled ({str(error).strip() or 'out of memory'})")
    return LoadedImage(
        item, plan, pixels, letterbox, file_bytes=header.file_bytes,
        decode_s=decoded - started, letterbox_s=time.perf_counter() - decoded,
    )  # fmt: skip


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Job], Result], jobs: Iterator[Job], window: int
) -> Generator[Result]:
    """Results of `work` in the order of the jobs, at most `window` of them begun and not yet taken.

    A job is drawn from the iterator only when its turn has come.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def single_threaded_cv2() -> Iterator[None]:
    """OpenCV without threads of its own: whole images are spread over ours."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)

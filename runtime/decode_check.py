"""Decode every image of a list in parallel, and tell which cannot be decoded or decode with losses.

What is found: whatever makes cv2 give up (any damaged PNG, by its checksums; WebP by its structure), and JPEG
files that libjpeg repairs with a warning (missing or surplus data, lost restart markers, codes that do not
exist). What cannot be found: damage that leaves a valid stream, such as a changed coefficient of a JPEG or
any changed pixel of a BMP, for these formats have no checksums.

cv2 releases the interpreter's lock, so threads would be as fast; but libjpeg and libpng speak through the
process's stderr only. Each worker is a process whose stderr is a file that it reads after every image, so a
warning has its image and none reaches the terminal.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

from parkdet.runtime.errors import DataError
from parkdet.runtime.terminal import interrupts_held_back

_BATCH = 8
"""Images per message to a worker: the messages cost little, and Ctrl-C waits for this many at most."""

_LOSSES = ("Corrupt JPEG data", "Premature end of JPEG", "libpng error", "libpng warning: IDAT")
"""Beginnings of the decoders' messages that mean lost pixels; others (colour profiles, dates) do not."""


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """One image to decode: its file and the displayed size that its header says."""

    path: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class DecodeProblem:
    """What decoding one image found; the text completes the sentence "FILE: ..."."""

    fatal: bool
    """True when there are no pixels at all."""
    text: str


def decode_all(
    tasks: Sequence[DecodeTask], progress: Callable[[int, int], None] | None = None
) -> dict[int, DecodeProblem]:
    """Problems by index of the task; sound images are absent. Uses every core this process may use.

    `progress(done, total)` is called now and then. Raises DataError when a decoder kills its process.
    """
    if not tasks:
        return {}
    workers = min(len(os.sched_getaffinity(0)), -(-len(tasks) // _BATCH))
    batches = iter([range(at, min(at + _BATCH, len(tasks))) for at in range(0, len(tasks), _BATCH)])
    problems: dict[int, DecodeProblem] = {}
    done = 0
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    running: dict[Future[list[DecodeProblem | None]], range] = {}
    try:
        while True:
            for batch in islice(batches, 2 * workers - len(running)):
                with interrupts_held_back():  # the first calls start the processes
                    running[pool.submit(_decode_batch, [tasks[i] for i in batch])] = batch
            if not running:
                break
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                results = finished.result()
                batch = running.pop(finished)
                problems.update((i, p) for i, p in zip(batch, results, strict=True) if p is not None)
                done += len(batch)
            if progress is not None:
                progress(done, len(tasks))
    except BrokenProcessPool:
        first = tasks[next(iter(running.values())).start].path
        raise DataError(
            f"{first}: at this image or one of the {sum(map(len, running.values())) - 1} behind it a decoding "
            "process ended by itself, most likely out of memory; close other programs, or take the largest "
            "of these images out"
        ) from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return problems


def _start_worker() -> None:
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    cv2.setNumThreads(1)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)


def _decode_batch(tasks: list[DecodeTask]) -> list[DecodeProblem | None]:
    return [_decode(task) for task in tasks]


def _decode(task: DecodeTask) -> DecodeProblem | None:
    import cv2
    import numpy as np

    try:
        content = np.fromfile(task.path, np.uint8)
    except OSError as error:
        return DecodeProblem(True, f"cannot be read ({error.strerror})")
    try:
        image, reason = cv2.imdecode(content, cv2.IMREAD_COLOR), None
    except (cv2.error, MemoryError) as error:
        image, reason = None, getattr(error, "err", None) or "out of memory"
    said = _messages()
    if reason is not None:
        return DecodeProblem(True, f"cannot be decoded ({reason})")
    if image is None:
        return DecodeProblem(True, f"cannot be decoded ({said[0]})" if said else "cannot be decoded")
    losses = [line for line in said if line.startswith(_LOSSES)]
    if losses:
        return DecodeProblem(False, f"decodes with losses ({losses[0]})")
    height, width = image.shape[:2]
    if (width, height) != (task.width, task.height):
        return DecodeProblem(False, f"decodes to {width} x {height}, its header says {task.width} x {task.height}")
    return None


def _messages() -> list[str]:
    """The lines that this process wrote to its stderr since the last call."""
    size = os.fstat(2).st_size
    if size == 0:
        return []
    text = os.pread(2, size, 0).decode("utf-8", "replace")
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()

"""Batches for training, made by worker processes that live as long as the loader.

The result is a function of (samples, settings, seed, epoch, position): the number of workers, an interruption
or another order of calls cannot change a pixel.
"""

from __future__ import annotations

import ctypes
import logging
import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from parkdet.runtime.errors import DataError
from parkdet.runtime.geometry import FloatArray, xyxy_to_cxcywh
from parkdet.runtime.terminal import interrupts_held_back
from parkdet.train.data.augment import AugmentSettings, LabelledCanvas, augmented
from parkdet.train.data.batch_memory import BatchMemory, Slot
from parkdet.train.data.image_store import CacheMode, ImageStore, UnreadableImageError
from parkdet.train.data.samples import Sample
from parkdet.train.data.sampling import (
    SampleRequest,
    augmentation_generator,
    batch_count,
    batches,
    epoch_indices,
    grouped_by_aspect,
    rect_canvas,
    replacement_index,
)

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of `mallopt` settings in glibc's malloc.h."""
WORKER_ENDED = "DataLoader worker (pid"
"""How torch's message begins where a worker was killed; it comes with the signal, wherever the parent is just then."""
MAX_REPLACEMENTS = 20
"""Unreadable images that one canvas puts up with before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingBatch:
    """A batch as the network and the loss take it."""

    images: Tensor
    """(B, 3, H, W) uint8, RGB, contiguous."""
    targets: Tensor
    """(M, 6) float32: image in the batch, class, then cx, cy, w, h as shares of the canvas."""
    image_ids: tuple[int, ...]
    """The data set's id of each canvas's own image (B,); a mosaic shows others beside it."""
    paths: tuple[tuple[str, ...], ...]
    """The files of each canvas (B,): its own first, then those of its mosaics, shown or not."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """File and reason of the images that were met, could not be used, and were replaced."""
    slot: Slot | None = None
    """In a worker: where `images` lie in memory that its parent sees too."""

    def __reduce__(self) -> tuple[Any, ...]:
        images = self.images if self.slot is None else self.slot
        return _received, (images, self.targets, self.image_ids, self.paths, self.unreadable)

    def pin_memory(self) -> TrainingBatch:
        """The same batch in page-locked memory; torch's loader calls it."""
        return TrainingBatch(
            images=self.images.pin_memory(),
            targets=self.targets.pin_memory(),
            image_ids=self.image_ids,
            paths=self.paths,
            unreadable=self.unreadable,
        )


def _received(
    images: Tensor | Slot,
    targets: Tensor,
    image_ids: tuple[int, ...],
    paths: tuple[tuple[str, ...], ...],
    unreadable: tuple[tuple[str, str], ...],
) -> TrainingBatch:
    """A batch as its parent sees it."""
    if isinstance(images, Slot):
        images = images.tensor()
    return TrainingBatch(images=images, targets=targets, image_ids=image_ids, paths=paths, unreadable=unreadable)


class TrainingSet(Dataset[TrainingBatch]):
    """Turns sample requests into batches. One copy of it lives in each worker."""

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: int,
        settings: AugmentSettings,
        seed: int,
        cache: CacheMode = "none",
        cache_dir: Path | None = None,
    ) -> None:
        if not samples:
            raise DataError("the training set has no image; run 'parkdet prepare' to see why")
        self.samples = tuple(samples)
        self.imgsz = imgsz
        self.settings = settings
        self.settings_of_whole_images = settings.model_copy(update={"mosaic": 0.0})
        self.seed = seed
        self.store = ImageStore(self.samples, imgsz, cache, cache_dir, settings.mosaic_window)
        self.memory: BatchMemory | None = None
        """Where workers write batches, if their parent has made such memory before they were forked."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, requests: list[SampleRequest]) -> TrainingBatch:
        """The batch of these requests. DataError when one of them meets only unreadable images."""
        height, width = requests[0].canvas_hw or (self.imgsz, self.imgsz)
        shape = (len(requests), 3, height, width)
        taken = self.memory.take(shape) if self.memory is not None and get_worker_info() is not None else None
        slot, images = taken or (None, torch.empty(shape, dtype=torch.uint8))
        targets, image_ids, paths = [], [], []
        unreadable: dict[str, str] = {}
        for number, request in enumerate(requests):
            canvas, indices = self.canvas(request, unreadable)
            red_green_blue = images[number].numpy()
            cv2.split(canvas.image, [red_green_blue[2], red_green_blue[1], red_green_blue[0]])
            targets.append(_target_rows(number, canvas))
            image_ids.append(self.samples[indices[0]].image_id)
            paths.append(tuple(str(self.samples[index].path) for index in indices))
        return TrainingBatch(
            images=images,
            targets=torch.from_numpy(np.concatenate(targets)),
            image_ids=tuple(image_ids),
            paths=tuple(paths),
            unreadable=tuple(unreadable.items()),
            slot=slot,
        )

    def canvas(self, request: SampleRequest, unreadable: dict[str, str]) -> tuple[LabelledCanvas, tuple[int, ...]]:
        """One request's canvas and the samples it is made from. What cannot be read is added to `unreadable`.

        An unreadable image gives its place to another one of the set, which the request alone determines.
        """
        indices = (request.index, *request.companions)
        settings = self.settings if request.mosaic else self.settings_of_whole_images
        for attempt in range(MAX_REPLACEMENTS + 1):
            rng = augmentation_generator(self.seed, request)
            shown = indices
            try:
                canvas = augmented(
                    lambda number, shown=shown: self.store.tile(shown[number]),  # type: ignore[misc]
                    self.imgsz,
                    settings,
                    rng,
                    request.canvas_hw,
                )
                return canvas, shown
            except UnreadableImageError as error:
                unreadable[str(self.samples[error.index].path)] = error.message
                other = replacement_index(self.seed, request, attempt, len(self))
                indices = tuple(other if index == error.index else index for index in indices)
            finally:
                self.store.release()
        reasons = "\n".join(list(unreadable.values())[:3])
        raise DataError(
            f"{MAX_REPLACEMENTS + 1} images in a row could not be used; run 'parkdet prepare --decode'. "
            f"The first of them:\n{reasons}"
        )


class TrainingLoader:
    """An endless supply of epochs from worker processes that start once.

    `epoch()` starts prefetching at once, so a caller can validate while the next epoch's first batches are
    made. Only one epoch is open at a time: the next call ends the one before.
    """

    def __init__(
        self,
        dataset: TrainingSet,
        *,
        batch_size: int,
        workers: int,
        parts: int = 1,
        shuffle: bool = True,
        rect_stride: int | None = None,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.parts = parts
        self.shuffle = shuffle
        self.rect_stride = rect_stride
        """Stride of rectangular canvases; None: squares."""
        self._aspects = np.array([height / width for height, width in (s.image_hw for s in dataset.samples)])
        self.rank = rank
        self.world = world
        self.unreadable: dict[str, str] = {}
        """File and reason of every image that could not be used so far."""
        self._plan = _Plan()
        # Forked workers share the image cache; where there is no fork, each receives a copy.
        context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        if workers > 0 and context == "fork":
            side = dataset.imgsz if rect_stride is None else math.ceil(dataset.imgsz / rect_stride) * rect_stride
            # Each worker fills one and has prefetched two others; the training has one, and may keep another.
            dataset.memory = BatchMemory(3 * workers + 2, 3 * batch_size * side**2)
        self._loader: DataLoader[TrainingBatch] = DataLoader(
            dataset,
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_already_a_batch,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            multiprocessing_context=context if workers > 0 else None,
            # Torch seeds its workers from this generator; without one of our own it would draw from the
            # global state, and with it the loader would move the random numbers of the training.
            generator=torch.Generator(),
        )
        self._note([(str(dataset.samples[i].path), text) for i, text in sorted(dataset.store.unreadable.items())])

    @property
    def batches_per_epoch(self) -> int:
        """Batches that this process takes in an epoch."""
        places = max(len(self.dataset) // self.parts, 1) if self.parts > 1 else len(self.dataset)
        return batch_count(places, self.batch_size, world=self.world)

    def epoch(
        self,
        epoch: int,
        *,
        weights: NDArray[np.float64] | None = None,
        start_batch: int = 0,
        mosaics: bool = True,
    ) -> Iterator[TrainingBatch]:
        """The batches of an epoch from `start_batch` on, of whole images where there are to be no `mosaics`.

        Prefetching starts now, not at the first `next`.
        """
        seed = self.dataset.seed
        indices = epoch_indices(len(self.dataset), seed, epoch, weights=weights, parts=self.parts, shuffle=self.shuffle)
        stride, canvas_of = self.rect_stride, None
        if stride is not None:
            step = self.batch_size * self.world
            indices = grouped_by_aspect(indices, self._aspects, step, seed, epoch)

            def canvas_of(members: NDArray[np.int64]) -> tuple[int, int]:
                return rect_canvas(self._aspects[members], self.dataset.imgsz, stride)

        self._plan.batches = list(
            batches(
                indices,
                self.batch_size,
                seed=seed,
                epoch=epoch,
                window=self.dataset.settings.mosaic_window,
                start_batch=start_batch,
                rank=self.rank,
                world=self.world,
                mosaics=mosaics,
                canvas_of=canvas_of,
            )
        )
        with interrupts_held_back(signal.SIGINT, signal.SIGTERM):
            prefetching = iter(self._loader)
        return self._noting(prefetching)

    def close(self) -> None:
        """End the workers. The loader can be used again; it then starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self._loader._iterator = None
        if self.dataset.memory is not None:
            self.dataset.memory.reclaim()

    def _noting(self, source: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        for batch in source:
            self._note(batch.unreadable)
            yield batch

    def _note(self, found: Sequence[tuple[str, str]]) -> None:
        for path, reason in found:
            if path not in self.unreadable:
                self.unreadable[path] = reason
                log.warning("%s (another image takes its place)", reason)


class _Plan:
    """The batches of the epoch that is open, as torch's loader asks for them."""

    def __init__(self) -> None:
        self.batches: list[list[SampleRequest]] = []

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _target_rows(number: int, canvas: LabelledCanvas) -> FloatArray:
    height, width = canvas.image.shape[:2]
    rows = np.empty((len(canvas.class_ids), 6), np.float32)
    rows[:, 0] = number
    rows[:, 1] = canvas.class_ids
    rows[:, 2:] = xyxy_to_cxcywh(canvas.xyxy) / np.array([width, height, width, height], np.float32)
    return rows


def _already_a_batch(batch: Any) -> Any:
    return batch


def _start_worker(_worker_id: int) -> None:
    # The parent process decides when to stop; `timeout`, batch systems and terminals signal the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_one)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    # A process for every image is parallel enough: more threads would only take turns.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let the C library keep what arrays of image size gave back: fresh pages from the kernel cost time.

    Where it has no such setting (not glibc) nothing changes.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        library.mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def _outlive_one(number: int, _frame: FrameType | None) -> None:
    """Ignore the first SIGTERM; a second one ends the worker, for torch sends its own to one that hangs."""
    signal.signal(number, signal.SIG_DFL)

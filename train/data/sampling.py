"""Which image stands where in an epoch, as a function of (seed, epoch, position) and of nothing else.

No generator lives from one batch to the next: an interrupted run that knows its epoch and the batches done
continues exactly, whatever the number of workers, and distributed processes agree without talking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COMPANIONS = 7
"""Images that a sample may need beside its own: three for its mosaic, four for the one it is mixed with."""

# The first word of a random stream says what it is for, so that no two uses share numbers.
_ORDER, _COMPANIONS, _AUGMENTATION, _REPLACEMENT, _GROUPS = range(5)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One place in an epoch: all that a loader's worker has to be told."""

    epoch: int
    position: int
    """Place in the epoch's index list, counted over all processes."""
    index: int
    """Which sample of the set."""
    companions: tuple[int, ...]
    """The `COMPANIONS` other samples, drawn from the epoch's index list: image weights hold for them too. Its own
    image may be among them."""
    mosaic: bool = True
    """Whether the settings' mosaics apply; if not, the canvas shows its own image alone."""
    canvas_hw: tuple[int, int] | None = None
    """Height and width of its batch's canvas in a rectangular training."""


def _generator(seed: int, *key: int) -> np.random.Generator:
    # Words of the spawn key, not of the entropy: SeedSequence([1, 2]) is SeedSequence([1, 2, 0]).
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def augmentation_generator(seed: int, request: SampleRequest) -> np.random.Generator:
    """The generator of one sample's augmentation."""
    return _generator(seed, _AUGMENTATION, request.epoch, request.position)


def replacement_index(seed: int, request: SampleRequest, attempt: int, count: int) -> int:
    """The sample that takes the place of an unreadable one; `attempt` counts those of the request."""
    return int(_generator(seed, _REPLACEMENT, request.epoch, request.position, attempt).integers(count))


def class_weights(class_ids_per_image: Sequence[NDArray[np.int32]], num_classes: int) -> NDArray[np.float64]:
    """Inverse box counts (num_classes,), normalised to sum 1; a class without a box counts 1."""
    counts = np.zeros(num_classes, np.int64)
    for class_ids in class_ids_per_image:
        counts += np.bincount(class_ids, minlength=num_classes)
    inverse = 1 / np.maximum(counts, 1)
    return np.asarray(inverse / inverse.sum(), np.float64)


def image_weights(
    class_ids_per_image: Sequence[NDArray[np.int32]],
    weight_per_class: NDArray[np.float64],
    ap_per_class: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Weight of every image (n,): the sum over its boxes of the class's weight times (1 - AP)^2.

    `ap_per_class` is from 0 to 1 (ValueError otherwise): 0 for a class not validated, or without truth.
    """
    if not np.all((ap_per_class >= 0) & (ap_per_class <= 1)):
        raise ValueError(f"the AP of a class is from 0 to 1, not {ap_per_class}")
    need = weight_per_class * (1 - ap_per_class) ** 2
    return np.array([need[class_ids].sum() for class_ids in class_ids_per_image], np.float64)


def epoch_indices(
    count: int,
    seed: int,
    epoch: int,
    *,
    weights: NDArray[np.float64] | None = None,
    parts: int = 1,
    shuffle: bool = True,
) -> NDArray[np.int64]:
    """Sample indices of one epoch, in order.

    Without weights every sample once; with weights (count,) `count` draws with replacement, uniform when all
    are zero. From this list `parts` > 1 draws max(count // parts, 1) with replacement. `shuffle=False`
    sorts the result.
    """
    if count < 1 or parts < 1:
        raise ValueError(f"an epoch needs at least one sample and one part, not {count} and {parts}")
    rng = _generator(seed, _ORDER, epoch)
    indices = np.arange(count, dtype=np.int64)
    if weights is not None:
        if weights.shape != (count,) or not np.all(np.isfinite(weights)) or np.any(weights < 0):
            raise ValueError(f"weights must be {count} finite numbers, none of them negative")
        total = weights.sum()
        indices = rng.choice(count, size=count, p=weights / total if total > 0 else None)
    elif shuffle:
        indices = rng.permutation(count)
    if parts > 1:
        indices = rng.choice(indices, size=max(count // parts, 1))
    indices = indices.astype(np.int64)
    return indices if shuffle else np.sort(indices)


def grouped_by_aspect(
    indices: NDArray[np.int64], aspects: NDArray[np.float64], batch: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The epoch's list in another order: batches of samples of like aspect (height / width), in random order.

    A batch that is not full stays at the end. Samples of one aspect keep the epoch's order among each other.
    """
    by_aspect = indices[np.argsort(aspects[indices], kind="stable")]
    full = len(by_aspect) // batch
    rng = _generator(seed, _GROUPS, epoch)
    # The samples that fill no batch are taken out at a random place, or it would always be the tallest ones.
    start = int(rng.integers(full + 1)) * batch
    spare = len(by_aspect) - full * batch
    rest, grouped = by_aspect[start : start + spare], np.delete(by_aspect, np.s_[start : start + spare])
    return np.concatenate((grouped.reshape(full, batch)[rng.permutation(full)].ravel(), rest))


def rect_canvas(aspects: NDArray[np.float64], imgsz: int, stride: int) -> tuple[int, int]:
    """The smallest canvas of whole strides that holds images of these aspects (height / width) at long side `imgsz`.

    Source: YOLOv5's rectangular training.
    """
    tallest, widest = float(aspects.max()), float(aspects.min())
    height, width = min(tallest, 1.0), min(1 / widest, 1.0)
    return tuple(max(math.ceil(round(side * imgsz / stride, 6)), 2) * stride for side in (height, width))  # type: ignore[return-value]


def batch_count(count: int, batch_size: int, *, world: int = 1) -> int:
    """Batches each process takes of an epoch of `count` places, the last one perhaps smaller."""
    return -(-count // (batch_size * world))


def companion_places(count: int, places: int, window: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Where in an epoch's list of `count` each of so many places finds its companions: (places, COMPANIONS).

    Uniformly among the last `window` places, up to its own; before the list's front comes its end, so that every
    place serves as often as another. A window of 0, or as long as the list, is all of it.
    """
    reach = min(window, count) or count
    back = rng.integers(reach, size=(places, COMPANIONS))
    return back if reach == count else (np.arange(places)[:, None] - back) % count


def batches(
    indices: NDArray[np.int64],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    window: int = 0,
    start_batch: int = 0,
    rank: int = 0,
    world: int = 1,
    mosaics: bool = True,
    canvas_of: Callable[[NDArray[np.int64]], tuple[int, int]] | None = None,
) -> Iterator[list[SampleRequest]]:
    """This process's batches of an epoch, from `start_batch` on.

    The batches of all processes at one step make up the batch of one process with `batch_size * world`. The
    list is filled from its front until the processes share it evenly, so that none waits for the others.
    `window` is that of `companion_places`; `canvas_of` gives the canvas for the samples of a batch of all processes.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"no batches of {batch_size} for process {rank} of {world}")
    padded = np.resize(indices, -(-len(indices) // world) * world)
    rng = _generator(seed, _COMPANIONS, epoch)
    companions = indices[companion_places(len(indices), len(padded), window, rng)]
    step = batch_size * world
    for start in range(start_batch * step, len(padded), step):
        share = (min(start + step, len(padded)) - start) // world
        first = start + rank * share
        canvas_hw = canvas_of(padded[start : start + step]) if canvas_of else None
        yield [
            SampleRequest(epoch, place, int(padded[place]), tuple(companions[place].tolist()), mosaics, canvas_hw)
            for place in range(first, first + share)
        ]

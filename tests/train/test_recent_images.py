"""Images kept after their use: what is given is what was put in, whoever asks, and what is looked at stays."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.runtime.geometry import ImageArray
from parkdet.train.data import image_store
from parkdet.train.data.augment import AugmentSettings
from parkdet.train.data.image_store import ImageStore
from parkdet.train.data.loader import TrainingBatch, TrainingLoader, TrainingSet
from parkdet.train.data.recent_images import RecentImages
from parkdet.train.data.samples import Sample

FORK = "fork" in multiprocessing.get_all_start_methods()


def flat(value: int, hw: tuple[int, int] = (2, 3)) -> ImageArray:
    return np.full((*hw, 3), value, np.uint8)


def make_samples(folder: Path, count: int) -> list[Sample]:
    """PNG images of one colour each, 16 x 24."""
    samples = []
    for number in range(count):
        path = folder / f"{number}.png"
        path.write_bytes(cv2.imencode(".png", flat(number % 256, (16, 24)))[1].tobytes())
        samples.append(Sample(number, path, (16, 24), np.zeros(1, np.int32), np.array([[2, 2, 9, 9]], np.float32)))
    return samples


def here(ring: RecentImages, images: int) -> list[int]:
    """The images that are in the ring, each of which must look as `flat` made it."""
    found = []
    for image in range(images):
        pixels = ring.get(image, (2, 3))
        if pixels is not None:
            np.testing.assert_array_equal(pixels, flat(image))
            found.append(image)
    ring.release()
    return found


def test_an_empty_ring_gives_nothing() -> None:
    assert RecentImages(3, 1, 18).get(2, (2, 3)) is None


def test_the_one_that_came_first_goes_first() -> None:
    ring = RecentImages(9, 3, 18)
    for image in (4, 0, 7):
        ring.put(image, flat(image))
    assert here(ring, 9) == [0, 4, 7]
    ring.put(4, flat(99))  # it is there already
    ring.put(2, flat(2))
    assert here(ring, 9) == [0, 2, 7]
    for image in (5, 1, 8, 3):
        ring.put(image, flat(image))
    assert here(ring, 9) == [1, 3, 8]


def test_images_of_several_shapes_share_the_slots() -> None:
    ring = RecentImages(3, 2, 60)
    shapes = [(4, 5), (5, 2), (1, 7)]
    for image, hw in enumerate(shapes):
        ring.put(image, flat(image, hw))
    for image, hw in enumerate(shapes):
        pixels = ring.get(image, hw)
        if image == 0:
            assert pixels is None
        else:
            assert pixels is not None
            np.testing.assert_array_equal(pixels, flat(image, hw))
            with pytest.raises(ValueError, match="read-only"):
                pixels[0, 0] = 1


def test_what_is_looked_at_is_not_overwritten() -> None:
    ring = RecentImages(9, 2, 18)
    ring.put(0, flat(0))
    ring.put(1, flat(1))
    first = ring.get(0, (2, 3))
    assert first is not None
    for image in (2, 3, 4):
        ring.put(image, flat(image))  # all of them in turn where 1 was
    np.testing.assert_array_equal(first, flat(0))
    second = ring.get(4, (2, 3))
    assert second is not None
    ring.put(5, flat(5))  # no slot is free: it is not kept
    np.testing.assert_array_equal(second, flat(4))
    assert here(ring, 9) == [0, 4]  # which releases all
    ring.put(6, flat(6))
    assert here(ring, 9) in ([0, 6], [4, 6])


def read_and_write(ring: RecentImages, seed: int, images: int, failed: Any) -> None:
    """Take images at random; what is not there is put in. Pixels must stay what they are while they are looked at."""
    random = np.random.default_rng(seed)
    for _ in range(1500):
        views = []
        for image in random.integers(images, size=4).tolist():
            pixels = ring.get(image, (30, 40))
            if pixels is None:
                ring.put(image, flat(image, (30, 40)))
            else:
                views.append((image, pixels))
        for image, pixels in views:
            if not (pixels == image).all():
                failed.value += 1
        ring.release()


@pytest.mark.skipif(not FORK, reason="memory is shared by forked processes")
def test_forked_processes_share_it_and_none_sees_a_half_written_image() -> None:
    context = multiprocessing.get_context("fork")
    ring, failed = RecentImages(20, 11, 3600), context.Value("i", 0)
    workers = [context.Process(target=read_and_write, args=(ring, seed, 20, failed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert failed.value == 0
    found = 0
    for image in range(20):
        pixels = ring.get(image, (30, 40))
        if pixels is not None:
            found += 1
            assert (pixels == image).all()
    assert found == 11  # what they left can be seen here, every slot is in use
    ring.release()
    for image in range(100, 111):
        ring.put(image - 100, flat(7, (30, 40)))
    assert not ring._readers.any()


def test_a_process_that_is_not_forked_gets_an_empty_one() -> None:
    ring = RecentImages(2, 2, 18)
    ring.put(1, flat(1))
    copied = pickle.loads(pickle.dumps(ring))
    assert here(copied, 2) == []
    assert here(ring, 2) == [1]


def decoded_by(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list of the images that a store decodes from now on."""
    decoded, read = list[int](), store._read

    def reading(index: int) -> ImageArray:
        decoded.append(index)
        return read(index)

    monkeypatch.setattr(store, "_read", reading)
    return decoded


@pytest.mark.parametrize(("count", "window"), [(40, 0), (40, 64), (300, 64), (301, 20)])
def test_an_image_is_decoded_about_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, window: int
) -> None:
    """Twice at most where a window is shorter than the set: before the epoch's front come images of its end."""
    dataset = TrainingSet(make_samples(tmp_path, count), 24, AugmentSettings(mosaic_window=window), 0)
    source = TrainingLoader(dataset, batch_size=4, workers=0)
    decoded = decoded_by(dataset.store, monkeypatch)
    for epoch in range(2):
        list(source.epoch(epoch))
        times = Counter(decoded)
        if window in (0, 64) and count == 40:
            assert len(decoded) == len(times) == 40  # in both epochs together
            continue
        assert max(times.values()) <= 3  # twice, or once more where two epochs meet
        assert len(decoded) <= count + 0.75 * window + 0.05 * count
        decoded.clear()


@pytest.mark.skipif(not FORK, reason="memory is shared by forked processes")
def test_workers_decode_for_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on its own would decode 1.8 images for each of an epoch's."""
    dataset = TrainingSet(make_samples(tmp_path, 300), 24, AugmentSettings(mosaic_window=64), 0)
    source = TrainingLoader(dataset, batch_size=4, workers=2)
    decoded, read = multiprocessing.get_context("fork").Value("i", 0), dataset.store._read

    def reading(index: int) -> ImageArray:
        with decoded.get_lock():
            decoded.value += 1
        return read(index)

    monkeypatch.setattr(dataset.store, "_read", reading)
    list(source.epoch(0))
    source.close()
    assert 300 <= decoded.value < 1.5 * 300


def test_memory_bounds_what_is_kept_and_changes_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples(tmp_path, 30)

    def batches(workers: int = 0) -> list[TrainingBatch]:
        dataset = TrainingSet(samples, 24, AugmentSettings(mosaic_window=9, mixup=0.5), 0)
        source = TrainingLoader(dataset, batch_size=4, workers=workers)
        made = list(source.epoch(3))
        source.close()
        return made

    expected = batches()
    size = 16 * 24 * 3
    for available, recent in ((4 * 5 * size, 10**9), (10**9, 3 * size), (4 * size - 1, 10**9)):
        monkeypatch.setattr(image_store, "available_memory", lambda available=available: available)
        monkeypatch.setattr(image_store, "RECENT_BYTES", recent)
        for workers in (0, 2):
            for one, other in zip(batches(workers), expected, strict=True):
                np.testing.assert_array_equal(one.images.numpy(), other.images.numpy())
    store = ImageStore(samples, 24, window=9)
    assert store._recent is None  # less memory than one image takes
    monkeypatch.setattr(image_store, "available_memory", lambda: 10**9)
    monkeypatch.setattr(image_store, "RECENT_BYTES", 10**9)
    ring = ImageStore(samples, 24, window=9)._recent
    assert ring is not None
    assert ring._pixels.shape == (12, size)

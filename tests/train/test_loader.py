"""Batches from worker processes: the same pixels whoever makes them, whatever happens on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from parkdet.runtime.errors import DataError, UsageError
from parkdet.train.data import image_store
from parkdet.train.data.augment import AugmentSettings
from parkdet.train.data.image_store import CacheMode, ImageStore, available_memory
from parkdet.train.data.loader import TrainingBatch, TrainingLoader, TrainingSet
from parkdet.train.data.samples import Sample

STILL = AugmentSettings(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)


def make_samples(folder: Path, count: int, boxes: int = 2, hw: tuple[int, int] = (48, 64)) -> list[Sample]:
    """PNG images of smooth noise; every third one has no boxes."""
    samples = []
    for number in range(count):
        random = np.random.default_rng(number)
        small = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / f"사진 {number}.png"
        encoded = cv2.imencode(".png", cv2.resize(small, hw[::-1], interpolation=cv2.INTER_CUBIC))[1]
        path.write_bytes(encoded.tobytes())
        here = boxes if number % 3 else 0
        xyxy = np.array([[4, 5, 30, 25], [20, 20, 60, 44]], np.float32)[:here]
        samples.append(Sample(100 + number, path, hw, np.arange(here, dtype=np.int32), xyxy))
    return samples


def loader(
    samples: list[Sample] | tuple[Sample, ...],
    *,
    settings: AugmentSettings | None = None,
    imgsz: int = 32,
    seed: int = 0,
    workers: int = 0,
    cache: CacheMode = "none",
    batch_size: int = 3,
    **options: Any,
) -> TrainingLoader:
    dataset = TrainingSet(samples, imgsz, settings or AugmentSettings(), seed, cache)
    return TrainingLoader(dataset, batch_size=batch_size, workers=workers, **options)


def assert_equal(first: list[TrainingBatch], second: list[TrainingBatch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
        assert (a.image_ids, a.paths) == (b.image_ids, b.paths)


def test_a_set_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="no image"):
        TrainingSet([], 32, STILL, 0)


def test_a_batch_without_any_box(tmp_path: Path) -> None:
    batch = next(loader(make_samples(tmp_path, 3, boxes=0)).epoch(0))
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    assert batch.targets.shape == (0, 6)
    assert batch.targets.dtype == torch.float32


def test_what_a_batch_holds(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 4)
    (batch,) = loader(samples, settings=STILL, imgsz=64, batch_size=4, shuffle=False).epoch(0)
    assert batch.image_ids == (100, 101, 102, 103)
    assert [paths[0] for paths in batch.paths] == [str(sample.path) for sample in samples]
    image = cv2.imdecode(np.fromfile(samples[1].path, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    np.testing.assert_array_equal(batch.images[1, :, 8:56].numpy(), image[..., ::-1].transpose(2, 0, 1))
    assert (batch.images[1, :, :8] == 114).all()
    assert (batch.images[1, :, 56:] == 114).all()
    expected = [[1, 0, 17 / 64, 23 / 64, 26 / 64, 20 / 64], [1, 1, 40 / 64, 40 / 64, 40 / 64, 24 / 64]]
    expected += [[2, *row[1:]] for row in expected]
    np.testing.assert_allclose(batch.targets.numpy(), expected, rtol=1e-6)


def test_an_epoch_without_mosaics_shows_whole_images(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 4)
    mosaics = STILL.model_copy(update={"mosaic": 1.0, "mixup": 1.0})
    made = loader(samples, settings=mosaics, imgsz=64, batch_size=4)
    assert_equal(
        list(made.epoch(2, mosaics=False)), list(loader(samples, settings=STILL, imgsz=64, batch_size=4).epoch(2))
    )
    assert not torch.equal(next(made.epoch(2)).images, next(made.epoch(2, mosaics=False)).images)


@pytest.mark.parametrize("window", [0, 4])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, window: int) -> None:
    samples = make_samples(tmp_path, 11)
    settings = AugmentSettings(mixup=0.5, degrees=10.0, perspective=0.0005, mosaic_window=window)
    runs = []
    plans: list[tuple[int, CacheMode]] = [(0, "none"), (1, "ram"), (2, "none")]
    for workers, cache in plans:
        source = loader(samples, settings=settings, workers=workers, cache=cache)
        runs.append([[*source.epoch(0)], [*source.epoch(1)]])
        source.close()
    for other in runs[1:]:
        assert_equal(runs[0][0], other[0])
        assert_equal(runs[0][1], other[1])
    assert not torch.equal(runs[0][0][0].images, runs[0][1][0].images)
    changed = next(loader(samples, settings=settings, seed=1).epoch(0))
    assert not torch.equal(runs[0][0][0].images, changed.images)


@pytest.mark.parametrize("window", [0, 4])
def test_an_epoch_continues_where_it_was_left(tmp_path: Path, window: int) -> None:
    samples, settings = make_samples(tmp_path, 11), AugmentSettings(mosaic_window=window)
    whole = list(loader(samples, settings=settings).epoch(5))
    source = loader(samples, settings=settings, workers=1)
    try:
        begun = source.epoch(5)
        next(begun)  # left open in the middle, with batches in flight
        assert_equal(list(source.epoch(5, start_batch=2)), whole[2:])
        assert_equal(list(source.epoch(5, start_batch=4)), [])
        assert_equal(list(source.epoch(5)), whole)
    finally:
        source.close()


def test_workers_stay_from_epoch_to_epoch_and_leave_the_global_generators_alone(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    source = loader(samples, workers=2)
    try:
        pids = []
        for epoch in range(3):
            list(source.epoch(epoch))
            pids.append({worker.pid or 0 for worker in multiprocessing.active_children()})
        assert pids[0] == pids[1] == pids[2]
        assert len(pids[0]) == 2
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        source.close()
    for pid in pids[0]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("count", "parts", "world"), [(11, 1, 1), (11, 1, 2), (31, 4, 1), (2, 5, 1)])
def test_the_number_of_batches_is_known_before(tmp_path: Path, count: int, parts: int, world: int) -> None:
    source = loader(make_samples(tmp_path, count), parts=parts, world=world)
    assert source.batches_per_epoch == len(list(source.epoch(0)))


def test_weights_reach_the_images_and_their_companions(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    weights = np.array([0, 1.0, 0, 1.0, 0])
    shown = {path for batch in loader(samples).epoch(0, weights=weights) for paths in batch.paths for path in paths}
    assert shown == {str(samples[1].path), str(samples[3].path)}


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_once_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: CacheMode, workers: int
) -> None:
    samples = make_samples(tmp_path, 6)
    bad = samples[2].path
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    source = loader(samples, cache=cache, workers=workers)
    try:
        batches = [batch for epoch in range(3) for batch in source.epoch(epoch)]
    finally:
        source.close()
    assert sum(len(batch.images) for batch in batches) == 18
    assert list(source.unreadable) == [str(bad)]
    assert str(bad) in source.unreadable[str(bad)]
    assert caplog.text.count(str(bad)) == 1
    assert "another image takes its place" in caplog.text
    assert_equal(batches, [b for epoch in range(3) for b in loader(samples).epoch(epoch)])


def test_an_image_of_another_size_than_its_boxes_are_for_is_not_used(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 3)
    turned = Sample(7, samples[0].path, (64, 48), samples[0].class_ids, samples[0].xyxy)
    with pytest.raises(DataError, match=r"decodes to 64 x 48 pixels, its boxes are for 48 x 64"):
        ImageStore([turned], 32).image(0)
    path = tmp_path / "large.jpg"  # decoded at an eighth, it is told by its own size
    path.write_bytes(cv2.imencode(".jpg", np.zeros((480, 640, 3), np.uint8))[1].tobytes())
    for hw, fits in (((480, 640), True), ((640, 480), False), ((488, 640), False)):
        store = ImageStore([Sample(7, path, hw, samples[0].class_ids, samples[0].xyxy)], 32)
        if fits:
            assert store.image(0).shape == (24, 32, 3)
        else:
            with pytest.raises(DataError, match=rf"to 640 x 480 pixels, its boxes are for {hw[1]} x {hw[0]}"):
                store.image(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_that_cannot_be_read_at_all_stops_the_run(tmp_path: Path, workers: int) -> None:
    samples = make_samples(tmp_path, 3)
    for sample in samples:
        sample.path.unlink()
    source = loader(samples, workers=workers)
    with pytest.raises(DataError, match="images in a row could not be used"):
        next(source.epoch(0))
    source.close()


def test_the_cache_holds_the_images_at_their_size(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 3, hw=(50, 80))
    cached, read = ImageStore(samples, 40, "ram"), ImageStore(samples, 40)
    assert cached.cache_bytes == 3 * 25 * 40 * 3
    for sample in samples:
        sample.path.rename(sample.path.with_suffix(".moved"))
    for index in range(3):
        assert cached.image(index).shape == (25, 40, 3)
    for sample in samples:
        sample.path.with_suffix(".moved").rename(sample.path)
    for index in range(3):
        np.testing.assert_array_equal(cached.image(index), read.image(index))


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples(tmp_path, 3)
    need = 3 * 24 * 32 * 3
    monkeypatch.setattr(image_store, "available_memory", lambda: 2 * need - 1)
    with pytest.raises(UsageError, match="use cache=none"):
        ImageStore(samples, 32, "ram")
    monkeypatch.setattr(image_store, "available_memory", lambda: 2 * need)
    ImageStore(samples, 32, "ram")


def test_available_memory_is_the_smaller_of_system_and_container(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    (cgroup / "memory").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    assert available_memory(proc, cgroup) == 500 * 1024
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1000\n")
    assert available_memory(proc, cgroup) == 500 * 1024
    (cgroup / "memory.max").write_text("21000\n")
    assert available_memory(proc, cgroup) == 20_000
    (cgroup / "memory" / "memory.limit_in_bytes").write_text("1500\n")
    (cgroup / "memory" / "memory.usage_in_bytes").write_text("2000\n")
    assert available_memory(proc, cgroup) == 0
    assert available_memory() > 0


INTERRUPTED = """
    import signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.path.insert(0, {tests!r})
    from test_loader import loader, make_samples
    source = loader(make_samples(Path({folder!r}), 60), workers=2, batch_size=2)
    epoch = source.epoch(0)
    next(epoch)
    try:
        print("started", flush=True)
        while True:
            for _ in source.epoch(0):
                time.sleep(0.01)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        print(sum(1 for _ in source.epoch(1)), flush=True)
        source.close()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals to process groups are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_parent_only(tmp_path: Path, number: signal.Signals) -> None:
    """The signal goes to the whole process group, as terminals and `timeout` send it; the workers go on working."""
    program = textwrap.dedent(INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    process = subprocess.Popen(
        # Torch warns where there are more workers than cores, which is not what is tested.
        [sys.executable, "-W", "ignore", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("stopped\n30\n", "", 0)

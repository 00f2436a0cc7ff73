"""Memory of batches: nothing that is still looked at is written over, and nothing is lost."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from parkdet.train.data.augment import AugmentSettings
from parkdet.train.data.batch_memory import BatchMemory, Slot
from parkdet.train.data.loader import TrainingLoader, TrainingSet
from parkdet.train.data.samples import Sample

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="memory is shared by forked processes"
)


def taken(memory: BatchMemory) -> int:
    gc.collect()
    return int(memory._taken.sum())


def written(memory: BatchMemory, value: int, shape: tuple[int, ...] = (2, 3)) -> Slot:
    """What a worker does."""
    place = memory.take(shape)
    assert place is not None
    place[1].fill_(value)
    return place[0]


def test_a_slot_is_free_again_when_nothing_shows_it() -> None:
    memory = BatchMemory(2, 8)
    first, second = written(memory, 1), written(memory, 2, (8,))
    assert memory.take((1,)) is None
    one = pickle.loads(pickle.dumps(first)).tensor()
    two = second.tensor()
    assert one.tolist() == [[1, 1, 1], [1, 1, 1]]
    row = one[1]
    del one
    assert taken(memory) == 2  # a view of it is left
    assert memory.take((1,)) is None
    floats = two.float()
    del two
    assert taken(memory) == 1
    third = written(memory, 3).tensor()
    assert (row == 1).all() and (floats == 2).all() and (third == 3).all()
    del row, third
    assert taken(memory) == 0


def test_what_is_larger_than_a_slot_has_no_place() -> None:
    memory = BatchMemory(1, 8)
    assert memory.take((3, 3)) is None
    assert memory.take((2, 4)) is not None


def test_what_lost_workers_had_taken_is_free_again() -> None:
    memory = BatchMemory(3, 4)
    seen = written(memory, 1, (4,)).tensor()
    written(memory, 2, (4,))
    memory.reclaim()
    assert taken(memory) == 1
    assert seen.tolist() == [1] * 4


def test_the_memory_goes_with_its_loader_but_not_before_its_tensors() -> None:
    memory = BatchMemory(1, 4)
    tensor = written(memory, 7, (4,)).tensor()
    del memory
    gc.collect()
    assert tensor.tolist() == [7] * 4


def test_a_forked_process_frees_nothing_of_its_parent() -> None:
    memory = BatchMemory(1, 4)
    kept = [written(memory, 7, (4,)).tensor()]
    child = multiprocessing.get_context("fork").Process(target=kept.clear)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert taken(memory) == 1
    kept.clear()
    assert taken(memory) == 0


def samples(folder: Path, count: int) -> list[Sample]:
    import cv2

    made = []
    for number in range(count):
        path = folder / f"{number}.png"
        path.write_bytes(cv2.imencode(".png", np.full((20, 30, 3), number, np.uint8))[1].tobytes())
        made.append(Sample(number, path, (20, 30), np.zeros(0, np.int32), np.zeros((0, 4), np.float32)))
    return made


def test_batches_that_are_kept_stay_what_they_are_and_all_are_given_back(tmp_path: Path) -> None:
    made = samples(tmp_path, 40)
    plain = TrainingLoader(TrainingSet(made, 32, AugmentSettings(), 0), batch_size=3, workers=0)
    expected = [batch.images for batch in plain.epoch(0)]
    source = TrainingLoader(TrainingSet(made, 32, AugmentSettings(), 0), batch_size=3, workers=2)
    memory = source.dataset.memory
    assert memory is not None
    kept = []
    in_memory = 0
    try:
        for number, batch in enumerate(source.epoch(0)):
            assert batch.slot is None
            in_memory += any(batch.images.data_ptr() == row.ctypes.data for row in memory._bytes)
            if number % 2:  # most of the slots are soon kept: workers then do without
                kept.append((number, batch.images[1:]))
        assert in_memory >= 8
        for number, images in kept:
            assert torch.equal(images, expected[number][1:])
        kept.clear()
        unfinished = source.epoch(1)
        next(unfinished)
        assert len(list(source.epoch(2))) == 14
    finally:
        source.close()
    del batch, images, unfinished
    assert taken(memory) == 0
    for again, one in zip(source.epoch(0), expected, strict=True):  # new workers
        assert torch.equal(again.images, one)
    source.close()

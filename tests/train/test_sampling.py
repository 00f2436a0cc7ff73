"""Which image stands where in an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.train.data.sampling import (
    COMPANIONS,
    SampleRequest,
    augmentation_generator,
    batch_count,
    batches,
    class_weights,
    companion_places,
    epoch_indices,
    image_weights,
    replacement_index,
)


def chi_square(counts: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def flat(plan: Iterable[list[SampleRequest]]) -> list[SampleRequest]:
    return [request for batch in plan for request in batch]


def test_an_epoch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        epoch_indices(0, 0, 0)
    with pytest.raises(ValueError, match="one part"):
        epoch_indices(3, 0, 0, parts=0)


def test_without_weights_every_sample_comes_once_in_another_order_each_epoch() -> None:
    first, second = (epoch_indices(50, 7, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.dtype == np.int64
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_indices(50, 8, 0))
    np.testing.assert_array_equal(first, epoch_indices(50, 7, 0))
    np.testing.assert_array_equal(epoch_indices(50, 7, 0, shuffle=False), np.arange(50))


def test_weighted_draws_follow_the_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 5.0, 2.0])
    draws = np.concatenate([epoch_indices(5, 3, epoch, weights=weights) for epoch in range(4000)])
    counts = np.bincount(draws, minlength=5)
    assert counts[0] == 0
    # 99.9th percentile of chi-square with 3 degrees of freedom
    assert chi_square(counts[1:], weights[1:] / 10 * 20_000) < 16.27


def test_weights_that_are_all_zero_draw_uniformly_with_replacement() -> None:
    draws = np.concatenate([epoch_indices(5, 3, e, weights=np.zeros(5)) for e in range(4000)])
    assert chi_square(np.bincount(draws, minlength=5), np.full(5, 4000.0)) < 18.47  # 4 degrees of freedom
    assert any(len(set(epoch_indices(5, 3, e, weights=np.zeros(5)))) < 5 for e in range(5))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [np.nan, 1.0], [np.inf, 1.0], [1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be 2 finite"):
        epoch_indices(2, 0, 0, weights=np.array(weights))


def test_parts_draw_a_share_of_the_weighted_list_with_replacement() -> None:
    assert len(epoch_indices(31, 0, 0, parts=15)) == 2
    assert len(epoch_indices(3, 0, 0, parts=15)) == 1
    draws = [epoch_indices(30, 0, epoch, parts=3) for epoch in range(3000)]
    assert all(len(part) == 10 for part in draws)
    assert any(len(set(part.tolist())) < 10 for part in draws)
    counts = np.bincount(np.concatenate(draws), minlength=30)
    assert chi_square(counts, np.full(30, 1000.0)) < 58.3  # 99.9 % at 29 degrees of freedom
    weights = np.arange(30.0)
    weighted = np.concatenate([epoch_indices(30, 0, e, weights=weights, parts=3) for e in range(3000)])
    assert np.corrcoef(np.bincount(weighted, minlength=30), weights)[0, 1] > 0.98


def test_class_weights_by_hand() -> None:
    labels = [np.array([0, 0, 2], np.int32), np.array([], np.int32), np.array([0], np.int32)]
    # counts 3, 0 (counts 1), 1: inverses 1/3, 1, 1 sum to 7/3
    np.testing.assert_allclose(class_weights(labels, 3), [1 / 7, 3 / 7, 3 / 7])
    np.testing.assert_allclose(class_weights([], 2), [0.5, 0.5])


def test_image_weights_by_hand() -> None:
    labels = [np.array([0, 0, 1], np.int32), np.array([], np.int32), np.array([1], np.int32)]
    weights = image_weights(labels, np.array([0.25, 0.75]), np.array([0.5, 0.0]))
    np.testing.assert_allclose(weights, [2 * 0.25 * 0.25 + 0.75, 0, 0.75])
    for bad in (-1.0, np.nan, 1.5):
        with pytest.raises(ValueError, match="from 0 to 1"):
            image_weights(labels, np.array([0.25, 0.75]), np.array([bad, 0.0]))


def test_batches_hold_every_place_in_order_and_resume_anywhere() -> None:
    indices = epoch_indices(23, 1, 4)
    plan = list(batches(indices, 5, seed=1, epoch=4))
    assert [len(batch) for batch in plan] == [5, 5, 5, 5, 3]
    assert len(plan) == batch_count(23, 5)
    assert [r.index for r in flat(plan)] == indices.tolist()
    assert [r.position for r in flat(plan)] == list(range(23))
    for start in range(6):
        assert list(batches(indices, 5, seed=1, epoch=4, start_batch=start)) == plan[start:]


def test_companions_come_from_the_epochs_own_list() -> None:
    indices = np.array([3, 3, 8], np.int64)
    plan = [flat(batches(indices, 2, seed=0, epoch=epoch)) for epoch in range(1000)]
    companions = np.array([request.companions for epoch in plan for request in epoch])
    assert companions.shape == (3000, COMPANIONS)
    counts = np.bincount(companions.ravel(), minlength=9)
    assert counts.sum() == counts[3] + counts[8]
    assert chi_square(counts[[3, 8]], np.array([14_000.0, 7_000.0])) < 10.83  # 1 degree of freedom


def test_companions_of_a_window_are_the_last_places_each_as_often() -> None:
    count, window, epochs = 60, 12, 400
    back = np.empty((epochs, count, COMPANIONS), np.int64)
    served = np.zeros(count, np.int64)
    for epoch in range(epochs):
        places = companion_places(count, count, window, np.random.default_rng(epoch))
        assert places.min() >= 0
        served += np.bincount(places.ravel(), minlength=count)
        for place in range(count):
            # By counting back, from the front on to the end.
            backwards = [(place - step) % count for step in range(window)]
            back[epoch, place] = [backwards.index(other) for other in places[place]]
    draws = epochs * COMPANIONS
    # 99.9 % at 11 and at 59 degrees of freedom
    assert chi_square(np.bincount(back.ravel(), minlength=window), np.full(window, draws * count / window)) < 31.3
    assert chi_square(served, np.full(count, float(draws))) < 98.3
    for place in (0, 5, 11, 12, 59):  # at the front as in the middle
        counts = np.bincount(back[:, place].ravel(), minlength=window)
        assert chi_square(counts, np.full(window, draws / window)) < 31.3


def test_a_window_as_long_as_the_epoch_is_all_of_it() -> None:
    whole = companion_places(9, 12, 0, np.random.default_rng(1))
    for window in (9, 10, 1000):
        np.testing.assert_array_equal(companion_places(9, 12, window, np.random.default_rng(1)), whole)
    assert set(whole.ravel()) == set(range(9))
    assert (companion_places(9, 12, 1, np.random.default_rng(1)) == (np.arange(12) % 9)[:, None]).all()


def test_an_epoch_with_a_window_resumes_anywhere_and_is_shared_by_processes() -> None:
    indices = epoch_indices(23, 1, 4)
    plan = list(batches(indices, 4, seed=1, epoch=4, window=6))
    for start in range(7):
        assert list(batches(indices, 4, seed=1, epoch=4, window=6, start_batch=start)) == plan[start:]
    place = {int(index): number for number, index in enumerate(indices)}
    for request in flat(plan):
        assert all((request.position - place[other]) % 23 < 6 for other in request.companions)
    shares = [flat(batches(indices, 2, seed=1, epoch=4, window=6, rank=rank, world=2)) for rank in (0, 1)]
    by_place = {request.position: request for share in shares for request in share}
    assert [by_place[request.position] for request in flat(plan)] == flat(plan)


@pytest.mark.parametrize(("count", "batch", "world"), [(23, 4, 2), (24, 4, 2), (5, 8, 4), (1, 2, 3), (30, 3, 3)])
def test_processes_share_the_batches_of_one(count: int, batch: int, world: int) -> None:
    indices = epoch_indices(count, 0, 0)
    whole = list(batches(indices, batch * world, seed=0, epoch=0))
    shares = [list(batches(indices, batch, seed=0, epoch=0, rank=r, world=world)) for r in range(world)]
    assert {len(share) for share in shares} == {batch_count(count, batch, world=world)}
    for step, together in enumerate(zip(*shares, strict=True)):
        assert len({len(part) for part in together}) == 1
        joined = [request for part in together for request in part]
        assert joined[: len(whole[step])] == whole[step]
        # Places past the end repeat the epoch from its front.
        assert [r.index for r in joined] == [int(indices[r.position % count]) for r in joined]
    with pytest.raises(ValueError, match="process 2 of 2"):
        next(batches(indices, 1, seed=0, epoch=0, rank=2, world=2))


def test_every_place_has_random_numbers_of_its_own() -> None:
    requests = [r for e in range(3) for r in flat(batches(np.arange(4), 2, seed=0, epoch=e))]
    first = {augmentation_generator(seed, r).random() for r in requests for seed in (0, 1, 2)}
    assert len(first) == len(requests) * 3
    again = augmentation_generator(1, requests[5]).random(4)
    np.testing.assert_array_equal(again, augmentation_generator(1, requests[5]).random(4))


def test_replacements_are_determined_and_cover_the_set() -> None:
    request = flat(batches(np.arange(4), 2, seed=0, epoch=0))[0]
    draws = [replacement_index(0, request, attempt, 6) for attempt in range(200)]
    assert draws == [replacement_index(0, request, attempt, 6) for attempt in range(200)]
    assert set(draws) == set(range(6))

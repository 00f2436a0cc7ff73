"""The seeded split: the contest's draw, and smaller sets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.split import Split, split_ids


def test_no_images() -> None:
    assert split_ids([]) == Split((), ())


def test_one_image_trains() -> None:
    assert split_ids([5]) == Split((5,), ())


@pytest.mark.parametrize(
    ("images", "validation"), [(2, 1), (7, 1), (8, 1), (15, 1), (16, 2), (205, 25), (24_650, 3000)]
)
def test_default_count(images: int, validation: int) -> None:
    assert len(split_ids(range(images)).val_ids) == validation


def test_the_contests_draw() -> None:
    ids = list(range(24_650, 0, -1))
    split = split_ids(ids)
    assert list(split.val_ids) == random.Random(100).sample(ids, 3000)
    assert split.val_ids[:3] == (19877, 9593, 9743)
    held_out = set(split.val_ids)
    assert list(split.train_ids) == [i for i in ids if i not in held_out]


def test_the_order_in_the_file_and_the_seed_decide() -> None:
    assert split_ids(range(80)) == split_ids(range(80))
    assert split_ids(range(80)) != split_ids(range(79, -1, -1))
    assert split_ids(range(80)) != split_ids(range(80), seed=1)


def test_count_and_fraction() -> None:
    assert len(split_ids(range(10), count=9).val_ids) == 9
    assert split_ids(range(10), count=0).val_ids == ()
    assert len(split_ids(range(10), fraction=0.5).val_ids) == 5
    assert split_ids(range(10), fraction=0).val_ids == ()


@pytest.mark.parametrize(("images", "count"), [(10, 10), (10, 11), (10, -1), (1, 1), (0, 1)])
def test_a_count_that_leaves_nothing_to_train(images: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} validation images cannot be drawn from {images}"):
        split_ids(range(images), count=count)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_cannot_be(fraction: float) -> None:
    with pytest.raises(UsageError, match="fraction"):
        split_ids(range(10), fraction=fraction)


def test_an_id_twice() -> None:
    with pytest.raises(DataError, match="image id 4 is there twice"):
        split_ids([1, 4, 2, 4])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True), st.integers(0, 1000))
def test_every_image_is_in_one_part(ids: list[int], seed: int) -> None:
    split = split_ids(ids, seed)
    assert sorted(split.train_ids + split.val_ids) == sorted(ids)
    assert [i for i in ids if i in set(split.train_ids)] == list(split.train_ids)

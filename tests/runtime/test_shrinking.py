"""Area averaging by a part against OpenCV's, and against the mean of the areas in whole numbers."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.shrinking import shrink_by_a_part


def pixels(rng: np.random.Generator, height: int, width: int, grey_levels: int) -> ImageArray:
    """Of as many grey levels, from black to white: with two of them every sum is an extreme one."""
    return (rng.integers(0, grey_levels, (height, width, 3)) * 255 // (grey_levels - 1)).astype(np.uint8)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4, 6, 8]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([2, 3, 256]),
    st.booleans(),
)
@example(0, 6, 5, 5, 256, False)  # 30 // 4 * 5 is 35, too
def test_it_is_opencvs_result(seed: int, q: int, rows: int, columns: int, grey_levels: int, mirrored: bool) -> None:
    image = pixels(np.random.default_rng(seed), rows * (q + 1), columns * (q + 1), grey_levels)
    if mirrored:
        image = image[:, ::-1]
    found = shrink_by_a_part(image, (rows * q, columns * q))
    assert found is not None
    assert found.flags.c_contiguous
    assert np.array_equal(found, cv2.resize(image, (columns * q, rows * q), interpolation=cv2.INTER_AREA))


def test_it_is_the_mean_of_the_areas() -> None:
    image = pixels(np.random.default_rng(0), 10, 15, 256)
    # Each pixel cut into 4 x 4, and 5 x 5 of these make one.
    fine = image.astype(int).repeat(4, axis=0).repeat(4, axis=1)
    sums = fine.reshape(8, 5, 12, 5, 3).sum(axis=(1, 3))
    found = shrink_by_a_part(image, (8, 12))
    assert found is not None
    assert np.array_equal(found, (2 * sums + 25) // 50)


@pytest.mark.parametrize(
    ("shape", "hw"),
    [((10, 10, 3), (8, 9)), ((8, 8, 3), (6, 6)), ((10, 10, 3), (5, 5)), ((10, 10, 1), (8, 8)), ((10, 11, 3), (8, 8)),
     ((12, 12, 3), (10, 10)), ((2, 3, 3), (1, 2)), ((4, 3, 3), (3, 2))],
)  # fmt: skip
def test_other_sizes_are_left_to_opencv(shape: tuple[int, ...], hw: tuple[int, int]) -> None:
    assert shrink_by_a_part(np.zeros(shape, np.uint8), hw) is None


def test_the_contests_canvas_is_opencvs() -> None:
    image = pixels(np.random.default_rng(1), 1080, 1920, 256)
    box = Letterbox.fit((1080, 1920), 1536, 64)
    inside = box.apply(image)[box.top : box.top + 864, box.left : box.left + 1536]
    assert np.array_equal(inside, cv2.resize(image, (1536, 864), interpolation=cv2.INTER_AREA))

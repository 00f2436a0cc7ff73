"""The letterbox kernel, run on the CPU, against OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parkdet.runtime.cuda.kernels import letterbox_launch
from parkdet.runtime.geometry import Letterbox
from tests.gpu_free.kernels.cases import letterbox_cases
from tests.gpu_free.kernels.simulation import Simulation

CASES = {case.name: case for case in letterbox_cases()}


@pytest.mark.parametrize("name", CASES)
def test_case(simulation: Simulation, name: str) -> None:
    case = CASES[name]
    got = simulation.letterbox(case.letterbox, case.image, case.schedule)
    np.testing.assert_array_equal(got, case.expected())


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    imgsz=st.integers(1, 120),
    stride=st.sampled_from([1, 8, 32]),
    contrast=st.sampled_from([1, 20, 255]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_image(
    simulation: Simulation, height: int, width: int, imgsz: int, stride: int, contrast: int, seed: int
) -> None:
    """Within one grey level everywhere; the grey around the image exactly."""
    box = Letterbox.fit((height, width), imgsz, stride)
    image = np.random.default_rng(seed).integers(255 - contrast, 256, (height, width, 3), dtype=np.uint8)
    got, right = simulation.letterbox(box, image).astype(int), box.apply(image).astype(int)
    assert np.abs(got - right).max() <= 1
    outside = np.ones(box.canvas_hw, bool)
    outside[box.top : box.top + box.resized_hw[0], box.left : box.left + box.resized_hw[1]] = False
    assert (got[outside] == 114).all()


@pytest.mark.parametrize("hw", [(1080, 1920), (1920, 1080), (2160, 3840), (720, 1280), (1536, 2048), (480, 640)])
def test_photographs_sizes_are_equal_to_the_bit(simulation: Simulation, hw: tuple[int, int]) -> None:
    """The sizes of cameras at 1536 pixels, noise in the place of a photograph, a band of rows compared."""
    box = Letterbox.fit(hw, 1536, 64)
    image = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    right = box.apply(image)
    got = simulation.letterbox(box, image)
    np.testing.assert_array_equal(got, right)


def test_a_side_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="a side of 900000 pixels scaled to 1536 is too long"):
        letterbox_launch(Letterbox.fit((10, 900_000), 1536, 64), 0, 0)


def test_a_canvas_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="a canvas of 26800 x 26800 pixels is too large"):
        letterbox_launch(Letterbox.fit((10, 10), 10, 8, (26_800, 26_800)), 0, 0)


@pytest.mark.bench
def test_how_often_a_grey_level_differs(simulation: Simulation) -> None:
    """`./dev benchmarks tests/gpu_free/kernels/test_letterbox.py`: random images of up to 140 pixels a side."""
    random = np.random.default_rng(1)
    for name, larger in (("shrunk", False), ("enlarged", True)):
        images = values = differ = in_images = worst = 0
        while images < 5000:
            height, width, imgsz = (int(side) for side in random.integers(1, 141, 3))
            if (imgsz > max(height, width)) != larger:
                continue
            box = Letterbox.fit((height, width), imgsz, int(random.choice([1, 8, 32])))
            image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            apart = np.abs(simulation.letterbox(box, image).astype(int) - box.apply(image))
            images, values, differ = images + 1, values + apart.size, differ + int((apart > 0).sum())
            in_images, worst = in_images + bool(apart.any()), max(worst, int(apart.max()))
        print(
            f"{name}: {differ:,} of {values:,} values differ, by {worst} at most, in {in_images} of {images:,} images"
        )
        assert worst <= 1

"""The post-processing kernels, run on the CPU, against runtime/heads.py and nms.py, to the bit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parkdet.runtime.cuda.kernels import HeadGeometry, Launch, NmsParameters, nms_parameters
from parkdet.runtime.heads import RawHead, decode_candidates
from parkdet.runtime.heads import sigmoid as numpy_sigmoid
from parkdet.runtime.nms import NmsSettings, suppress
from tests.gpu_free.kernels.cases import NmsCase, model, nms_cases, random_heads
from tests.gpu_free.kernels.simulation import Simulation
from tests.gpu_free.kernels.specification import difference, sigmoid

CASES = {case.name: case for case in nms_cases()}


def differs(simulation: Simulation, case: NmsCase, schedule: int | None = None) -> str:
    got = simulation.nms(
        case.heads,
        case.geometries,
        case.settings,
        max_candidates=case.max_candidates,
        schedule=case.schedule if schedule is None else schedule,
    )
    return difference(got, case.expected())


@pytest.mark.parametrize("name", CASES)
def test_case(simulation: Simulation, name: str) -> None:
    assert not differs(simulation, CASES[name])


@pytest.mark.parametrize("schedule", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", ["as in the contest", "over the cap in many blocks", "three tiles, few boxes"])
def test_no_schedule_changes_a_bit(simulation: Simulation, name: str, schedule: int) -> None:
    assert not differs(simulation, CASES[name], schedule)


SETTINGS = st.builds(
    NmsSettings,
    conf=st.sampled_from([0.0, 0.001, 0.01, 0.25, 0.5, 0.9]),
    iou=st.sampled_from([0.0, 0.2, 0.45, 0.5, 0.7, 1.0]),
    max_det=st.sampled_from([1, 2, 50, 300]),
    multi_label=st.booleans(),
    agnostic=st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> NmsCase:
    """Any detector, canvas and settings; logits from a few values (ties) or many, some of them no numbers."""
    tta = draw(st.booleans())
    spec = model(
        draw(st.sampled_from([1, 2, 14, 31, 32, 33, 80])),
        levels=draw(st.integers(2 if tta else 1, 4)),
        anchors=draw(st.integers(1, 4)),
        tta=tta,
    )
    side = st.integers(1, 4 if spec.stride_max < 64 else 2)
    canvas_hw = (draw(side) * spec.stride_max, draw(side) * spec.stride_max)
    palette = draw(st.sampled_from([(), (-1.0, 0.5), (-3.0, 0.0, 0.25, 2.0)]))
    heads = random_heads(
        spec,
        canvas_hw,
        draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**32 - 1)),
        objectness=draw(st.sampled_from([-60.0, -4.0, -1.0, 2.0])),
        spread=draw(st.sampled_from([0.1, 2.0, 30.0])),
        dtype=np.float16 if draw(st.booleans()) else np.float32,
        palette=palette,
    )
    if draw(st.booleans()):
        random = np.random.default_rng(1)
        for head in heads:
            head[random.random(head.shape) < 0.01] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 65504.0]))
    return NmsCase(
        name="",
        spec=spec,
        canvas_hw=canvas_hw,
        heads=heads,
        settings=draw(SETTINGS),
        max_candidates=draw(st.sampled_from([1, 30, 500, 2048, 3000])),
        schedule=draw(st.integers(0, 5)),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_heads(simulation: Simulation, case: NmsCase) -> None:
    assert not differs(simulation, case)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_heads_at_length(simulation: Simulation, case: NmsCase) -> None:
    assert not differs(simulation, case)


def test_a_partial_batch_leaves_the_rest_alone(simulation: Simulation) -> None:
    case = CASES["as in the contest"]
    got = simulation.nms(case.heads, case.geometries, case.settings, max_candidates=case.max_candidates, images=1)
    assert not difference(got, case.expected()[:1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_contest_at_full_size(simulation: Simulation) -> None:
    """The three views of 1600 x 896, 163,170 anchors, 14 classes, two images: one ordinary, one over the cap."""
    spec = model(14, levels=4, tta=True)
    heads = random_heads(spec, (896, 1600), 2, seed=0, objectness=-10)
    for head in heads:
        head[1, ..., 4] += 7
    case = NmsCase(
        name="", spec=spec, canvas_hw=(896, 1600), heads=heads, settings=NmsSettings(), max_candidates=30_000
    )
    assert sum(geometry.num_anchors for geometry in case.geometries) == 163_170
    (_, ordinary), (_, crowded) = case.expected()
    assert 0 < ordinary.candidates < 30_000 < crowded.candidates
    assert not differs(simulation, case)


@pytest.mark.slow
def test_shared_fixture(simulation: Simulation, shared: Any) -> None:
    """Raw heads of a YOLOv5, with numpy's exponential: scores may differ in the last places, boxes in 1e-3 pixels."""
    fixture = np.load(shared / "fixtures" / "yolov5n6_nc14_official.npz")
    heads: list[RawHead] = [fixture[f"raw{level}"] for level in range(4)]
    anchors = ((19, 27, 44, 40, 38, 94), (96, 68, 86, 152, 180, 137), (140, 301, 303, 264, 238, 542),
               (436, 615, 739, 380, 925, 792))  # fmt: skip
    spec = model(14, levels=4)
    spec = type(spec)(
        class_names=spec.class_names,
        strides=spec.strides,
        anchors=tuple(tuple((float(a[i]), float(a[i + 1])) for i in (0, 2, 4)) for a in anchors),
        imgsz=256,
    )
    case = NmsCase(name="", spec=spec, canvas_hw=(192, 256), heads=heads, settings=NmsSettings())
    right = [suppress(c, case.settings)[0] for c in decode_candidates(heads, spec, case.settings.conf)]
    for (found, _), wanted in zip(simulation.nms(heads, case.geometries, case.settings), right, strict=True):
        assert found.class_ids.tolist() == wanted.class_ids.tolist()
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=2e-6)
        np.testing.assert_allclose(found.xyxy, wanted.xyxy, atol=1e-3)


def test_the_exponential(simulation: Simulation) -> None:
    """The kernels' sigmoid is the specification's to the bit, and the true one but for the last places."""
    raw = np.concatenate([np.linspace(-110, 110, 30_001), [np.inf, -np.inf, -88.5, -88.7, 0, -0.0]]).astype(np.float32)
    got = np.array([simulation.library.simulated_sigmoid(ctypes.c_float(x)) for x in raw], np.float32)
    assert got.tobytes() == sigmoid(raw).tobytes()
    with np.errstate(over="ignore"):
        true = 1 / (1 + np.exp(-raw.astype(np.float64)))
    # 3 places: two of the exponential and its sum with 1, one of the quotient. An exponential too large gives 0.
    np.testing.assert_array_less(np.abs(got - true), 3 * np.spacing(np.maximum(got, np.float32(1e-38))) + 3e-39)
    np.testing.assert_allclose(got, numpy_sigmoid(raw), rtol=5e-7, atol=1e-38)


def test_every_half_is_read_as_numpy_reads_it(simulation: Simulation) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    got = np.array([simulation.library.simulated_half(int(half)) for half in bits], np.float32)
    np.testing.assert_array_equal(got, bits.view(np.float16).astype(np.float32))


def geometry(count: int, grid_hw: tuple[int, int] = (2, 2), anchors: int = 1) -> Sequence[HeadGeometry]:
    return [HeadGeometry(grid_hw=grid_hw, stride=8, anchors_wh=((8.0, 8.0),) * anchors)] * count


@pytest.mark.parametrize(
    ("heads", "classes", "words"),
    [
        (geometry(0), 1, "1 to 16 heads, not 0"),
        (geometry(17), 1, "1 to 16 heads, not 17"),
        (geometry(1, anchors=9), 1, "1 to 8 anchors a cell, not 9"),
        (geometry(1), 0, "not 0 and 30000"),
        (geometry(2, (20_000, 20_000)), 3, "800,000,000 anchors of 3 classes are more"),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(heads: Sequence[HeadGeometry], classes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nms_parameters(heads, classes, NmsSettings(), half_heads=True)


def test_the_simulation_reports_what_no_gpu_runs(simulation: Simulation) -> None:
    launch = Launch("parkdet_reset", (0, 1, 1), (256, 1, 1), NmsParameters())
    with pytest.raises(RuntimeError, match="a grid must not be empty"):
        simulation.launch(launch)

"""The plan in Python (kernels.py) and the plan in C++ (plan.h) are one: the plugin and the backend launch the same."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from parkdet.runtime.cuda.kernels import (
    LetterboxParameters,
    NmsParameters,
    OutputLayout,
    bind_workspace,
    head_geometries,
    letterbox_launch,
    logit_floor,
    nms_launches,
    nms_parameters,
    workspace_bytes,
)
from parkdet.runtime.cuda.work import X6_FLOPS_PER_PIXEL, contest_spec
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.nms import NmsSettings
from tests.gpu_free.kernels.cases import model
from tests.gpu_free.kernels.simulation import Simulation


class PlannedLaunch(ctypes.Structure):
    """What simulate.cpp writes down of a launch."""

    _fields_ = (
        ("entry", ctypes.c_char * 32),
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("round", ctypes.c_int),
    )

    @property
    def record(self) -> tuple[str, tuple[int, int, int], tuple[int, int, int], int]:
        return self.entry.decode(), (self.grid_x, self.grid_y, 1), (self.threads, 1, 1), self.round


def test_the_structs_are_as_large(simulation: Simulation) -> None:
    for entry, parameters in (("parkdet_select", NmsParameters), ("parkdet_letterbox", LetterboxParameters)):
        assert simulation.library.simulated_parameter_bytes(entry.encode()) == ctypes.sizeof(parameters)
    assert simulation.library.simulated_parameter_bytes(b"parkdet") == 0
    assert ctypes.sizeof(NmsParameters) <= 4096, "the driver's limit for parameters"


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("max_candidates", [1, 2048, 2049, 30_000])
def test_parameters_workspace_and_launches(simulation: Simulation, batch: int, max_candidates: int) -> None:
    spec, settings = model(3, levels=4, anchors=5, tta=True), NmsSettings(conf=0.03, iou=0.6, max_det=7)
    geometries = head_geometries(spec, (128, 192))
    ours = nms_parameters(geometries, 3, settings, half_heads=True, max_candidates=max_candidates)
    ours.batch = batch
    bind_workspace(ours, 0x1000)

    theirs = NmsParameters()
    theirs.num_classes, theirs.batch, theirs.half_heads, theirs.max_candidates = 3, batch, 1, max_candidates
    theirs.max_det, theirs.multi_label, theirs.agnostic = 7, 1, 0
    theirs.conf, theirs.iou = 0.03, 0.6
    for head in geometries:
        shapes = np.array(head.anchors_wh, np.float32)
        assert simulation.library.planned_head(
            ctypes.byref(theirs), len(shapes), *head.grid_hw, ctypes.c_float(head.stride),
            ctypes.c_float(head.view_scale), int(head.view_flip), shapes.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
    size = simulation.library.planned_workspace(ctypes.byref(theirs), ctypes.c_uint64(0x1000))
    assert size == workspace_bytes(batch, max_candidates)
    assert bytes(ours) == bytes(theirs)

    planned = (PlannedLaunch * 32)()
    count = simulation.library.planned_launches(ctypes.byref(theirs), planned)
    launches = nms_launches(ours)
    assert [launch.record for launch in planned[:count]] == [
        (launch.entry, launch.grid, launch.block, launch.parameters.round) for launch in launches
    ]
    for launch in launches:  # the round is all that differs
        launch.parameters.round = 0
        assert bytes(launch.parameters) == bytes(ours)


def test_the_letterbox_is_launched_alike(simulation: Simulation) -> None:
    launch = letterbox_launch(Letterbox.fit((100, 70), 90, 8), 1, 2)
    planned = PlannedLaunch()
    simulation.library.planned_letterbox(ctypes.byref(launch.parameters), ctypes.byref(planned))
    assert planned.record == (launch.entry, launch.grid, launch.block, 0)


@pytest.mark.parametrize("conf", [1e-6, 0.01, 0.5, 0.999, 0.999999])
def test_no_sigmoid_at_or_under_the_floor_passes(conf: float) -> None:
    floor = float(np.float32(logit_floor(conf)))
    assert 1 / (1 + math.exp(-floor)) < conf * (1 - 1e-7), "not even if the last places err"
    assert floor > math.log(conf / (1 - conf)) - 2e-3 - 2e-6 / (1 - conf), "nor much lower"


def test_the_floor_of_no_threshold_and_of_one_that_nothing_passes() -> None:
    assert (logit_floor(0.0), logit_floor(1.0)) == (-math.inf, math.inf)


def test_outputs_lie_apart_and_aligned() -> None:
    layout = OutputLayout(3, 50)
    arrays = layout.arrays(np.zeros(layout.nbytes, np.uint8))
    for value, array in enumerate(arrays.values(), 1):
        array[...] = value
    for value, array in enumerate(arrays.values(), 1):
        assert (array == value).all()
    assert arrays["boxes"].shape == (3, 50, 4)
    assert layout.nbytes % 256 == 0


@pytest.mark.slow
def test_the_engine_that_the_work_is_compared_with() -> None:
    """Operations of YOLOv5x6 with 14 classes, counted by torch in our own model: within a thousandth."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from parkdet.train.model.network import build_network

    spec = contest_spec()
    network = build_network("yolov5x6", spec.class_names, spec.imgsz).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 640, 640, device="meta"))
    assert counter.get_total_flops() / 640**2 == pytest.approx(X6_FLOPS_PER_PIXEL, rel=0.001)

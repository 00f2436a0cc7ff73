"""The post-processing kernels, run on the CPU, against runtime/heads.py and nms.py, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from parkdet.runtime.cuda.kernels import head_geometries
from parkdet.runtime.heads import RawHead
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings
from tests.gpu_free.kernels.simulation import Simulation
from tests.gpu_free.kernels.specification import difference, expected


def spec_of(classes: int, levels: int = 3) -> ModelSpec:
    strides = (8, 16, 32, 64)[:levels]
    return ModelSpec(
        class_names=tuple(f"class {index}" for index in range(classes)),
        strides=strides,
        anchors=tuple(((1.25 * s, 1.625 * s), (3.75 * s, 2.875 * s), (2.0 * s, 4.0 * s)) for s in strides),
        imgsz=256,
    )


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("mean_objectness", [-30.0, -4.0, 2.0])
def test_random_heads(simulation: Simulation, mean_objectness: float, half: bool) -> None:
    spec, settings = spec_of(14), NmsSettings()
    geometries = head_geometries(spec, (64, 96))
    rng = np.random.default_rng(0)
    means = np.zeros(19)
    means[4] = mean_objectness
    heads: list[RawHead] = [rng.normal(means, 2, (2, 3, *g.grid_hw, 19)).astype(np.float32) for g in geometries]
    if half:
        heads = [head.astype(np.float16) for head in heads]
    for schedule in (0, 1, 2):
        got = simulation.nms(heads, geometries, settings, max_candidates=1000, schedule=schedule)
        assert not difference(got, expected(heads, spec, settings, max_candidates=1000))

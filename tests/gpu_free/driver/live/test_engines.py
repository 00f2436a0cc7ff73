"""The command line builds an engine through the real bindings, the gate runs it, and so do Detector and `infer`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parkdet.runtime import Detector, engine_sidecar
from parkdet.runtime.backends.base import BackendOptions
from parkdet.runtime.backends.tensorrt import TensorRtBackend
from parkdet.runtime.errors import ParkdetError
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.nms import NmsSettings
from parkdet.train import save_checkpoint
from tests.conftest import RunCli
from tests.export.conftest import small_network
from tests.gpu_free.driver.live.conftest import SimulatedTensorRt
from tests.gpu_free.driver.simulated.engines import picture

CANVAS = ("--canvas", "128x192")
HW = (128, 192)
NMS = NmsSettings(conf=0.2, iou=0.5, max_det=20)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live") / "best.pt"
    save_checkpoint(path, small_network(imgsz=192))
    return path


@pytest.fixture
def built(weights: Path, run_cli: RunCli, native: SimulatedTensorRt) -> Path:  # noqa: ARG001 - it runs the engine
    """The engine and its sidecar, exported once."""
    path = weights.with_name("best.sm86.engine")
    if not path.is_file():
        code, out, err = run_cli("export", "--weights", weights, "--engine", "tensorrt", *CANVAS, "--batch-size", "1-4")
        assert code == 0, err
        assert out.split() == [str(weights.with_name("best.fp16.onnx")), str(path)]
    return path


def test_export_builds_proves_and_describes(built: Path, trt: Any) -> None:
    report = json.loads(built.with_name("best.sm86.engine.parity.json").read_text())
    assert report["passed"]
    assert any("by tensorrt" in str(one) for one in report.values()), report
    told = engine_sidecar.check(
        built, flavour="tensorrt", version=trt.__version__, architecture=86,
        graph=built.with_name("best.fp16.onnx"),
    )  # fmt: skip
    assert (told.batch.low, told.batch.high, told.canvas_height.best) == (1, 4, 128)


def test_what_the_engine_finds_is_what_the_graph_finds(built: Path, native: SimulatedTensorRt) -> None:
    images = [picture(*hw, seed=seed) for seed, hw in enumerate([(108, 192), (54, 96), (216, 384), (108, 180)])]
    with Detector(built.with_name("best.fp16.onnx"), conf=0.3, backend="onnxruntime") as detector:
        wanted = detector.batch(images)
    assert sum(map(len, wanted)) > 10
    with Detector(built, conf=0.3, device="cuda:0") as detector:
        for _ in range(3):  # as it is, recorded, replayed
            for found, right in zip(detector.batch(images), wanted, strict=True):
                assert np.array_equal(found.class_ids, right.class_ids)
                assert np.allclose(found.xyxy, right.xyxy, atol=0.05)
                assert np.allclose(found.scores, right.scores, atol=1e-3)
    calls = "\n".join(native.calls())
    assert "createExecutionContext 2" in calls  # memory is the user's
    assert "setInputShape images 4x128x192x3" in calls
    assert "setDeviceMemoryV2 4" in calls


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("createInferRuntime", "createInferRuntime was made to fail"),
        ("deserializeCudaEngine", "cannot load it: deserializeCudaEngine was made to fail"),
        ("createExecutionContext", "no execution context could be made: createExecutionContext was"),
        ("setInputShape", "images of .* were refused: setInputShape was"),
        ("inferShapes", "the shapes .*: inferShapes was"),
        ("updateDeviceMemorySizeForShapes", "updateDeviceMemorySizeForShapes was"),
        ("setTensorAddress", "the address of '.*' was refused: setTensorAddress was"),
        ("enqueueV3", "a run could not be enqueued: enqueueV3 was"),
    ],
)
def test_each_native_no_is_an_error_with_its_log(
    built: Path, native: SimulatedTensorRt, method: str, message: str
) -> None:
    images, letterboxes = [picture(108, 192, 1)], [Letterbox.fit((108, 192), 192, 16, HW)]
    native.refuse(method)
    with (
        pytest.raises(ParkdetError, match=message) as failure,
        TensorRtBackend(built, BackendOptions(device="cuda:0")) as backend,
    ):
        backend.detect(images, letterboxes, NMS)
    assert str(failure.value).startswith(str(built))


def test_a_graph_that_ends_in_the_plugin(weights: Path, run_cli: RunCli, native: SimulatedTensorRt) -> None:
    given = ("export", "--weights", weights, "--engine", "tensorrt", *CANVAS, "--head", "plugin")
    code, _, err = run_cli(*given, "--plugin", os.environ["LIVE_PLUGIN"])
    assert code == 0, err
    assert f"loadLibrary {os.environ['LIVE_PLUGIN']}" in native.calls()
    assert "getCreator ParkdetNMS 1 parkdet" in native.calls()

"""What the tests on a GPU share: the device, an engine built here, and the report that they leave.

On the simulated driver the same tests run at small sizes, so that what is to run on a GPU has run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from parkdet.export.tensorrt_build import BuildSettings, build_engine
from parkdet.runtime.cuda.driver import Device, call
from parkdet.runtime.cuda.fatbin import sources_digest
from parkdet.runtime.engine_sidecar import Flavour, ShapeRange
from parkdet.runtime.errors import UsageError
from tests.gpu_free.driver.simulated.engines import CANVAS, describe_engine, engine_spec, make_engine
from tests.runtime.conftest import TinyModel

REPORT = "PARKDET_GPU_REPORT"
"""Names the file of the report; without it none is written."""
SIMULATED = "SIMULATED_CUDA_ORDER" in os.environ

_figures: dict[str, Any] = {}
_outcomes: dict[str, str] = {}


@pytest.fixture(scope="session")
def figures() -> dict[str, Any]:
    """What was measured, by name: it goes into the report."""
    return _figures


@pytest.fixture(scope="session")
def gpu() -> Iterator[Device]:
    """The first GPU, current; skipped where there is none."""
    try:
        opened = Device(int(os.environ.get("PARKDET_GPU", "0")))
    except UsageError as error:
        pytest.skip(str(error))
    with opened, opened.current():
        free, total = opened.memory()
        _figures["device"] = {
            "name": opened.name, "capability": opened.capability, "free": free, "total": total, "simulated": SIMULATED,
            "bytes_per_second": opened.bandwidth(), "cuda_of_the_driver": call("cuDriverGetVersion"),
        }  # fmt: skip
        yield opened


@pytest.fixture(scope="session")
def model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture(scope="session", params=["fp16"] if SIMULATED else ["fp32", "fp16", "fp16 for RTX"])
def engine(
    request: pytest.FixtureRequest, gpu: Device, model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The tiny detector as an engine for batches up to 4, by the project's builder; its stem is its kind."""
    path = tmp_path_factory.mktemp("engine") / f"{request.param.replace(' ', '-')}.engine"
    if SIMULATED:
        from tests.gpu_free.driver.simulated.tensorrt_double import tensorrt_double

        double = tensorrt_double("11")
        sys.modules[double.__name__] = double
        yield make_engine(path, model)
        del sys.modules[double.__name__]
        return
    flavour: Flavour = "tensorrt-rtx" if request.param.endswith("RTX") else "tensorrt"
    name = flavour.replace("-", "_")
    trt = pytest.importorskip(name, reason=f"{name} is not installed: pip install {flavour}-cu13")
    architecture = gpu.capability[0] * 10 + gpu.capability[1]
    if flavour == "tensorrt-rtx" and not hasattr(trt.ComputeCapability, f"SM{architecture}"):
        pytest.skip(f"TensorRT for RTX makes no engines for compute capability {architecture / 10}")
    seconds = build(path, model, trt, flavour, half="fp16" in request.param, architecture=architecture)
    _figures[f"engine, {request.param}"] = {"version": trt.__version__, "build_seconds": seconds}
    yield path


def build(path: Path, model: TinyModel, trt: Any, flavour: Flavour, half: bool, architecture: int) -> float:
    """Write an engine and its sidecar, as `parkdet export` does: the seconds that the build took."""
    graph = onnx.load(model.save(path.with_suffix(".onnx"), fixed=("B", *CANVAS)))  # type: ignore[arg-type]
    if half:
        _in_half(graph)
    settings = BuildSettings(
        flavour=flavour, architectures=(architecture,) if flavour == "tensorrt-rtx" else (),
        batch=ShapeRange(low=1, best=4, high=4), canvas_height=ShapeRange.fixed(CANVAS[0]),
        canvas_width=ShapeRange.fixed(CANVAS[1]),
    )  # fmt: skip
    spec = engine_spec(model, half=half)
    built = build_engine(trt, graph.SerializeToString(), path.stem, spec, settings, print)
    path.write_bytes(built.plan)
    describe_engine(
        path, model, half=half, flavour=flavour, version=trt.__version__, architectures=(architecture,)
    )  # fmt: skip
    return built.seconds


def _in_half(model: onnx.ModelProto) -> None:
    """The tiny detector's graph in float16, from the cast of the images on."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
    for output in model.graph.output:
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = f": {report.longrepr}" if report.outcome != "passed" else ""
        _outcomes[report.nodeid.rpartition("::")[2]] = report.outcome + why[:4000]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _answer(*command: str) -> str | None:
    """What a program says; None where there is none or it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


LIBRARIES = (
    "parkdet",
    "cuda-bindings",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "torch",
    "numpy",
    "onnx",
    "opencv-python-headless",
)
SMI = ("nvidia-smi", "--query-gpu=name,driver_version,clocks.max.memory,power.limit,temperature.gpu", "--format=csv")


def pytest_sessionfinish() -> None:
    target = os.environ.get(REPORT)
    if target and _outcomes:
        counted = Counter(outcome.partition(":")[0] for outcome in _outcomes.values())
        told = {
            "platform": platform.platform(), "python": platform.python_version(),
            "when": time.strftime("%FT%TZ", time.gmtime()),
            "sources": {"commit": _answer("git", "describe", "--always", "--dirty"), "kernels": sources_digest()},
            "driver": _answer(*SMI), "libraries": {name: _version(name) for name in LIBRARIES},
            "counts": counted, "figures": _figures, "outcomes": _outcomes,
        }  # fmt: skip
        Path(target).write_text(json.dumps(told, indent=1) + "\n")
        told_short = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counted.items()))
        print(f"\nreport: {target} ({told_short})")

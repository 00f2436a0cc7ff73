"""What the tests on a GPU share: the device, an engine built here, and the report that they leave.

On the simulated driver the same tests run at small sizes, so that what is to run on a GPU has run.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.cuda.driver import Device
from parkdet.runtime.errors import UsageError
from tests.gpu_free.driver.simulated.engines import describe_engine, make_engine
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
            "bytes_per_second": opened.bandwidth(),
        }  # fmt: skip
        yield opened


@pytest.fixture(scope="session")
def model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture(scope="session")
def engine(gpu: Device, model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny detector as an engine of the TensorRT that is installed, for batches up to 4."""
    path = tmp_path_factory.mktemp("engine") / "tiny.engine"
    if SIMULATED:
        from tests.gpu_free.driver.simulated.tensorrt_double import tensorrt_double

        double = tensorrt_double("11")
        sys.modules[double.__name__] = double
        yield make_engine(path, model)
        del sys.modules[double.__name__]
        return
    trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed: pip install tensorrt-cu13")
    started = time.perf_counter()
    onnx = model.save(path.with_suffix(".onnx"), fixed=("B", 80, 112))  # type: ignore[arg-type]
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(onnx.read_bytes()), parser.get_error(0)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("images", (1, 80, 112, 3), (4, 80, 112, 3), (4, 80, 112, 3))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    path.write_bytes(bytes(plan))
    _figures["engine"] = {"tensorrt": trt.__version__, "build_seconds": time.perf_counter() - started}
    architecture = gpu.capability[0] * 10 + gpu.capability[1]
    describe_engine(path, model, version=trt.__version__, half=False, architectures=(architecture,))
    yield path


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = f": {report.longrepr}" if report.outcome != "passed" else ""
        _outcomes[report.nodeid.rpartition("::")[2]] = report.outcome + why[:4000]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def pytest_sessionfinish() -> None:
    target = os.environ.get(REPORT)
    if target and _outcomes:
        told = {
            "platform": platform.platform(), "python": platform.python_version(),
            "when": time.strftime("%FT%TZ", time.gmtime()),
            "libraries": {name: _version(name) for name in ("parkdet", "cuda-bindings", "tensorrt-cu13", "torch")},
            "figures": _figures, "outcomes": _outcomes,
        }  # fmt: skip
        Path(target).write_text(json.dumps(told, indent=1) + "\n")
        print(f"\nreport: {target}")

"""The tests of the simulated driver, run on it: streams late, early and in between."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.cuda.driver import Device
from parkdet.runtime.errors import UsageError

_WITHOUT = "said where the driver, or cuda-bindings, is not there: the simulation has both; a test below runs the first"
_FIGURE = "for the report's distance to the limit: run by `test_what_is_to_run_on_a_gpu_runs`, which is not measured"
UNREACHED = {
    "except RuntimeError as error:  # what the bindings raise where libcuda is missing or lacks the function": _WITHOUT,
    "raise UsageError(": _WITHOUT,
    "except ImportError as error:": _WITHOUT,
    "raise UsageError(\"cuda-bindings is missing: 'parkdet[gpu]' and 'parkdet[rtx]' bring it\") from error": _WITHOUT,
    "attributes = _bindings().CUdevice_attribute": _FIGURE,
    "kilohertz = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)": _FIGURE,
    "bits = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)": _FIGURE,
    "return 2 * kilohertz * 1000 * bits / 8  # data moves on both edges of the clock": _FIGURE,
}
"""Line that is not run on the simulated driver -> why."""
HEADER = next(
    (place for place in (Path("/usr/local/cuda/include"), Path("/usr/include")) if (place / "cuda.h").exists()), None
)


SIMULATED = "tests/gpu_free/driver/simulated"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler")
# What runs on the device, and what launches it, as far as it needs a GPU.
MEASURED = ("runtime/cuda/driver.py", "runtime/cuda/device_kernels.py", "runtime/backends/tensorrt*.py")


def test_everything_with_streams_as_late_as_can_be(
    on_simulation: Callable[..., Any], tmp_path: Path, repository: Path
) -> None:
    data = f"--data-file={tmp_path / 'coverage'}"
    outcome = on_simulation("-m", "coverage", "run", data, f"--include={','.join(MEASURED)}", *PYTEST, SIMULATED)
    assert outcome.code == 0, outcome.output
    report = on_simulation("-m", "coverage", "report", data, "--show-missing", "--skip-empty")
    print(report.output, *(f"not run: {line}\n    {why}" for line, why in UNREACHED.items()), sep="\n")
    figures = tmp_path / "coverage.json"
    told = on_simulation("-m", "coverage", "json", data, "-q", "-o", str(figures))
    assert told.code == 0, told.output
    files = json.loads(figures.read_text())["files"]
    assert {Path(file).name for file in files} >= {"driver.py", "tensorrt.py", "tensorrt_engine.py"}
    missing = {
        (repository / file).read_text().splitlines()[line - 1].strip()
        for file, found in files.items()
        for line in found["missing_lines"]
    }
    assert missing == set(UNREACHED), report.output


def test_what_is_to_run_on_a_gpu_runs(on_simulation: Callable[..., Any], tmp_path: Path) -> None:
    """`./dev test-gpu` at small sizes, report included."""
    report = tmp_path / "report.json"
    outcome = on_simulation(*PYTEST, "-m", "gpu", "tests/gpu", PARKDET_GPU_REPORT=str(report))
    assert outcome.code == 0, outcome.output
    told = json.loads(report.read_text())
    assert told["figures"]["device"]["simulated"] is True
    assert told["figures"]["soak, fp16"]["bytes_lost"] == 0
    assert told["counts"] == {"passed": len(told["outcomes"]) - 1, "skipped": 1}
    assert len(told["sources"]["kernels"]) == 64
    skipped = [name for name, how in told["outcomes"].items() if not how.startswith("passed")]
    assert skipped == ["test_the_plugin_through_trtexec"], told["outcomes"]


@pytest.mark.parametrize("order", ["early", pytest.param("7", marks=pytest.mark.slow)])
def test_what_depends_on_order_with_streams_early_and_in_between(on_simulation: Callable[..., Any], order: str) -> None:
    which = "test_driver or threads or recorded or mixed_up or others_on_the_device"
    outcome = on_simulation(*PYTEST, SIMULATED, "-k", which, order=order)
    assert outcome.code == 0, outcome.output


def test_without_a_driver_the_remedy_is_told() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(UsageError, match=r"no NVIDIA driver that has cuInit .* install the driver or update it"):
        Device()


def test_the_numbers_are_those_of_cuda_h(tmp_path: Path, repository: Path) -> None:
    if HEADER is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the header cuda.h of a CUDA toolkit")
    errors = {
        "SUCCESS": "CUDA_SUCCESS",
        **{
            name: f"CUDA_ERROR_{name}"
            for name in (
                "INVALID_VALUE", "OUT_OF_MEMORY", "NOT_INITIALIZED", "INVALID_DEVICE", "INVALID_IMAGE",
                "INVALID_CONTEXT", "INVALID_HANDLE", "NOT_FOUND", "NOT_READY", "ILLEGAL_ADDRESS", "LAUNCH_FAILED",
                "LAUNCH_OUT_OF_RESOURCES", "NOT_SUPPORTED", "STREAM_CAPTURE_UNSUPPORTED", "STREAM_CAPTURE_INVALIDATED",
                "STREAM_CAPTURE_UNJOINED", "STREAM_CAPTURE_ISOLATION", "STREAM_CAPTURE_IMPLICIT",
            )
        },
        **{
            name: f"CU_DEVICE_ATTRIBUTE_{name}"
            for name in (
                "MAX_THREADS_PER_BLOCK", "MAX_SHARED_MEMORY_PER_BLOCK", "WARP_SIZE", "CLOCK_RATE",
                "MULTIPROCESSOR_COUNT", "MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH", "UNIFIED_ADDRESSING",
                "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
            )
        },
        "FUNCTION_MAX_THREADS_PER_BLOCK": "CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK",
        "FUNCTION_MAX_DYNAMIC_SHARED_SIZE_BYTES": "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
        "STREAM_NON_BLOCKING": "CU_STREAM_NON_BLOCKING",
        "POINTER_MEMORY_TYPE": "CU_POINTER_ATTRIBUTE_MEMORY_TYPE",
        "MEMORY_HOST": "CU_MEMORYTYPE_HOST",
        "MEMORY_DEVICE": "CU_MEMORYTYPE_DEVICE",
        "CAPTURE_NONE": "CU_STREAM_CAPTURE_STATUS_NONE",
        "CAPTURE_ACTIVE": "CU_STREAM_CAPTURE_STATUS_ACTIVE",
        "CAPTURE_INVALIDATED": "CU_STREAM_CAPTURE_STATUS_INVALIDATED",
    }  # fmt: skip
    lines = [f'static_assert(int(::{ours}) == int({theirs}), "{ours}");' for ours, theirs in errors.items()]
    lines += [
        "static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));",
        "static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));",
        "static_assert(offsetof(LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));",
    ]
    source = tmp_path / "compare.cpp"
    abi = repository / "tests" / "gpu_free" / "driver" / "abi.h"
    source.write_text("\n".join(["#include <cuda.h>", f'#include "{abi}"', *lines]) + "\n")
    command = ["g++", "-std=c++17", "-fsyntax-only", "-I", str(HEADER), str(source)]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert compiled.returncode == 0, compiled.stderr

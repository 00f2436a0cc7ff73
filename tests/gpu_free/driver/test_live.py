"""The project's calls of TensorRT, made live through the real Python bindings of 10.16 and 11.

The bindings come from PyPI; the library below them is `live/library.cpp`, compiled against TensorRT's own headers
(TENSORRT_INCLUDE_DIR), on the simulated driver. What runs is `live/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_free.driver.live.interfaces import unsimulated
from tests.gpu_free.kernels.simulation import compiled
from tests.gpu_free.plugin.plugin_build import cuda_headers, plugin_library, tensorrt_headers
from tests.gpu_free.tensorrt_api.bindings import VERSIONS, BindingsUnavailableError, unpacked

LIVE = Path(__file__).with_name("live")


def simulated_tensorrt(headers: Path, cuda: Path, folder: Path, major: str) -> Path:
    """A folder with the three libraries that the bindings load, which are one."""
    interfaces = folder / "unsimulated.h"
    interfaces.write_text(unsimulated(headers))
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-fvisibility=hidden"]
    flags += ["-I", str(folder), "-isystem", str(headers), "-isystem", str(cuda)]
    library = compiled([LIVE / "library.cpp"], flags, [interfaces], ".so")
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        (folder / f"lib{name}.so.{major}").symlink_to(library)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", ["of the headers", "on record"])
def test_every_call_through_the_real_bindings(
    release: str, on_simulation: Callable[..., Any], simulated_driver: Path, tmp_path: Path, repository: Path
) -> None:
    headers, cuda = tensorrt_headers(), cuda_headers()
    if headers is None or cuda is None:
        pytest.skip("needs TensorRT's headers (TENSORRT_INCLUDE_DIR) and CUDA's")
    text = (headers / "NvInferVersion.h").read_text()
    numbers = re.findall(r"define (?:NV_TENSORRT|TRT)_(?:MAJOR|MINOR|PATCH|BUILD)(?:_ENTERPRISE)? (\d+)", text)
    version, major = ".".join(numbers), numbers[0]
    if release == "on record":
        if VERSIONS[major] == version:
            pytest.skip(f"the headers are those of the bindings on record, {version}")
        version = VERSIONS[major]
    try:
        packages = unpacked(version, repository / "build" / "tensorrt_bindings")
    except BindingsUnavailableError as error:
        pytest.skip(str(error))
    libraries = simulated_tensorrt(headers, cuda, tmp_path, major)
    outcome = on_simulation(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(LIVE.relative_to(repository)),
        timeout=800, LD_LIBRARY_PATH=f"{libraries}:{simulated_driver.parent}", PYTHONPATH=str(packages),
        LIVE_TENSORRT=version, LIVE_PLUGIN=str(plugin_library(headers, cuda)), SIMULATED_CUDA_CAPABILITY="86",
    )  # fmt: skip
    print(outcome.output)
    assert outcome.code == 0, outcome.output
    assert "skipped" not in outcome.output, outcome.output

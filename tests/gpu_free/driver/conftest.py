"""Compiles what stands in for a GPU, and runs tests on it in processes of their own.

The simulated driver is a libcuda.so.1, which must not reach the rest of the suite. The tests that run on it
are those of `simulated/` and, with TensorRT's real Python bindings, of `live/`: they are collected only where the
driver is loaded, by the tests beside this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu_free.kernels.simulation import compiled, compiler, kernel_library

DRIVER = Path(__file__).parent
ON_SIMULATION = "SIMULATED_CUDA_ORDER"
"""Set where the simulated driver is loaded: late, early, or a seed."""

collect_ignore = [] if ON_SIMULATION in os.environ else ["simulated", "live"]


@dataclass(frozen=True)
class Outcome:
    """What a process on the simulated driver did."""

    code: int
    output: str


_FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-fvisibility=hidden", "-shared", "-fPIC", "-pthread")


@pytest.fixture(scope="session")
def simulated_driver() -> Path:
    """libcuda.so.1 of the simulation, in a folder of its own."""
    if compiler() is None:
        pytest.skip("no g++ (or what CXX names) to compile the simulated driver with")
    sources = sorted(file for file in DRIVER.glob("*.cpp") if file.name != "sample_kernels.cpp")
    library = compiled(sources, [*_FLAGS, "-Wl,-soname,libcuda.so.1"], list(DRIVER.glob("*.h")), ".so")
    folder = library.with_suffix("")
    folder.mkdir(exist_ok=True)
    driver = folder / "libcuda.so.1"
    if not driver.exists():
        driver.symlink_to(library)
    return driver


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def on_simulation(simulated_driver: Path, repository: Path) -> Run:
    """Runs a Python program on the simulated driver with the project's kernels: `run(*arguments, order=...)`."""
    kernels = (compiled([DRIVER / "sample_kernels.cpp"], _FLAGS, [], ".so"), kernel_library())

    def run(*arguments: str, order: str = "late", timeout: int = 280, **variables: str) -> Outcome:
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(simulated_driver.parent),
            ON_SIMULATION: order,
            "SIMULATED_CUDA_KERNELS": ":".join(map(str, kernels)),
            **variables,
        }
        process = subprocess.run(
            [sys.executable, *arguments], cwd=repository, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        return Outcome(process.returncode, process.stdout)

    return run

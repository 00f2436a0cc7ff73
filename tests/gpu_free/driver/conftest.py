"""Compiles what stands in for a GPU, and runs tests on it in processes of their own.

The simulated driver is a libcuda.so.1, which must not reach the rest of the suite. The tests that run on it
are those of `simulated/`: they are collected only where the driver is loaded, by the tests beside this file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent
ON_SIMULATION = "SIMULATED_CUDA_ORDER"
"""Set where the simulated driver is loaded: late, early, or a seed."""

collect_ignore = [] if ON_SIMULATION in os.environ else ["simulated"]


@dataclass(frozen=True)
class Outcome:
    """What a process on the simulated driver did."""

    code: int
    output: str


def compile_shared(repository: Path, name: str, sources: list[Path], *options: str, headers: list[Path]) -> Path:
    """A shared library of C++ sources, made anew only when they or the options have changed."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed; it compiles the simulated driver and the kernels for the CPU")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-shared", "-fPIC", *options]
    state = hashlib.sha256(" ".join(command).encode())
    for file in sorted([*sources, *headers]):
        state.update(file.read_bytes())
    library = repository / "build" / "gpu_free" / state.hexdigest()[:16] / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_name(f"{os.getpid()}-{name}")
        subprocess.run([*command, *map(str, sources), f"-Wl,-soname,{name}", "-o", str(made), "-ldl", "-pthread"],
                       check=True, timeout=240)  # fmt: skip
        made.rename(library)
    return library


@pytest.fixture(scope="session")
def simulated_driver(repository: Path) -> Path:
    """libcuda.so.1 of the simulation."""
    sources = [file for file in DRIVER.glob("*.cpp") if file.name != "sample_kernels.cpp"]
    return compile_shared(repository, "libcuda.so.1", sources, "-fvisibility=hidden", headers=list(DRIVER.glob("*.h")))


@pytest.fixture(scope="session")
def sample_kernels(repository: Path) -> Path:
    """A library of kernels for the tests of the driver itself."""
    return compile_shared(repository, "libsample.so", [DRIVER / "sample_kernels.cpp"], headers=[])


Run = Callable[..., Outcome]


@pytest.fixture
def on_simulation(simulated_driver: Path, repository: Path) -> Run:
    """Runs a Python program on the simulated driver: `run(kernels, *arguments, order=...)`."""

    def run(kernels: Path, *arguments: str, order: str = "late", timeout: int = 250, **variables: str) -> Outcome:
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(simulated_driver.parent),
            ON_SIMULATION: order,
            "SIMULATED_CUDA_KERNELS": str(kernels),
            **variables,
        }
        process = subprocess.run(
            [sys.executable, *arguments], cwd=repository, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        return Outcome(process.returncode, process.stdout)

    return run

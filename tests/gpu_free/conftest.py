"""The kernels compiled for the CPU, for every test of the GPU path."""

from __future__ import annotations

import pytest

from tests.gpu_free.kernels.simulation import Simulation, compiler


@pytest.fixture(scope="session")
def simulation() -> Simulation:
    """The kernels as a library of this process."""
    if compiler() is None:
        pytest.skip("no g++ (or what CXX names) to compile the kernels for the CPU with")
    return Simulation.build()

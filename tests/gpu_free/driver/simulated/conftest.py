"""What every test on the simulated driver has: its controls, a device, and the proof that nothing is left."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.backends.base import BackendOptions
from parkdet.runtime.backends.tensorrt import TensorRtBackend
from parkdet.runtime.cuda.driver import Device
from tests.gpu_free.driver.simulated.engines import make_engine
from tests.gpu_free.driver.simulated.tensorrt_double import tensorrt_double
from tests.runtime.conftest import TinyModel

KINDS = ("device bytes", "pinned bytes", "streams", "events", "modules", "graphs", "contexts")


class Simulation:
    """The driver's own controls."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.simulated_live.restype = ctypes.c_size_t
        self._library.simulated_calls.restype = ctypes.c_char_p
        self._library.simulated_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]

    def fail(self, call: str, number: int, result: int) -> None:
        """Call `number` (from 1; 0 is every one) of this name answers `result` from now on."""
        self._library.simulated_fail(call.encode(), number, result)

    def reset(self) -> None:
        """No more injected failures; calls are counted from zero."""
        self._library.simulated_reset()

    def forget(self) -> None:
        """Drop everything that is alive, after a test in which giving it back was made to fail."""
        self._library.simulated_forget()

    def calls(self) -> list[str]:
        """Every call since the last reset, in order; what ran on the device is called `run:...`."""
        text: bytes = self._library.simulated_calls()
        return text.decode().split()

    def live(self) -> dict[str, int]:
        """What is not given back, by kind."""
        return {kind: self._library.simulated_live(kind.encode()) for kind in KINDS}


@pytest.fixture(scope="session")
def order() -> str:
    """When the streams run what they are asked: late, early, or as a seed has it."""
    return os.environ["SIMULATED_CUDA_ORDER"]


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    """The controls; at the end nothing may be left of what the test took."""
    controls = Simulation()
    controls.reset()
    before = controls.live()
    yield controls
    controls.reset()
    assert controls.live() == before


@pytest.fixture
def device(simulation: Simulation) -> Iterator[Device]:
    """The simulated device, current."""
    assert simulation is not None
    with Device() as opened, opened.current():
        yield opened


@pytest.fixture
def flavour() -> str:
    return "11"


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, flavour: str) -> Any:
    """The double, in the place of the module."""
    double = tensorrt_double(flavour)
    monkeypatch.setitem(sys.modules, double.__name__, double)
    return double


@pytest.fixture(scope="session")
def model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture
def engine(tmp_path: Path, model: TinyModel, flavour: str) -> Path:
    return make_engine(tmp_path / "best.sm75.engine", model, flavour)


@pytest.fixture(scope="session")
def shared_engine(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> Path:
    """One for the tests that compare with `_serial`."""
    return make_engine(tmp_path_factory.mktemp("shared") / "best.sm75.engine", model)


@pytest.fixture
def backend(trt: Any, engine: Path, simulation: Any) -> Iterator[TensorRtBackend]:
    assert trt is not None
    assert simulation is not None
    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as opened:
        yield opened

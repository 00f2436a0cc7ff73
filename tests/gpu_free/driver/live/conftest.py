"""The real bindings and the simulated library below them; ONNX Runtime computes what an engine is asked to run."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from tests.gpu_free.driver.simulated.conftest import Simulation

_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_RUN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p, ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_int64,
)  # fmt: skip


class SimulatedTensorRt:
    """The library's controls. While one is there, runs of engines are ONNX Runtime's."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(f"libnvinfer.so.{os.environ['LIVE_TENSORRT'].partition('.')[0]}")
        self._library.simulated_calls_made.restype = ctypes.c_char_p
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._kept: list[Any] = []  # functions that a stream or a graph may still run
        self._run = _RUN(self._enqueue)
        self._library.simulated_run_with(self._run)
        self.refuse("")

    def refuse(self, method: str) -> None:
        """This native method answers no from now on, and its log has the reason. Calls are forgotten."""
        self._library.simulated_refuse(method.encode())

    def calls(self) -> list[str]:
        """Native calls since, `method argument ...` each."""
        return bytes(self._library.simulated_calls_made()).decode().splitlines()

    def _enqueue(
        self, graph: int, size: int, images: Any, stream: int, names: bytes, addresses: Any, scratch: int, space: int
    ) -> int:
        session = _session(ctypes.string_at(graph, size))
        shape = tuple(images[:4])
        places = dict(zip(names.decode().split(), addresses[: len(names.split())], strict=True))
        assert scratch % 256 == 0

        def run(_: Any) -> None:
            (given,) = session.get_inputs()
            image = _memory(places[given.name], shape, np.dtype(np.uint8)).copy()
            _memory(scratch, (space,), np.dtype(np.uint8))[:] = 0xEE
            outputs = [output.name for output in session.get_outputs()]
            for name, value in zip(outputs, session.run(outputs, {given.name: image}), strict=True):
                _memory(places[name], value.shape, value.dtype)[:] = value

        function = _HOST_FUNCTION(run)
        self._kept.append(function)
        return int(self._driver.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None))


@functools.lru_cache(maxsize=4)
def _session(graph: bytes) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def _memory(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.ndarray(shape, dtype, buffer=memoryview((ctypes.c_uint8 * size).from_address(address)))


@pytest.fixture
def native() -> Iterator[SimulatedTensorRt]:
    """The simulated library's controls; what was taken of the simulated GPU is given back."""
    driver = Simulation()
    driver.reset()
    before = driver.live()
    yield SimulatedTensorRt()
    assert driver.live() == before


@pytest.fixture
def trt() -> Any:
    """The real bindings."""
    module = import_module("tensorrt")
    assert module.__version__ == os.environ["LIVE_TENSORRT"]
    return module

"""A stand-in for the module `tensorrt`: the real one's surface, ONNX Runtime in the engine's place.

Engines are files made by `simulated_engine`. A run is put into the stream as a host function, so it happens when the
stream gets to it, reads the input from device memory and writes the raw heads there.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.gpu_free.tensorrt_api.surface import Strict, Surface

VERSIONS = {"10": "10.16.1.11", "11": "11.4.0.106", "rtx": "1.7.1.116"}
MODULES = {"10": "tensorrt", "11": "tensorrt", "rtx": "tensorrt_rtx"}
MAGIC = b"simulated engine\n"
SCRATCH_BYTES = 1000
"""Of activations for one image: what a run overwrites with rubbish."""
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def simulated_engine(
    path: Path, onnx: Path, least: int, most: int, half: bool = True, canvases: tuple[tuple[int, int], ...] = ()
) -> Path:
    """An engine file of an ONNX file, for batches from `least` to `most`; of a dynamic one for a range of canvases."""
    about = {"least": least, "most": most, "half": half, "canvases": canvases}
    path.write_bytes(MAGIC + json.dumps(about).encode() + b"\n" + onnx.read_bytes())
    return path


class Answers(dict[tuple[str, str], Any]):
    """(class, method) -> what it answers instead, with `messages` logged as errors."""

    messages: tuple[str, ...] = ("the engine is unwell", "and says why")


def tensorrt_double(flavour: str) -> Any:
    """The module of TensorRT 10.16 (`10`), 11.4 (`11`) or for RTX 1.7 (`rtx`). `.surface.log` has its calls,
    `.answers` makes them fail, `.general_runs` counts runs of kernels that are not of the shape."""
    surface = Surface(flavour)
    module: Any = ModuleType(MODULES[flavour])
    answers = Answers()
    numbers = itertools.count()
    runtimes: weakref.WeakSet[Any] = weakref.WeakSet()
    kept: list[Any] = []  # functions that a stream or a graph may still run
    driver = ctypes.CDLL("libcuda.so.1")

    def registered() -> Any:
        """The logger of the first runtime that is alive: TensorRT has one at a time and ignores others."""
        return min(runtimes, key=lambda runtime: runtime._number)._logger

    def answer(kind: str, method: str, usual: Any) -> Any:
        if (kind, method) not in answers:
            return usual
        for message in answers.messages:
            registered().log(ILogger.ERROR, message)
        return answers[kind, method]

    class ILogger(Strict):
        Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

        def __init__(self) -> None:
            """As the bindings want it: called by what inherits."""

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class Runtime(Strict):
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger)
            self._logger, self._number = logger, next(numbers)
            runtimes.add(self)
            if registered() is not logger:
                registered().log(ILogger.WARNING, "The logger passed into createInferRuntime differs and is ignored")
            if answer("Runtime", "__init__", True) is None:  # as the bindings do
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            usual = ICudaEngine(bytes(serialized_engine)) if serialized_engine.startswith(MAGIC) else None
            if usual is None:
                registered().log(ILogger.WARNING, "Using an engine plan file across different models of devices")
                registered().log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization")
            return answer("Runtime", "deserialize_cuda_engine", usual)

    class ICudaEngine(Strict):
        def __init__(self, content: bytes) -> None:
            import onnxruntime as ort

            about, _, onnx = content.removeprefix(MAGIC).partition(b"\n")
            self._about = json.loads(about)
            self._session = ort.InferenceSession(onnx, providers=["CPUExecutionProvider"])
            (self._input,) = self._session.get_inputs()
            # TensorRT's order is its own.
            self._outputs = list(reversed(self._session.get_outputs()))
            dynamic = self._about["least"] != self._about["most"]
            self._batch = -1 if dynamic else self._about["most"]

        @property
        def num_io_tensors(self) -> int:
            surface.check_property("ICudaEngine", "num_io_tensors")
            return 1 + len(self._outputs)

        @property
        def device_memory_size_v2(self) -> int:
            surface.check_property("ICudaEngine", "device_memory_size_v2")
            return SCRATCH_BYTES * int(self._about["most"])

        def get_tensor_name(self, index: int) -> str:
            return str([*self._outputs, self._input][index].name)

        def get_tensor_mode(self, name: str) -> Any:
            mode = surface.enumerations["TensorIOMode"]
            usual = mode.INPUT if name == self._input.name else mode.OUTPUT
            return answer("ICudaEngine", "get_tensor_mode", usual)

        def get_tensor_location(self, name: str) -> Any:
            assert name
            location = surface.enumerations["TensorLocation"]
            return answer("ICudaEngine", "get_tensor_location", location.DEVICE)

        def get_tensor_dtype(self, name: str) -> Any:
            dtype = surface.enumerations["DataType"]
            if name == self._input.name:
                return dtype.UINT8
            return dtype.HALF if self._about["half"] else dtype.FLOAT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (self._batch, *self._shape(name))

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            assert profile_index == 0
            low, high = self._about["canvases"] or [self._shape(name)[:2]] * 2
            return [(self._about[key], *canvas, 3) for key, canvas in (("least", low), ("most", high), ("most", high))]

        def create_runtime_config(self) -> Any:
            return answer("ICudaEngine", "create_runtime_config", IRuntimeConfig())

        def create_execution_context(self, how: Any = None) -> Any:
            given = isinstance(how, IRuntimeConfig)
            memory = how.get_execution_context_allocation_strategy() if given else how
            assert memory is surface.enumerations["ExecutionContextAllocationStrategy"].USER_MANAGED
            context = IExecutionContext(self)
            # Only TensorRT for RTX has general kernels, which run until those of a shape are compiled.
            context._general = flavour == "rtx" and not (given and how._specialization.name == "EAGER")
            return answer("ICudaEngine", "create_execution_context", context)

        def _shape(self, name: str) -> tuple[int, ...]:
            (tensor,) = (tensor for tensor in [*self._outputs, self._input] if tensor.name == name)
            return tuple(side if isinstance(side, int) else -1 for side in tensor.shape[1:])

        def _all_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
            """Of the outputs for images of this shape."""
            outputs = [output.name for output in self._outputs]
            values = self._session.run(outputs, {self._input.name: np.zeros(shape, np.uint8)})
            return {name: value.shape for name, value in zip(outputs, values, strict=True)}

    class IRuntimeConfig(Strict):
        def __init__(self) -> None:
            self._memory = surface.enumerations["ExecutionContextAllocationStrategy"].STATIC
            if flavour == "rtx":
                self._specialization = surface.enumerations["DynamicShapesKernelSpecializationStrategy"].LAZY

        def get_execution_context_allocation_strategy(self) -> Any:
            return self._memory

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self._memory = strategy

        @property
        def dynamic_shapes_kernel_specialization_strategy(self) -> Any:
            surface.check_property("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy")
            return self._specialization

        @dynamic_shapes_kernel_specialization_strategy.setter
        def dynamic_shapes_kernel_specialization_strategy(self, strategy: Any) -> None:
            surface.check_property("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy")
            self._specialization = strategy

    class IExecutionContext(Strict):
        _general = False

        def __init__(self, engine: Any) -> None:
            self._engine = engine
            self._addresses: dict[str, int] = {}
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._memory = (0, 0)
            self._batch = 0

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self._engine.get_tensor_profile_shape(name, 0)
            fits = all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))
            self._batch, self._input_shape = shape[0], tuple(shape)
            self._shapes = self._engine._all_shapes(self._input_shape) if fits else {}
            return bool(answer("IExecutionContext", "set_input_shape", fits))

        def infer_shapes(self) -> list[str]:
            usual: list[str] = [] if self._batch else [self._engine._input.name]
            names = answer("IExecutionContext", "infer_shapes", usual)
            if names is None:
                raise RuntimeError("infer_shapes error code: -1")
            return list(names)

        def update_device_memory_size_for_shapes(self) -> int:
            assert self._batch
            return int(answer("IExecutionContext", "update_device_memory_size_for_shapes", SCRATCH_BYTES * self._batch))

        def set_device_memory(self, memory: int, size: int) -> None:
            assert size >= SCRATCH_BYTES * self._batch
            assert memory % 256 == 0
            self._memory = (memory, size)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self._shapes[name])

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert memory % 256 == 0
            self._addresses[name] = memory
            return bool(answer("IExecutionContext", "set_tensor_address", True))

        def is_stream_capturable(self, stream: int) -> bool:
            assert stream
            return bool(answer("IExecutionContext", "is_stream_capturable", True))

        def execute_async_v3(self, stream_handle: int) -> bool:
            engine, addresses, memory, shape = self._engine, dict(self._addresses), self._memory, self._input_shape
            general = self._general  # of the kernels enqueued now: a graph has these for ever
            names = [engine._input.name, *(output.name for output in engine._outputs)]
            assert sorted(addresses) == sorted(names), "an address is missing"
            assert memory[0], "there is no scratch memory"

            def run(_: Any) -> None:
                module.general_runs += general
                image = _memory(addresses[engine._input.name], shape, np.uint8).copy()
                _memory(memory[0], (memory[1],), np.uint8)[:] = 0xEE
                outputs = [output.name for output in engine._outputs]
                for name, value in zip(outputs, engine._session.run(outputs, {engine._input.name: image}), strict=True):
                    dtype = np.float16 if engine._about["half"] else np.float32
                    _memory(addresses[name], value.shape, dtype)[:] = value

            function = _HOST_FUNCTION(run)
            kept.append(function)
            if ("IExecutionContext", "execute_async_v3") in answers:
                return bool(answer("IExecutionContext", "execute_async_v3", None))
            result = driver.cuLaunchHostFunc(ctypes.c_void_p(stream_handle), function, None)
            if result:
                registered().log(ILogger.ERROR, f"Cuda Runtime ({result}) while enqueueing")
            return not result

    if flavour != "rtx":
        del IExecutionContext.is_stream_capturable
    for kind in (ILogger, Runtime, ICudaEngine, IRuntimeConfig, IExecutionContext):
        kind.surface = surface
        setattr(module, kind.__name__, kind)
    for name, enumeration in surface.enumerations.items():
        setattr(module, name, enumeration)
    module.__version__ = VERSIONS[flavour]
    module.surface, module.answers, module.general_runs = surface, answers, 0
    return module


def _memory(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=memoryview((ctypes.c_uint8 * size).from_address(address)))

"""TensorRT 10.16, TensorRT 11 and TensorRT for RTX behind one small face: engines, contexts, and what they say.

Only calls that all three have are made here, and every answer is looked at: a None or False of TensorRT's becomes a
`TensorRtError` that carries what it logged meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parkdet.runtime.cuda.driver import Stream
from parkdet.runtime.engine_sidecar import Flavour
from parkdet.runtime.errors import ArtifactError, ParkdetError, UsageError
from parkdet.runtime.model_spec import TensorSpec

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT32": "int32"}
_KEPT_MESSAGES = 8


class TensorRtError(ParkdetError):
    """A call of TensorRT's failed; the message holds what it logged."""


class TensorRtOutOfMemory(TensorRtError):  # noqa: N818 - the name says what happened
    """It failed for want of memory on the device."""


class _Log:
    """Warnings and errors of one TensorRT: the last few since they were asked for."""

    def __init__(self, module: Any) -> None:
        self._messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._lock = threading.Lock()
        keep = self._keep

        class Logger(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR, module.ILogger.WARNING):
                    keep(msg)

        self.logger = Logger()

    def _keep(self, message: str) -> None:
        with self._lock:
            self._messages.append(" ".join(message.split()))

    def take(self) -> list[str]:
        """Each message once, in the order in which they came; they are forgotten here."""
        with self._lock:
            said = list(dict.fromkeys(self._messages))
            self._messages.clear()
        return said


@cache
def _log_of(module: Any) -> _Log:
    """One for all that a process opens: TensorRT ignores another logger as long as something of the first lives."""
    return _Log(module)


class Library:
    """The Python module of one flavour, and its log."""

    def __init__(self, flavour: Flavour) -> None:
        """UsageError where the module is not installed or lacks its libraries."""
        self.flavour = flavour
        name = _MODULES[flavour]
        try:
            self.module: Any = import_module(name)
        except (ImportError, OSError) as error:
            raise UsageError(
                f"{name} cannot be imported ({error}); pip install '{flavour}-cu13' brings it for CUDA 13"
            ) from error
        self._log = _log_of(self.module)
        self.logger = self._log.logger

    @property
    def version(self) -> str:
        """The version of TensorRT, as its module tells it."""
        return str(self.module.__version__)

    def failure(self, what: str) -> TensorRtError:
        """The error for a call that failed, with what was logged since the last one."""
        said = "; ".join(self._log.take()) or "it logged nothing"
        lower = said.lower()
        kind = TensorRtOutOfMemory if "outofmemory" in lower or "out of memory" in lower else TensorRtError
        return kind(f"{what}: {said}")


class Engine:
    """An engine file, loaded: one image input with its range of batches and canvases, and outputs."""

    def __init__(self, library: Library, content: bytes, where: Path) -> None:
        """ArtifactError when TensorRT refuses the file or it has another number of inputs than one."""
        self.library = library
        self.where = where
        trt = library.module
        try:
            self._runtime = trt.Runtime(library.logger)
        except TypeError as error:  # what the bindings make of the library's null pointer
            raise library.failure(f"{where}: {library.flavour} {library.version} makes no runtime") from error
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            failure = library.failure(f"{where}: {library.flavour} {library.version} cannot load it")
            remedy = (
                "the GPU's memory does not hold it beside what is there: end other programs on it"
                if isinstance(failure, TensorRtOutOfMemory)
                else "engines are made for one version and kind of GPU: run 'parkdet export --engine' for this one"
            )
            raise ArtifactError(f"{failure}; {remedy}")
        self._engine: Any = engine
        tensors = [self._tensor(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]
        inputs = [tensor for is_input, tensor in tensors if is_input]
        self.outputs = [tensor for is_input, tensor in tensors if not is_input]
        if len(inputs) != 1:
            raise ArtifactError(f"{where}: has {len(inputs)} inputs, not one of images; run 'parkdet export' again")
        self.input = inputs[0]
        self.least, self.most = self._ranges()

    def _tensor(self, name: str) -> tuple[bool, TensorSpec]:
        trt, engine = self.library.module, self._engine
        kind = engine.get_tensor_dtype(name).name
        spec = TensorSpec(name=name, dtype=_DTYPES.get(kind, kind.lower()), shape=tuple(engine.get_tensor_shape(name)))
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise ArtifactError(f"{self.where}: wants '{name}' in host memory; run 'parkdet export' again")
        return engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT, spec

    def _ranges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest (batch, height, width, 3): its shape, or those of its optimisation profile."""
        shape = self.input.shape
        if all(side > 0 for side in shape):
            return shape, shape
        least, _, most = self._engine.get_tensor_profile_shape(self.input.name, 0)
        return tuple(int(side) for side in least), tuple(int(side) for side in most)

    def order_outputs(self, names: list[str]) -> None:
        """Have `outputs` in this order, which is that of the model spec. ArtifactError when the names are others."""
        by_name = {output.name: output for output in self.outputs}
        if sorted(names) != sorted(by_name):
            raise ArtifactError(
                f"{self.where}: gives {', '.join(by_name)}, its model spec {', '.join(names)}; "
                "run 'parkdet export' again"
            )
        self.outputs = [by_name[name] for name in names]

    @property
    def canvas_hw(self) -> tuple[int, int] | None:
        """Height and width of the one canvas that it takes; None where it takes a range of them."""
        return (self.least[1], self.least[2]) if self.least[1:3] == self.most[1:3] else None

    def takes(self, canvas_hw: tuple[int, int]) -> bool:
        """Whether a canvas is within what it was built for."""
        return all(
            low <= side <= high for low, side, high in zip(self.least[1:3], canvas_hw, self.most[1:3], strict=True)
        )

    @property
    def least_batch(self) -> int:
        return self.least[0]

    @property
    def most_batch(self) -> int:
        return self.most[0]

    @property
    def most_scratch_bytes(self) -> int:
        """Memory for activations that is enough for any shape; none where the engine needs none."""
        return int(self._engine.device_memory_size_v2)

    def context(self, batch: int, canvas_hw: tuple[int, int]) -> ExecutionContext:
        """A context for one size of batch and canvas, without memory of its own."""
        native = self._engine.create_execution_context(self._runtime_choice())
        if native is None:
            raise self.library.failure(f"{self.where}: no execution context could be made")
        return ExecutionContext(self, native, (batch, *canvas_hw, 3))

    def _runtime_choice(self) -> Any:
        """What a context is made with: its memory comes from us, and its kernels are compiled before they run.

        TensorRT for RTX by itself compiles those of a new shape in the background and runs general ones until it is
        done. A CUDA graph recorded before then would replay the slower ones for ever.
        """
        trt = self.library.module
        memory = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.library.flavour == "tensorrt":
            return memory
        choice = self._engine.create_runtime_config()
        if choice is None:
            raise self.library.failure(f"{self.where}: no runtime configuration could be made")
        choice.set_execution_context_allocation_strategy(memory)
        choice.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return choice

    def close(self) -> None:
        """Drop the engine, then its runtime. Its contexts must be gone."""
        self._engine = None
        self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ExecutionContext:
    """One size of batch and canvas, ready to be enqueued once it has its memory and addresses.

    The shape never changes, so a CUDA graph that was captured from it stays valid as long as the addresses do.
    """

    def __init__(self, engine: Engine, native: Any, shape: tuple[int, ...]) -> None:
        self._engine = engine
        self._native: Any = native
        if not native.set_input_shape(engine.input.name, shape):
            raise self._failed(f"images of {shape} were refused")
        try:
            unknown = native.infer_shapes()
        except RuntimeError as error:  # the bindings' words for a negative answer
            raise self._failed(f"the shapes could not be inferred ({error})") from error
        if unknown:
            raise self._failed(f"the shapes of {', '.join(unknown)} are not known")
        self.scratch_bytes = int(native.update_device_memory_size_for_shapes())
        if not self.scratch_bytes and engine.most_scratch_bytes:
            raise self._failed(f"no size of scratch memory is told for images of {shape}")
        self.output_shapes = {
            output.name: tuple(int(side) for side in native.get_tensor_shape(output.name)) for output in engine.outputs
        }

    def give_memory(self, pointer: int, size: int, addresses: dict[str, int]) -> None:
        """Scratch memory of `scratch_bytes` or more, and the address of every input and output."""
        self._native.set_device_memory(pointer, size)
        for name, address in addresses.items():
            if not self._native.set_tensor_address(name, address):
                raise self._failed(f"the address of '{name}' was refused")

    def enqueue(self, stream: Stream) -> None:
        """Ask the stream for one run."""
        if not self._native.execute_async_v3(stream.handle):
            raise self._failed("a run could not be enqueued")

    def capturable(self, stream: Stream) -> bool:
        """Whether a run may be recorded in a CUDA graph. Only TensorRT for RTX can say so beforehand."""
        ask = getattr(self._native, "is_stream_capturable", None)
        return ask is None or bool(ask(stream.handle))

    def close(self) -> None:
        """Drop it; nothing of it may be in progress."""
        self._native = None

    def _failed(self, what: str) -> TensorRtError:
        return self._engine.library.failure(f"{self._engine.where}: {what}")

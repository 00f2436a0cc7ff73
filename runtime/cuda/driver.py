"""The CUDA driver API as objects: every return checked and named, every resource owned by a `with`.

A thin layer over `cuda.bindings.driver`. Handles and device pointers are plain integers (`.handle`, `.pointer`),
so that those of pycuda, CuPy or torch can stand in for ours and ours for theirs. Nothing is imported or
initialised before a `Device` is opened. Whoever calls from several threads makes the device current in each:
`with device.current(): ...`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from parkdet.runtime.errors import ParkdetError, UsageError

STREAM_NON_BLOCKING = 1
EVENT_BLOCKING_SYNC, EVENT_DISABLE_TIMING = 1, 2
OLDEST_CUDA = 13000
"""What `cuDriverGetVersion` must answer: machine code that CUDA 13 compiled loads in no older driver."""
_CAPTURE_THREAD_LOCAL = 1
_DYNAMIC_SHARED_BYTES = 48 << 10
"""What a launch may have without asking."""


class DriverError(ParkdetError):
    """A call of the CUDA driver failed; `call` and `name` (CUDA_ERROR_...) say which and how."""

    def __init__(self, call: str, name: str, detail: str) -> None:
        super().__init__(f"CUDA: {call} failed with {name} ({detail})")
        self.call = call
        self.name = name


class OutOfDeviceMemory(DriverError):  # noqa: N818 - the name says what happened
    """There is no room left on the device, or no memory left to pin."""


def call(name: str, *arguments: Any) -> Any:
    """Call `cuda.bindings.driver.<name>`: its value, or several as a tuple, or None. DriverError when it fails."""
    driver = _bindings()
    try:
        result, *values = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # what the bindings raise where libcuda is missing or lacks the function
        raise UsageError(
            f"no NVIDIA driver that has {name} (libcuda.so.1) is on this machine; install the driver or update it: "
            "CUDA 13 wants 580 or newer"
        ) from error
    if result != driver.CUresult.CUDA_SUCCESS:
        code = getattr(result, "name", str(result))
        kind = OutOfDeviceMemory if code == "CUDA_ERROR_OUT_OF_MEMORY" else DriverError
        raise kind(name, code, _explanation(driver, result))
    return values[0] if len(values) == 1 else tuple(values) or None


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UsageError("cuda-bindings is missing: 'parkdet[gpu]' and 'parkdet[rtx]' bring it") from error
    return driver


def _explanation(driver: Any, result: Any) -> str:
    status, text = driver.cuGetErrorString(result)
    known = status == driver.CUresult.CUDA_SUCCESS and text is not None
    return text.decode() if known and isinstance(text, bytes) else str(text if known else "unknown error")


class Owned(ABC):
    """Something of the driver's that is given back exactly once, by `close` or at the end of a `with`."""

    _open = False

    def close(self) -> None:
        """Give it back; a second call does nothing."""
        if self._open:
            self._open = False
            self._release()

    @abstractmethod
    def _release(self) -> None:
        """The driver's call that gives it back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Device(Owned):
    """A GPU's primary context, the one that the CUDA runtime, torch and TensorRT share."""

    def __init__(self, ordinal: int = 0) -> None:
        """UsageError where there is no driver, an old one, or no such device."""
        try:
            call("cuInit", 0)
            version = int(call("cuDriverGetVersion"))
            count = call("cuDeviceGetCount")
        except DriverError as error:
            raise UsageError(f"no CUDA device can be used: {error}") from error
        if version < OLDEST_CUDA:
            raise UsageError(
                f"the NVIDIA driver is one for CUDA {version // 1000}.{version % 1000 // 10}, which runs neither the "
                "kernels nor TensorRT's packages for CUDA 13; update it to 580 or newer"
            )
        if not 0 <= ordinal < count:
            raise UsageError(f"device {ordinal}: the CUDA driver reports {count} of them, counted from 0")
        self.ordinal = ordinal
        self._device = call("cuDeviceGet", ordinal)
        self.name = call("cuDeviceGetName", 256, self._device).partition(b"\0")[0].decode()
        attributes = _bindings().CUdevice_attribute
        self.capability = (
            self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        self.handle = int(call("cuDevicePrimaryCtxRetain", self._device))
        self._open = True

    def _attribute(self, attribute: Any) -> int:
        return int(call("cuDeviceGetAttribute", attribute, self._device))

    def bandwidth(self) -> float:
        """Bytes a second between the GPU and its memory, from the clock and the bus width that the driver gives."""
        attributes = _bindings().CUdevice_attribute
        kilohertz = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)
        bits = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)
        return 2 * kilohertz * 1000 * bits / 8  # data moves on both edges of the clock

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the calling thread's context, and afterwards the one that was before."""
        call("cuCtxPushCurrent", self.handle)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes; the device must be current."""
        free, total = call("cuMemGetInfo")
        return int(free), int(total)

    def synchronize(self) -> None:
        """Wait for everything that was asked of the device; it must be current."""
        call("cuCtxSynchronize")

    def _release(self) -> None:
        call("cuDevicePrimaryCtxRelease", self._device)


class DeviceBuffer(Owned):
    """Memory on the device."""

    def __init__(self, size: int) -> None:
        """`size` bytes, their content undefined. OutOfDeviceMemory when there is no room."""
        self.bytes = size
        self.pointer = int(call("cuMemAlloc", size))
        self._open = True

    def fill(self, value: int, stream: Stream) -> None:
        """Set every byte, in the order of the stream."""
        call("cuMemsetD8Async", self.pointer, value, self.bytes, stream.handle)

    def _release(self) -> None:
        call("cuMemFree", self.pointer)


class PinnedBuffer(Owned):
    """Memory of the host that the device can copy from and to while the program goes on."""

    def __init__(self, size: int) -> None:
        """`size` bytes, their content undefined. OutOfDeviceMemory when so much cannot be pinned."""
        self.bytes = size
        self.pointer = int(call("cuMemHostAlloc", size, 0))
        self._open = True

    def view(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """The memory from `offset` bytes on as an array. It must not be used once the buffer is closed."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if offset < 0 or offset + size > self.bytes:
            raise ValueError(f"{size} bytes from {offset} are not within the {self.bytes} of the buffer")
        memory = (ctypes.c_uint8 * size).from_address(self.pointer + offset)
        return np.ndarray(shape, dtype, buffer=memoryview(memory))

    def _release(self) -> None:
        call("cuMemFreeHost", self.pointer)


def upload(to: int, source: PinnedBuffer, size: int, stream: Stream) -> None:
    """Copy the first `size` bytes of pinned memory to a device pointer, in the order of the stream."""
    call("cuMemcpyHtoDAsync", to, source.pointer, size, stream.handle)


def download(target: PinnedBuffer, source: int, size: int, stream: Stream) -> None:
    """Copy `size` bytes from a device pointer to pinned memory, in the order of the stream."""
    call("cuMemcpyDtoHAsync", target.pointer, source, size, stream.handle)


class Event(Owned):
    """A place in the work of a stream. Waiting for it leaves the processor to others."""

    def __init__(self, *, timing: bool = False) -> None:
        flags = EVENT_BLOCKING_SYNC | (0 if timing else EVENT_DISABLE_TIMING)
        self.handle = int(call("cuEventCreate", flags))
        self._open = True

    def record(self, stream: Stream) -> None:
        """Mark what the stream has been asked so far."""
        call("cuEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until what was marked is done; DriverError when work of the device failed."""
        call("cuEventSynchronize", self.handle)

    def milliseconds_since(self, earlier: Event) -> float:
        """Time on the device between two events that are done, both made with `timing`."""
        return float(call("cuEventElapsedTime", earlier.handle, self.handle))

    def _release(self) -> None:
        call("cuEventDestroy", self.handle)


class Stream(Owned):
    """A queue of work for the device: our own, or somebody else's by its handle."""

    def __init__(self, foreign: int | None = None) -> None:
        """`foreign` is the handle of a stream that its maker keeps and closes (pycuda's `stream.handle`,
        CuPy's `stream.ptr`, torch's `stream.cuda_stream`)."""
        if foreign is None:
            self.handle = int(call("cuStreamCreate", STREAM_NON_BLOCKING))
            self._open = True
        else:
            self.handle = foreign

    def wait(self, event: Event) -> None:
        """What is asked of the stream from now on happens after the event."""
        call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Wait for all work of the stream; DriverError when it failed."""
        call("cuStreamSynchronize", self.handle)

    def _release(self) -> None:
        call("cuStreamDestroy", self.handle)


class Module(Owned):
    """Compiled kernels, loaded for the current device."""

    def __init__(self, image: bytes) -> None:
        """`image` is a fatbin, a cubin or PTX. DriverError when it holds nothing for this device."""
        self._image = image
        self.handle = int(call("cuModuleLoadData", image))
        self._open = True

    def function(self, entry: str) -> Function:
        """The kernel of that entry name; DriverError (CUDA_ERROR_NOT_FOUND) when there is none."""
        return Function(entry, int(call("cuModuleGetFunction", self.handle, entry.encode())))

    def _release(self) -> None:
        call("cuModuleUnload", self.handle)


class Function:
    """A kernel that takes one struct by value. It lives as long as its module."""

    def __init__(self, entry: str, handle: int) -> None:
        self.entry = entry
        self.handle = handle

    def launch(
        self, grid: tuple[int, int, int], threads: int, parameters: ctypes.Structure, stream: Stream, shared: int = 0
    ) -> None:
        """Ask for a grid of blocks of `threads`; the struct is copied before this returns.

        `shared` is dynamic shared memory in bytes, raised over the default limit where need be.
        """
        if shared > _DYNAMIC_SHARED_BYTES:
            attribute = _bindings().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", self.handle, attribute, shared)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        call(
            "cuLaunchKernel", self.handle, *grid, threads, 1, 1, shared, stream.handle, ctypes.addressof(pointers), 0
        )  # fmt: skip


class Graph(Owned):
    """Work recorded once and launched at will: kernels, copies and what TensorRT enqueues, with fixed pointers."""

    def __init__(self, executable: int) -> None:
        self.handle = executable
        self._open = True

    @classmethod
    @contextmanager
    def capture(cls, stream: Stream) -> Iterator[list[Graph]]:
        """Record what is asked of the stream in the `with` instead of doing it; the list then holds the graph.

        Streams that wait for an event of this one are recorded too and must be joined again. Calls that allocate
        or wait are refused meanwhile, in this thread only. After an exception nothing is left behind.
        """
        made: list[Graph] = []
        mode = _bindings().CUstreamCaptureMode(_CAPTURE_THREAD_LOCAL)
        call("cuStreamBeginCapture", stream.handle, mode)
        try:
            yield made
        except BaseException:
            _abandon_capture(stream)
            raise
        template = call("cuStreamEndCapture", stream.handle)
        try:
            made.append(cls(int(call("cuGraphInstantiate", template, 0))))
        finally:
            call("cuGraphDestroy", template)

    def launch(self, stream: Stream) -> None:
        """Ask for everything that was recorded."""
        call("cuGraphLaunch", self.handle, stream.handle)

    def _release(self) -> None:
        call("cuGraphExecDestroy", self.handle)


def _abandon_capture(stream: Stream) -> None:
    """End a capture that failed halfway, whatever the driver says of it: the first error is the one to tell."""
    try:
        template = call("cuStreamEndCapture", stream.handle)
    except DriverError:
        return
    call("cuGraphDestroy", template)

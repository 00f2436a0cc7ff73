"""The simulated driver keeps CUDA's rules, and `runtime/cuda/driver.py` checks every call."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from parkdet.runtime.cuda import driver as driver_module
from parkdet.runtime.cuda.driver import (
    Device,
    DeviceBuffer,
    DriverError,
    Event,
    Graph,
    Module,
    OutOfDeviceMemory,
    PinnedBuffer,
    Stream,
    call,
    download,
    upload,
)
from parkdet.runtime.errors import UsageError

PTX = b"// any PTX: what runs is compiled for the CPU\n\0"
COUNT = 100
GIVING_BACK = ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy", "cuModuleUnload", "cuGraphDestroy",
               "cuGraphExecDestroy", "cuDevicePrimaryCtxRelease", "cuCtxPopCurrent")  # fmt: skip


class Add(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_int), ("by", ctypes.c_int))


class Work:
    """A pinned array, its place on the device, a kernel that adds to it, and an array for the result."""

    def __init__(self, stack: ExitStack) -> None:
        self.source = stack.enter_context(PinnedBuffer(4 * COUNT))
        self.target = stack.enter_context(PinnedBuffer(4 * COUNT))
        self.memory = stack.enter_context(DeviceBuffer(4 * COUNT))
        self.add_function = stack.enter_context(Module(PTX)).function("add")
        self.input = self.source.view(np.int32, (COUNT,))
        self.input[:] = np.arange(COUNT)
        self.output = self.target.view(np.int32, (COUNT,))
        self.output[:] = -1

    def up(self, stream: Stream) -> None:
        upload(self.memory.pointer, self.source, 4 * COUNT, stream)

    def add(self, by: int, stream: Stream) -> None:
        self.add_function.launch((4, 1, 1), 32, Add(self.memory.pointer, COUNT, by), stream)

    def down(self, stream: Stream) -> None:
        download(self.target, self.memory.pointer, 4 * COUNT, stream)


@pytest.fixture
def stack(device: Device) -> Any:
    assert device is not None
    with ExitStack() as opened:
        yield opened


def test_a_stream_works_in_order(stack: ExitStack) -> None:
    work, stream = Work(stack), stack.enter_context(Stream())
    work.up(stream)
    work.add(5, stream)
    work.add(2, stream)
    work.down(stream)
    stream.synchronize()
    assert np.array_equal(work.output, np.arange(COUNT) + 7)


@pytest.mark.parametrize("waits", [True, False])
def test_streams_are_joined_by_events_and_a_missing_wait_shows(stack: ExitStack, order: str, waits: bool) -> None:
    work = Work(stack)
    copy, compute = stack.enter_context(Stream()), stack.enter_context(Stream())
    uploaded = stack.enter_context(Event())
    work.up(copy)
    uploaded.record(copy)
    if waits:
        compute.wait(uploaded)
    work.add(5, compute)
    work.down(compute)
    compute.synchronize()
    right = bool(np.array_equal(work.output, np.arange(COUNT) + 5))
    if order in ("late", "early"):
        assert right == (waits or order == "early")


def test_reading_or_refilling_pinned_memory_before_the_event_shows(stack: ExitStack, order: str) -> None:
    work, stream, done = Work(stack), stack.enter_context(Stream()), stack.enter_context(Event())
    work.up(stream)
    work.down(stream)
    done.record(stream)
    early = work.output.copy()
    work.input[:] = 9
    done.synchronize()
    if order == "late":
        assert (early == -1).all() and (work.output == 9).all()
    elif order == "early":
        assert np.array_equal(early, work.output) and np.array_equal(early, np.arange(COUNT))


def test_an_event_waits_for_what_was_asked_before_it_only(stack: ExitStack, order: str) -> None:
    work, stream, first = Work(stack), stack.enter_context(Stream()), stack.enter_context(Event())
    work.up(stream)
    work.down(stream)
    first.record(stream)
    work.add(100, stream)
    work.down(stream)
    first.synchronize()
    if order == "late":
        assert np.array_equal(work.output, np.arange(COUNT))
    stream.synchronize()
    assert np.array_equal(work.output, np.arange(COUNT) + 100)


def test_the_default_stream_waits_for_blocking_streams_and_not_for_ours(stack: ExitStack, order: str) -> None:
    work = Work(stack)
    blocking = int(call("cuStreamCreate", 0))
    work.up(Stream(blocking))
    work.add(1, Stream(0))
    work.down(Stream(0))
    Stream(0).synchronize()
    assert np.array_equal(work.output, np.arange(COUNT) + 1)
    call("cuStreamDestroy", blocking)
    ours = stack.enter_context(Stream())
    work.input[:] = 50
    work.up(ours)
    work.down(Stream(0))
    Stream(0).synchronize()
    if order == "late":
        assert np.array_equal(work.output, np.arange(COUNT) + 1)


def test_a_graph_is_recorded_then_replayed(stack: ExitStack) -> None:
    work, stream = Work(stack), stack.enter_context(Stream())
    with Graph.capture(stream) as made:
        work.up(stream)
        work.add(3, stream)
        work.down(stream)
    stream.synchronize()
    assert (work.output == -1).all()
    graph = stack.enter_context(made[0])
    for value in (10, 20):
        work.input[:] = value
        graph.launch(stream)
        stream.synchronize()
        assert (work.output == value + 3).all()


@pytest.mark.parametrize("joined", [True, False])
def test_a_graph_over_two_streams(stack: ExitStack, joined: bool) -> None:
    work = Work(stack)
    stream, other = stack.enter_context(Stream()), stack.enter_context(Stream())
    fork, join = stack.enter_context(Event()), stack.enter_context(Event())
    captured = Graph.capture(stream)
    made = captured.__enter__()
    work.up(stream)
    fork.record(stream)
    other.wait(fork)
    work.add(4, other)
    join.record(other)
    if joined:
        stream.wait(join)
        work.down(stream)
        captured.__exit__(None, None, None)
        graph = stack.enter_context(made[0])
        graph.launch(stream)
        stream.synchronize()
        assert np.array_equal(work.output, np.arange(COUNT) + 4)
    else:
        with pytest.raises(DriverError, match="STREAM_CAPTURE_UNJOINED"):
            captured.__exit__(None, None, None)


@pytest.mark.parametrize("what", ["allocates", "waits", "pins", "synchronizes"])
def test_a_capture_refuses_what_cannot_be_recorded_and_leaves_the_stream_usable(
    device: Device, stack: ExitStack, what: str
) -> None:
    work, stream, event = Work(stack), stack.enter_context(Stream()), stack.enter_context(Event())
    crimes: dict[str, Callable[[], object]] = {
        "allocates": lambda: DeviceBuffer(8),
        "pins": lambda: PinnedBuffer(8),
        "waits": event.synchronize,
        "synchronizes": device.synchronize,
    }

    def capture() -> None:
        with Graph.capture(stream):
            event.record(stream)
            crimes[what]()

    with pytest.raises(DriverError, match="CUDA_ERROR_STREAM_CAPTURE"):
        capture()
    work.up(stream)
    work.down(stream)
    stream.synchronize()
    assert np.array_equal(work.output, np.arange(COUNT))


def test_copies_outside_an_allocation_are_refused(stack: ExitStack) -> None:
    work, stream = Work(stack), stack.enter_context(Stream())
    for pointer, size in ((work.memory.pointer, 4 * COUNT + 1), (work.memory.pointer + 4, 4 * COUNT), (64, 1)):
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
            upload(pointer, work.source, size, stream)


def test_a_kernel_that_writes_past_the_end_fails_the_context(stack: ExitStack) -> None:
    work, stream = Work(stack), stack.enter_context(Stream())
    work.add_function.launch((4, 1, 1), 32, Add(work.memory.pointer, COUNT + 1, 1), stream)
    with pytest.raises(DriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        stream.synchronize()
    with pytest.raises(DriverError, match="cuMemAlloc failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        DeviceBuffer(8)


@pytest.mark.parametrize(
    ("crime", "told"),
    [
        ("ctypes.memset(memory.pointer, 0, 1)", "the host touched"),
        ("add(memory.pointer, 10_000)", "kernel touched"),
        ("memory.close(); add(memory.pointer, 1)", "kernel touched"),
    ],
)
def test_memory_that_may_not_be_touched_ends_the_process(crime: str, told: str) -> None:
    program = f"""
import ctypes
from parkdet.runtime.cuda.driver import *
class Add(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_int), ("by", ctypes.c_int))
device = Device()
call("cuCtxPushCurrent", device.handle)
memory, stream, module = DeviceBuffer(4096), Stream(), Module({PTX!r})
def add(pointer, count):
    module.function("add").launch((400, 1, 1), 32, Add(pointer, count, 1), stream)
    stream.synchronize()
{crime}
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 99
    assert told in process.stderr


def test_a_kernel_that_fails_is_told_by_the_next_wait(stack: ExitStack) -> None:
    work, stream = Work(stack), stack.enter_context(Stream())
    module = stack.enter_context(Module(PTX))
    fails = module.function("fails")

    def launch_and_wait() -> None:
        fails.launch((1, 1, 1), 1, Add(), stream)
        stream.synchronize()

    with pytest.raises(DriverError, match="CUDA_ERROR_LAUNCH_FAILED"):
        launch_and_wait()
    with pytest.raises(DriverError, match="CUDA_ERROR_LAUNCH_FAILED"):
        work.down(stream)


@pytest.mark.parametrize(
    ("grid", "threads", "shared"),
    [((0, 1, 1), 32, 0), ((1, 70_000, 1), 32, 0), ((1, 1, 1), 1025, 0), ((1, 1, 1), 1, 65_537)],
)
def test_launches_that_no_device_takes_are_refused(
    stack: ExitStack, grid: tuple[int, int, int], threads: int, shared: int
) -> None:
    work, stream = Work(stack), stack.enter_context(Stream())
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
        work.add_function.launch(grid, threads, Add(work.memory.pointer, COUNT, 1), stream, shared)


def test_modules_are_recognised_and_their_kernels_found_by_name(stack: ExitStack) -> None:
    with pytest.raises(DriverError, match="cuModuleLoadData failed with CUDA_ERROR_INVALID_IMAGE"):
        Module(b"no image at all")
    with pytest.raises(DriverError, match="cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND"):
        stack.enter_context(Module(PTX)).function("subtract")


def test_memory_runs_out(device: Device) -> None:
    free, total = device.memory()
    with DeviceBuffer(free - 100) as most:
        assert device.memory() == (100, total)
        with pytest.raises(OutOfDeviceMemory, match="cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY"):
            DeviceBuffer(101)
        most.close()
        assert device.memory() == (free, total)


def test_a_view_stays_in_its_buffer(device: Device) -> None:
    assert device is not None
    with PinnedBuffer(64) as buffer:
        assert buffer.view(np.float32, (4, 4)).nbytes == 64
        with pytest.raises(ValueError, match="not within the 64"):
            buffer.view(np.float32, (4, 4), 4)


def test_a_device_that_is_not_there(simulation: Any) -> None:
    with pytest.raises(UsageError, match=r"device 1: the CUDA driver reports 1 of them"):
        Device(1)
    simulation.fail("cuInit", 0, 100)
    with pytest.raises(UsageError, match=r"no CUDA device can be used: CUDA: cuInit failed with CUDA_ERROR_NO_DEVICE"):
        Device()


def test_an_old_driver_is_told_before_anything_is_loaded(simulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert simulation is not None
    monkeypatch.setattr(
        driver_module, "call", lambda name, *given: 12040 if name == "cuDriverGetVersion" else call(name, *given)
    )
    with pytest.raises(UsageError, match=r"driver is one for CUDA 12\.4, which .* update it to 580 or newer"):
        Device()


def test_calls_without_a_current_context_are_refused(simulation: Any) -> None:
    assert simulation is not None
    with Device() as device:
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
            DeviceBuffer(8)
        with device.current(), device.current():
            DeviceBuffer(8).close()
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
            DeviceBuffer(8)


def _everything() -> None:
    """One pass through every object of the module."""
    with ExitStack() as stack:
        device = stack.enter_context(Device())
        stack.enter_context(device.current())
        work = Work(stack)
        streams = [stack.enter_context(Stream()) for _ in range(2)]
        events = [stack.enter_context(Event(timing=True)) for _ in range(2)]
        device.memory()
        work.memory.fill(0, streams[0])
        work.up(streams[0])
        events[0].record(streams[0])
        streams[1].wait(events[0])
        work.add(1, streams[1])
        work.add_function.launch((1, 1, 1), 32, Add(work.memory.pointer, 32, 0), streams[1], 60_000)
        work.down(streams[1])
        events[1].record(streams[1])
        events[1].synchronize()
        events[1].milliseconds_since(events[0])
        with Graph.capture(streams[0]) as made:
            work.add(1, streams[0])
        graph = stack.enter_context(made[0])
        graph.launch(streams[0])
        streams[0].synchronize()
        device.synchronize()


def test_each_call_that_fails_is_told_by_name_and_everything_is_given_back(simulation: Any) -> None:
    _everything()
    calls = [name for name in simulation.calls() if name != "cuGetErrorString"]
    assert len(set(calls)) > 25
    for index, name in enumerate(calls):
        number = calls[: index + 1].count(name)
        simulation.reset()
        simulation.fail(name, number, 719)
        with pytest.raises((DriverError, UsageError)) as told:
            _everything()
        message = str(told.value)
        assert "CUDA_ERROR_LAUNCH_FAILED" in message
        assert name.startswith("run:") or f"{name} failed" in message, message
        simulation.reset()
        live = simulation.live()
        if name in GIVING_BACK:  # what could not be given back is left, and nothing else
            assert sum(count > 0 for count in live.values()) <= 1, (name, live)
            simulation.forget()
        else:
            assert not any(live.values()), (name, live)

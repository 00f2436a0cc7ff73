"""Each call of the driver that fails under the TensorRT backend is told, and nothing is left behind."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parkdet.runtime.backends.base import BackendOptions, open_backend
from parkdet.runtime.backends.tensorrt import TensorRtBackend
from parkdet.runtime.backends.tensorrt_engine import TensorRtError
from parkdet.runtime.cuda.driver import DriverError
from parkdet.runtime.errors import ArtifactError, ParkdetError, UsageError
from tests.gpu_free.driver.simulated.engines import CANVAS, NMS, batch_of, same

OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719


def _session(engine: Path) -> None:
    """A backend's life: opened, used with and without graphs, heads fetched, closed."""
    images, letterboxes = batch_of(1, 0)
    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
        for _ in range(3):  # the third is recorded
            backend.detect(images, letterboxes, NMS)
        backend.infer(np.zeros((1, *CANVAS, 3), np.uint8))


GIVING_BACK = ("Free", "Destroy", "Unload", "Release", "cuCtxPopCurrent")


def test_each_call_that_fails_is_told_and_everything_is_given_back(
    trt: Any, engine: Path, simulation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert trt is not None
    _session(engine)
    calls = simulation.calls()
    # Every name at its first and its last place: what lies between repeats.
    places = {(name, number) for name in set(calls) for number in (1, calls.count(name))}
    assert len(places) > 50
    for name, number in sorted(places):
        if name.startswith("cuGetErrorString"):
            continue
        simulation.reset()
        simulation.fail(name, number, LAUNCH_FAILED)
        caplog.clear()
        message = ""
        try:
            _session(engine)
        except ParkdetError as told:
            message = str(told)
        else:  # an engine that cannot be recorded runs without
            assert name == "cuLaunchHostFunc"
            message = caplog.text
        assert "CUDA_ERROR_LAUNCH_FAILED" in message or "Cuda Runtime (719)" in message, (name, number, message)
        live = simulation.live()
        if name == "cuCtxPushCurrent" and number == calls.count(name):
            simulation.forget()  # when closing: without the context nothing can be given back
        elif any(word in name for word in GIVING_BACK):
            assert sum(count > 0 for count in live.values()) <= 1, (name, number, live)
            simulation.forget()
        else:
            assert not any(live.values()), (name, number, live)


def test_threads_that_meet_a_failure_leave_nothing_behind(trt: Any, engine: Path, simulation: Any) -> None:
    assert trt is not None
    errors: list[str] = []
    lock = threading.Lock()

    def work(backend: TensorRtBackend, seed: int) -> None:
        try:
            backend.detect(*batch_of(4, seed), NMS)
        except DriverError as error:
            with lock:
                errors.append(error.name)
        except TensorRtError as error:  # the device is lost: whoever calls next is told, and that may be TensorRT
            with lock:
                errors.append("CUDA_ERROR_LAUNCH_FAILED" if f"({LAUNCH_FAILED})" in str(error) else str(error))

    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
        simulation.fail("run:kernel", 40, LAUNCH_FAILED)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: work(backend, seed), range(8)))
    assert errors
    assert set(errors) == {"CUDA_ERROR_LAUNCH_FAILED"}


def test_an_engine_that_fails_while_it_is_recorded_runs_again_when_it_is_well(
    backend: TensorRtBackend, trt: Any, simulation: Any
) -> None:
    assert simulation is not None
    batch = batch_of(1, 0)
    first = [backend.detect(*batch, NMS) for _ in range(2)]  # both slots
    trt.answers["IExecutionContext", "execute_async_v3"] = False
    with pytest.raises(ParkdetError, match="the engine is unwell; and says why"):
        backend.detect(*batch, NMS)
    trt.answers.clear()
    assert all(same(backend.detect(*batch, NMS), first[0]) for _ in range(4))


def test_a_slot_that_another_thread_takes_while_memory_is_given_back_is_not_lost(
    backend: TensorRtBackend, simulation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Contended(queue.SimpleQueue[Any]):
        """Its second slot is another's just when it is asked for."""

        def get_nowait(self) -> Any:
            if self.qsize() == 1:
                raise queue.Empty
            return super().get_nowait()

    contended: Contended = Contended()
    for slot in backend._slots:
        contended.put(slot)
    backend._free = contended
    simulation.fail("cuMemAlloc", 4, OUT_OF_MEMORY)
    backend.detect(*batch_of(4, 0), NMS)
    assert "going on with 2 at a time" in caplog.text
    assert contended.qsize() == len(backend._slots)


def test_closing_waits_for_what_is_in_progress(trt: Any, engine: Path, simulation: Any) -> None:
    """TensorRT's contexts must not go while their work is queued."""
    assert trt is not None
    backend = TensorRtBackend(engine, BackendOptions(device="cuda:0"))
    backend.detect(*batch_of(2, 0), NMS)
    backend._free.get()  # as a thread has it that waits for its batch
    simulation.reset()
    backend.close()
    calls = simulation.calls()
    assert calls.index("cuStreamSynchronize") < min(calls.index(name) for name in calls if "Free" in name)


@pytest.mark.parametrize(
    ("method", "enumeration", "value", "words"),
    [
        ("get_tensor_mode", "TensorIOMode", "INPUT", "has 3 inputs, not one of images"),
        ("get_tensor_location", "TensorLocation", "HOST", "in host memory"),
    ],
)
def test_engines_of_other_makes_are_refused(
    trt: Any, engine: Path, simulation: Any, method: str, enumeration: str, value: str, words: str
) -> None:
    assert simulation is not None
    trt.answers.messages = ()
    trt.answers["ICudaEngine", method] = trt.surface.enumerations[enumeration][value]
    with pytest.raises(ArtifactError, match=words):
        open_backend(engine)


def test_a_folder_without_an_engine_is_refused(trt: Any, simulation: Any, tmp_path: Path) -> None:
    assert trt is not None
    assert simulation is not None
    with pytest.raises(UsageError, match=r"holds no engine; 'parkdet export --engine tensorrt' makes one"):
        TensorRtBackend(tmp_path, BackendOptions(device="cuda:0"))

"""What TensorRT answers and logs reaches the user, and its kinds are asked for what each must be asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.backends.base import BackendOptions, open_backend
from parkdet.runtime.backends.tensorrt import TensorRtBackend
from parkdet.runtime.errors import ArtifactError, ParkdetError
from tests.gpu_free.driver.simulated.engines import NMS, batch_of, same


@pytest.mark.parametrize(
    ("kind", "method", "instead"),
    [
        ("Runtime", "__init__", None), ("IExecutionContext", "update_device_memory_size_for_shapes", 0),
        ("Runtime", "deserialize_cuda_engine", None), ("ICudaEngine", "create_execution_context", None),
        ("IExecutionContext", "set_input_shape", False), ("IExecutionContext", "infer_shapes", ["images"]),
        ("IExecutionContext", "infer_shapes", None),
        ("IExecutionContext", "set_tensor_address", False), ("IExecutionContext", "execute_async_v3", False),
    ],
)  # fmt: skip
def test_what_tensorrt_refuses_is_an_error_with_its_words(
    trt: Any, engine: Path, simulation: Any, kind: str, method: str, instead: Any
) -> None:
    assert simulation is not None
    trt.answers[kind, method] = instead
    images, letterboxes = batch_of(2, 1)

    def session() -> None:
        with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
            backend.detect(images, letterboxes, NMS)

    with pytest.raises(ParkdetError, match="the engine is unwell; and says why"):
        session()


@pytest.mark.parametrize("flavour", ["rtx"])
def test_tensorrt_for_rtx_records_the_kernels_of_the_shape(backend: TensorRtBackend, trt: Any, simulation: Any) -> None:
    batch = batch_of(2, 1)
    for _ in range(6):
        backend.detect(*batch, NMS)
    assert "cuGraphLaunch" in simulation.calls()
    assert trt.general_runs == 0


@pytest.mark.parametrize("flavour", ["rtx"])
def test_a_runtime_configuration_that_is_refused_is_told(backend: TensorRtBackend, trt: Any, simulation: Any) -> None:
    assert simulation is not None
    trt.answers["ICudaEngine", "create_runtime_config"] = None
    with pytest.raises(ParkdetError, match="no runtime configuration could be made: the engine is unwell"):
        backend.detect(*batch_of(2, 1), NMS)


def test_an_engine_too_large_for_the_memory_is_not_called_another_gpus(trt: Any, engine: Path, simulation: Any) -> None:
    assert simulation is not None
    trt.answers["Runtime", "deserialize_cuda_engine"] = None
    trt.answers.messages = ("Error Code 2: OutOfMemory (Requested size was 300000000 bytes.)",)
    with pytest.raises(ArtifactError, match=r"300000000 bytes.*the GPU's memory does not hold it") as told:
        open_backend(engine)
    assert "parkdet export" not in str(told.value)


def test_out_of_memory_in_tensorrt_shrinks_the_batch(
    backend: TensorRtBackend, trt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trt.answers["ICudaEngine", "create_execution_context"] = None
    trt.answers.messages = ("Error Code 2: OutOfMemory (Requested size was 9 bytes.)",)
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError, match="a batch of 1 does not fit"):
        backend.detect(*batch_of(4, 1), NMS)
    assert "going on with 2 at a time" in caplog.text


def test_a_second_backend_beside_the_first_hears_tensorrt_too(
    backend: TensorRtBackend, trt: Any, engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `bench --vs` and a fallback open them: TensorRT has one logger in a process, the first one's."""
    batch = batch_of(4, 1)
    expected = backend.detect(*batch, NMS)
    trt.answers.messages = ("Error Code 2: OutOfMemory (Requested size was 9 bytes.)",)
    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as second:
        assert same(second.detect(*batch, NMS), expected)
        trt.answers["ICudaEngine", "create_execution_context"] = None
        with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError, match="a batch of 1 does not fit"):
            second.detect(*batch_of(3, 1), NMS)
    assert "going on with 1 at a time" in caplog.text

"""OpenVINO on the CPU: the default. One compiled model a canvas size, several requests at once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.backends.base import Goal, GraphBackend, spec_from_metadata
from parkdet.runtime.backends.onnx_file import read_onnx_metadata
from parkdet.runtime.errors import ArtifactError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.model_spec import SPEC_KEY, TensorSpec

if TYPE_CHECKING:
    import openvino

MAX_COMPILED = 4
"""Batch and canvas sizes that stay compiled; each holds its own copy of the weights."""


class OpenVinoBackend(GraphBackend):
    """A graph in OpenVINO's CPU plugin, compiled for each (batch, height, width) as it comes, in float32."""

    name = "openvino"

    def __init__(self, path: Path, threads: int, goal: Goal) -> None:
        import openvino as ov

        if path.suffix.lower() == ".onnx":
            # Before OpenVINO sees it: on a damaged file its frontends print to the terminal in turn.
            metadata = read_onnx_metadata(path)
        else:
            _check_ir(path)
            metadata = {}
        self._core = ov.Core()
        self._model: openvino.Model | None = self._core.read_model(path)
        if path.suffix.lower() != ".onnx" and self._model.has_rt_info(["framework", SPEC_KEY]):
            metadata[SPEC_KEY] = str(self._model.get_rt_info(["framework", SPEC_KEY]).value)
        spec = spec_from_metadata(path, metadata)
        super().__init__(
            path,
            spec,
            [_tensor_spec(port) for port in self._model.inputs],
            [_tensor_spec(port) for port in self._model.outputs],
        )
        self.parallel = 1 if goal == "latency" else streams_for(threads)
        self._settings: dict[str, Any] = {
            # On processors with AMX the default is bfloat16; boxes are moved by pixels at its 8 bits.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": goal.upper(),
            "NUM_STREAMS": self.parallel,
            "INFERENCE_NUM_THREADS": threads,
            # Decoding and post-processing share the processors; pinned threads could not make room.
            "ENABLE_CPU_PINNING": False,
        }
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[int, ...], SimpleQueue[openvino.InferRequest]] = OrderedDict()

    def _run(self, images: ImageArray) -> list[NDArray[np.floating[Any]]]:
        idle = self._requests(images.shape)
        request = idle.get()
        try:
            request.infer([images], share_inputs=True)
            return [np.array(tensor.data) for tensor in request.output_tensors]
        finally:
            idle.put(request)

    def _requests(self, shape: tuple[int, ...]) -> SimpleQueue[openvino.InferRequest]:
        """The idle requests of the model compiled for this input shape."""
        with self._lock:
            idle = self._compiled.get(shape)
            if idle is not None:
                self._compiled.move_to_end(shape)
                return idle
            if self._model is None:
                raise ValueError(f"{self.path}: this {self.name} backend is closed")
            while len(self._compiled) >= MAX_COMPILED:
                self._compiled.popitem(last=False)
            model = self._model.clone()
            model.reshape({model.input(0): list(shape)})
            compiled = self._core.compile_model(model, "CPU", self._settings)
            idle = SimpleQueue()
            for _ in range(self.parallel):
                idle.put(compiled.create_infer_request())
            self._compiled[shape] = idle
            return idle

    def _release(self) -> None:
        with self._lock:
            self._compiled.clear()
            self._model = None


def streams_for(threads: int) -> int:
    """Requests that run side by side for throughput.

    A thread each has no barriers to wait at: on 2 cores 5 % more images than one request on both, and twice as
    many when other processes want the cores too. On large machines four threads share a request, so that
    activations take a quarter of the memory.
    """
    return threads if threads <= 4 else max(threads // 4, 4)


def _check_ir(path: Path) -> None:
    """ArtifactError unless the .xml and the .bin beside it are there and not empty."""
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise ArtifactError(f"{file}: is missing; an OpenVINO model is {path.name} with {weights.name}")
        if os.path.getsize(file) == 0:  # noqa: PTH202 - one spelling for both
            raise ArtifactError(f"{file}: has zero bytes; run 'parkdet export' again or copy the folder anew")


def _tensor_spec(port: openvino.Output) -> TensorSpec:
    shape = tuple(side.get_length() if side.is_static else -1 for side in port.get_partial_shape())
    dtype = np.dtype(port.get_element_type().to_dtype()).name
    return TensorSpec(name=port.any_name, dtype=dtype, shape=shape)

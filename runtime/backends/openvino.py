"""OpenVINO on the CPU: the default. One compiled model a canvas size, several requests at once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.backends.base import BackendOptions, GraphBackend, Precision, heads_to_compute, spec_from_metadata
from parkdet.runtime.backends.graph_cache import GraphCache, artifact_digest
from parkdet.runtime.backends.onnx_file import read_onnx_metadata
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.model_spec import SPEC_KEY, TensorSpec

if TYPE_CHECKING:
    import openvino

MAX_COMPILED = 4
"""Batch and canvas sizes that stay compiled; each holds its own copy of the weights."""

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_WIDEST = float(np.finfo(np.float32).max)


class OpenVinoBackend(GraphBackend):
    """A graph in OpenVINO's CPU plugin, compiled for each (batch, height, width) as it comes."""

    name = "openvino"

    def __init__(self, path: Path, options: BackendOptions) -> None:
        self._core = process_core()
        if path.suffix.lower() == ".onnx":
            # Before OpenVINO sees it: on a damaged file its frontends print to the terminal in turn.
            metadata = read_onnx_metadata(path)
            spec = spec_from_metadata(path, metadata)
            model = self._read_onnx(path)
        else:
            _check_ir(path)
            model = self._core.read_model(path)
            has_spec = model.has_rt_info(["framework", SPEC_KEY])
            metadata = {SPEC_KEY: str(model.get_rt_info(["framework", SPEC_KEY]).value)} if has_spec else {}
            spec = spec_from_metadata(path, metadata)
        inputs, outputs = ([_tensor_spec(port) for port in ports] for ports in (model.inputs, model.outputs))
        super().__init__(path, spec, inputs, outputs)
        self._model: openvino.Model | None = model
        computed_in = _precision(options.precision)
        self.precision = computed_in if spec.precision != "int8" else f"int8-{computed_in}"
        self.parallel = 1 if options.goal == "latency" else streams_for(options.threads)
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[computed_in],
            "PERFORMANCE_HINT": options.goal.upper(),
            "NUM_STREAMS": self.parallel,
            "INFERENCE_NUM_THREADS": options.threads,
            # Decoding and post-processing share the processors; pinned threads could not make room.
            "ENABLE_CPU_PINNING": False,
        }
        self._wanted = heads_to_compute(spec, options.views)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[int, ...], SimpleQueue[openvino.InferRequest]] = OrderedDict()

    def _run(self, images: ImageArray) -> list[NDArray[np.floating[Any]]]:
        idle = self._requests(images.shape)
        request = idle.get()
        try:
            # Several threads call at once, each with a request of its own. Not start_async and wait: the library's
            # completion thread may hold the request and want Python's lock while the next call has it the other way.
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
            if self._closed:
                raise ValueError(f"{self.path}: this {self.name} backend is closed")
            while len(self._compiled) >= MAX_COMPILED:
                self._compiled.popitem(last=False)
            compiled = self._compile(shape)
            idle = SimpleQueue()
            for _ in range(self.parallel):
                idle.put(compiled.create_infer_request())
            self._compiled[shape] = idle
            return idle

    def _compile(self, shape: tuple[int, ...]) -> openvino.CompiledModel:
        """The graph for one input shape."""
        import openvino as ov

        assert self._model is not None
        model = self._model.clone()
        if self._wanted is not None:
            model = ov.Model(model.get_results()[: self._wanted], model.get_parameters(), model.get_name())
        model.reshape({model.input(0): list(shape)})
        return self._core.compile_model(_with_float_heads(model), "CPU", self._settings)

    def _read_onnx(self, path: Path) -> openvino.Model:
        """The file's graph, from the cache if it was read before."""
        cache = GraphCache(artifact_digest(path))
        if (model := cache.load(self._core)) is None:
            model = self._core.read_model(path)
            cache.store(model)
            # From now on the mapped form, so that this run computes as the next one will, and in less memory.
            model = cache.load(self._core) or model
        return model

    def _release(self) -> None:
        with self._lock:
            self._compiled.clear()
            self._model = None


_core_lock = threading.Lock()


def process_core() -> openvino.Core:
    """The process's one `Core`, which lives as long as the process.

    The CPU plugin gives the thread that loads it a stack for signals, and takes that away again in whatever thread
    drops the last `Core`. Where these are two, the kernel kills the process at the first thread's next signal: Ctrl-C,
    or the end of a child.
    """
    with _core_lock:
        return _made_core()


@cache
def _made_core() -> openvino.Core:
    import openvino as ov

    # The library's table of element types is made at its first use. Two threads that meet there wait for one
    # another for ever, one holding Python's lock and the other the table's: so it is used here, by one.
    ov.Type.u8.to_dtype()
    return ov.Core()


def default_precision() -> Precision:
    """What is computed in unless told otherwise: bf16 where the processor has instructions for it."""
    return "bf16" if "bf" in str(process_core().get_property("CPU", "INFERENCE_PRECISION_HINT")) else "fp32"


def _precision(asked: Precision | None) -> Precision:
    """What to compute in. UsageError for bf16 on a processor that would compute it slower than float32."""
    if asked == "bf16" and default_precision() != "bf16":
        raise UsageError("--precision bf16: this processor has no instructions for it (avx512_bf16 or amx_bf16)")
    return asked or default_precision()


def _with_float_heads(model: openvino.Model) -> openvino.Model:
    """The model, its heads leaving their last convolution in float32 whatever it computes in.

    In bf16 the plugin would round the raw heads to 8 bits, by which boxes move a pixel and more. It sums in
    float32 all the same, and an elementwise operation that is fused into a convolution decides its output's
    type; those after the last convolution keep float32. So each head gets a clamp to all of float32.
    """
    import openvino.opset13 as ops

    for result in model.get_results():
        last, node = None, result.input_value(0).get_node()
        while node.get_type_name() in ("Transpose", "Reshape", "Convert"):
            last, node = node, node.input_value(0).get_node()
        if last is None or node.get_type_name() not in ("Add", "Convolution"):
            continue  # no head of ours; it stays as it is
        source = last.input_value(0)
        readers = list(source.get_target_inputs())
        clamped = ops.clamp(source, -_WIDEST, _WIDEST).output(0)
        for reader in readers:
            reader.replace_source_output(clamped)
    return model


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

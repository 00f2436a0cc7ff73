"""ONNX Runtime: on the CPU the second opinion and the reference for the others; on a GPU its CUDA and TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.backends.base import BackendOptions, GraphBackend, heads_to_compute, spec_from_metadata
from parkdet.runtime.backends.onnx_file import read_onnx_metadata
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.model_spec import TensorSpec

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"

_ERRORS_ONLY = 3
_GPU_BATCH = 8

_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(float16)": "float16"}


class OnnxRuntimeBackend(GraphBackend):
    """A graph in ONNX Runtime, on the CPU or with its CUDA provider; one call at a time uses all threads."""

    name = "onnxruntime"
    _gpu_provider = CUDA_PROVIDER

    def __init__(self, path: Path, options: BackendOptions) -> None:
        metadata = read_onnx_metadata(path)
        spec = spec_from_metadata(path, metadata)
        if options.precision not in (None, "fp32"):
            raise UsageError(f"--precision {options.precision}: {self.name} computes a graph as it is stored")
        self.precision = spec.precision
        import onnxruntime as ort

        ort.disable_telemetry_events()
        session_options = ort.SessionOptions()
        session_options.log_severity_level = _ERRORS_ONLY
        # A number of its own keeps the library from pinning threads to processors outside the process's set.
        session_options.intra_op_num_threads = options.threads
        session_options.inter_op_num_threads = 1
        # Threads that wait in a loop take the processor from decoding and post-processing.
        session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = CPU_PROVIDER if options.device == "cpu" else self._gpu_provider
        if provider not in ort.get_available_providers():
            raise UsageError(
                f"{self.name} on {options.device}: this onnxruntime has no {provider} (it has "
                f"{', '.join(ort.get_available_providers())}); replace the package: pip uninstall onnxruntime, "
                "then pip install 'parkdet[gpu]'"
            )
        try:
            session = ort.InferenceSession(str(path), session_options, providers=_providers(provider, options.device))
        except Exception as error:  # the library's exceptions share no base class but this
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ArtifactError(
                f"{path}: ONNX Runtime cannot open it ({detail}); run 'parkdet export' again"
            ) from error
        check_provider(path, session.get_providers(), provider)
        session.disable_fallback()
        super().__init__(
            path,
            spec,
            [_tensor_spec(tensor) for tensor in session.get_inputs()],
            [_tensor_spec(tensor) for tensor in session.get_outputs()],
        )
        self._input = session.get_inputs()[0].name
        wanted = heads_to_compute(spec, options.views)
        self._outputs = [tensor.name for tensor in session.get_outputs()][:wanted]
        self._session: Any = session
        if provider != CPU_PROVIDER:
            self.worth_batching = _GPU_BATCH

    def _run(self, images: ImageArray) -> list[NDArray[np.floating[Any]]]:
        heads: list[NDArray[np.floating[Any]]] = self._session.run(self._outputs, {self._input: images})
        return heads

    def _release(self) -> None:
        self._session = None


class OnnxRuntimeTensorRtBackend(OnnxRuntimeBackend):
    """A graph in ONNX Runtime's TensorRT provider; what TensorRT does not take runs on CUDA, never on the CPU."""

    name = "onnxruntime-tensorrt"
    _gpu_provider = TENSORRT_PROVIDER


def _providers(provider: str, device: str) -> list[tuple[str, dict[str, str]]]:
    """The provider with the device's number, and behind TensorRT the CUDA one for what it does not take."""
    if provider == CPU_PROVIDER:
        return [(CPU_PROVIDER, {})]
    number = {"device_id": device.partition(":")[2]}
    behind = [(CUDA_PROVIDER, number)] if provider == TENSORRT_PROVIDER else []
    return [(provider, number), *behind]


def check_provider(path: Path, active: list[str], asked: str) -> None:
    """ArtifactError when a session runs on another provider than the one asked for.

    Where a provider cannot start, the library goes to the CPU without an error.
    """
    if not active or active[0] != asked:
        raise ArtifactError(
            f"{path}: ONNX Runtime put it on {', '.join(active) or 'no provider'} instead of {asked}; "
            "'parkdet doctor' looks for the driver and the libraries that it needs"
        )


def _tensor_spec(tensor: Any) -> TensorSpec:
    shape = tuple(side if isinstance(side, int) and side > 0 else -1 for side in tensor.shape)
    return TensorSpec(name=tensor.name, dtype=_DTYPES.get(tensor.type, tensor.type), shape=shape)

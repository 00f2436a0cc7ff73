"""ONNX Runtime on the CPU: the second opinion, and the reference for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.backends.base import Goal, GraphBackend, spec_from_metadata
from parkdet.runtime.backends.onnx_file import read_onnx_metadata
from parkdet.runtime.errors import ArtifactError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.model_spec import TensorSpec

PROVIDER = "CPUExecutionProvider"

_ERRORS_ONLY = 3

_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(float16)": "float16"}


class OnnxRuntimeBackend(GraphBackend):
    """A graph in ONNX Runtime's CPU provider; one call at a time uses all threads."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int, goal: Goal) -> None:  # noqa: ARG002 - one way serves both
        metadata = read_onnx_metadata(path)
        spec = spec_from_metadata(path, metadata)
        import onnxruntime as ort

        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # A number of its own keeps the library from pinning threads to processors outside the process's set.
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that wait in a loop take the processor from decoding and post-processing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as error:  # the library's exceptions share no base class but this
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ArtifactError(
                f"{path}: ONNX Runtime cannot open it ({detail}); run 'parkdet export' again"
            ) from error
        check_provider(path, session.get_providers())
        session.disable_fallback()
        super().__init__(
            path,
            spec,
            [_tensor_spec(tensor) for tensor in session.get_inputs()],
            [_tensor_spec(tensor) for tensor in session.get_outputs()],
        )
        self._input = session.get_inputs()[0].name
        self._session: Any = session

    def _run(self, images: ImageArray) -> list[NDArray[np.floating[Any]]]:
        heads: list[NDArray[np.floating[Any]]] = self._session.run(None, {self._input: images})
        return heads

    def _release(self) -> None:
        self._session = None


def check_provider(path: Path, active: list[str], asked: str = PROVIDER) -> None:
    """ArtifactError when a session runs on another provider than the one asked for."""
    if not active or active[0] != asked:
        raise ArtifactError(
            f"{path}: ONNX Runtime put it on {', '.join(active) or 'no provider'} instead of {asked}; "
            "install the onnxruntime package that has it"
        )


def _tensor_spec(tensor: Any) -> TensorSpec:
    shape = tuple(side if isinstance(side, int) and side > 0 else -1 for side in tensor.shape)
    return TensorSpec(name=tensor.name, dtype=_DTYPES.get(tensor.type, tensor.type), shape=shape)

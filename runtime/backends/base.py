"""What runs a graph: one interface, and the registry from which a file's suffix picks."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.errors import ArtifactError, ParkdetError, UsageError
from parkdet.runtime.geometry import FloatArray, ImageArray, Letterbox
from parkdet.runtime.model_spec import SPEC_KEY, ModelSpec, TensorSpec
from parkdet.runtime.views import TTA_VIEWS, head_sources, heads_of_first_views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parkdet.runtime.detections import Detections
    from parkdet.runtime.nms import NmsCounts, NmsSettings

Goal = Literal["throughput", "latency"]
Precision = Literal["fp32", "bf16"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""In which a graph of float32 weights can be computed; boxes are float32 in either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """How an artifact is to be opened."""

    device: str = "cpu"
    """`cpu`, or `cuda:0` and so on."""
    threads: int = 1
    """Processors for the model."""
    goal: Goal = "throughput"
    precision: Precision | None = None
    """None: the fastest one that the project's parity limits allow on this device."""
    views: int | None = None
    """Of a test-time graph the first so many views only; all of them when None."""


class Backend(Protocol):
    """A graph, ready to run. Everything behind it works with any object of this shape."""

    name: str
    path: Path
    spec: ModelSpec
    fixed_input: tuple[int | None, int | None, int | None]
    """Batch, height and width that the graph insists on; None where any will do."""
    parallel: int
    """Calls of `infer` that are worth having in progress at once."""
    precision: str
    """In which the network is computed: fp32, bf16, fp16, int8. Two runs of different precision are two runs."""

    def infer(self, canvases: ImageArray) -> list[FloatArray]:
        """Raw heads of canvases (B, H, W, 3) uint8 BGR: a level each, (B, na, h, w, 5 + nc) float32.

        May be called from several threads. The arrays belong to the caller.
        """
        ...

    def close(self) -> None:
        """Give the memory back; `infer` must not be called again."""
        ...


@runtime_checkable
class FinishingBackend(Backend, Protocol):
    """A backend that letterboxes and suppresses on its own device: images in, finished detections out.

    `infer` gives the raw heads of canvases all the same.
    """

    canvases: tuple[tuple[int, int], ...]
    """Height and width of every canvas that it runs; empty where any will do."""

    def detect(
        self, images: Sequence[ImageArray], letterboxes: Sequence[Letterbox], nms: NmsSettings
    ) -> list[tuple[Detections, NmsCounts]]:
        """Detections in canvas pixels of each image (h, w, 3) uint8 BGR, and what the caps cut off.

        The letterboxes, one an image, are all onto one canvas. May be called from several threads.
        """
        ...


class GraphBackend(ABC):
    """What the backends share: the checks around one native call."""

    name: str
    parallel = 1
    precision = "fp32"
    worth_batching = 1
    """Canvases that a caller with many should give at once: on a CPU a batch costs what its images cost one by one."""

    def __init__(self, path: Path, spec: ModelSpec, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
        check_graph(path, spec, inputs, outputs)
        self.path = path
        self.spec = spec
        batch, height, width, _ = (side if side > 0 else None for side in inputs[0].shape)
        self.fixed_input = (batch, height, width)
        self._closed = False

    def infer(self, canvases: ImageArray) -> list[FloatArray]:
        """See `Backend.infer`. ValueError when the canvases do not fit the graph."""
        if self._closed:
            raise ValueError(f"{self.path}: this {self.name} backend is closed")
        if canvases.dtype != np.uint8 or canvases.ndim != 4 or canvases.shape[3] != 3 or not canvases.size:
            raise ValueError(f"canvases are (B, H, W, 3) uint8, not {canvases.shape} {canvases.dtype}")
        if any(side % self.spec.stride_max for side in canvases.shape[1:3]):
            raise ValueError(f"a canvas's sides are multiples of {self.spec.stride_max}: {canvases.shape}")
        batch, *fixed = self.fixed_input
        if any(want is not None and want != side for want, side in zip(fixed, canvases.shape[1:3], strict=True)):
            raise ValueError(f"{self.path} was exported for canvases of {fixed}, not {canvases.shape[1:3]}")
        images = np.ascontiguousarray(canvases)
        if batch is None or batch == len(images):
            return self._floats(images)
        # A graph of a fixed batch runs in portions of it; the last one is filled up with zeros.
        portions = []
        for start in range(0, len(images), batch):
            portion = images[start : start + batch]
            filled = np.zeros((batch, *images.shape[1:]), np.uint8)
            filled[: len(portion)] = portion
            portions.append([head[: len(portion)] for head in self._floats(filled)])
        return [np.concatenate(level) for level in zip(*portions, strict=True)]

    def _floats(self, images: ImageArray) -> list[FloatArray]:
        try:
            heads = self._run(images)
        except RuntimeError as error:
            raise ArtifactError(
                f"{self.path}: {self.name} failed on a batch of {images.shape}: {first_line(error)}"
            ) from error
        return [np.asarray(head, np.float32) for head in heads]

    def close(self) -> None:
        """Give the memory back."""
        self._closed = True
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _run(self, images: ImageArray) -> list[NDArray[np.floating[Any]]]:
        """The graph's outputs for a checked, contiguous batch, in new arrays; from any thread."""

    @abstractmethod
    def _release(self) -> None:
        """Drop the native objects."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One backend's place in the registry."""

    package: str
    """What must be installed."""
    home: str
    """Module and class, imported when chosen."""
    suffixes: tuple[str, ...]
    devices: tuple[str, ...]
    """Kinds of device that it runs on, the default first."""


ENGINE_SUFFIX = ".engine"

_BACKENDS = {
    "openvino": _Kind("openvino", "parkdet.runtime.backends.openvino:OpenVinoBackend", (".onnx", ".xml"), ("cpu",)),
    "onnxruntime": _Kind(
        "onnxruntime", "parkdet.runtime.backends.onnxruntime:OnnxRuntimeBackend", (".onnx",), ("cpu", "cuda")
    ),
    "onnxruntime-tensorrt": _Kind(
        "onnxruntime", "parkdet.runtime.backends.onnxruntime:OnnxRuntimeTensorRtBackend", (".onnx",), ("cuda",)
    ),
    "tensorrt": _Kind("cuda", "parkdet.runtime.backends.tensorrt:TensorRtBackend", (ENGINE_SUFFIX,), ("cuda",)),
}
"""In the order of preference: the first one that reads a suffix is its default."""

BACKEND_NAMES = tuple(_BACKENDS)


def resolve_artifact(path: str | os.PathLike[str]) -> Path:
    """What to open: the path itself, the .xml inside an OpenVINO folder, or a folder of engines.

    UsageError when nothing is there or no backend reads such a file; ArtifactError for a folder without
    exactly one model or any engine.
    """
    artifact = Path(path)
    if not artifact.exists():
        raise UsageError(f"{artifact}: there is no such file or folder")
    if artifact.is_dir() and any(artifact.glob(f"*{ENGINE_SUFFIX}")):
        return artifact
    if artifact.is_dir():
        models = sorted(artifact.glob("*.xml"))
        if len(models) != 1:
            raise ArtifactError(f"{artifact}: an OpenVINO folder holds one .xml file, this one {len(models)}")
        artifact = models[0]
    suffix = artifact.suffix.lower()
    if suffix == ".pt":
        raise UsageError(f"{artifact}: is a checkpoint; export it first: parkdet export --weights {artifact}")
    if not any(suffix in kind.suffixes for kind in _BACKENDS.values()):
        raise UsageError(
            f"{artifact}: no backend reads '{suffix or artifact.name}' files; these can be opened: "
            ".onnx (" + ", ".join(name for name, kind in _BACKENDS.items() if ".onnx" in kind.suffixes) + "), "
            ".xml or its folder (openvino), .engine or a folder of them, one a canvas (tensorrt)"
        )
    return artifact


def open_backend(
    path: str | os.PathLike[str],
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    goal: Goal = "throughput",
    precision: Precision | None = None,
    views: int | None = None,
) -> GraphBackend:
    """Open an artifact: `.onnx`, an OpenVINO `.xml` or the folder of one, an `.engine` or a folder of several.

    Without `backend` the first that reads the file and runs on the device: OpenVINO for an ONNX file on the CPU.
    `device`: `cpu`, or `cuda`, `cuda:1`, `1`; by default the backend's own. `threads` is the model's share of
    the processor, by default all of the process's CPU set. `goal` is what to be fast at: many images, or one at a
    time; the numbers are the same. `precision`: by default bf16 where the processor computes in it, else fp32.
    `views`: of a graph with test-time augmentation compute only the first so many views.
    UsageError for what the caller named wrongly; ArtifactError for a file that is empty, damaged or does not
    describe itself.
    """
    if backend is not None and backend not in _BACKENDS:
        raise UsageError(f"backend '{backend}' is not one of {', '.join(_BACKENDS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    artifact = resolve_artifact(path)
    name, on = _choose(artifact, backend, device)
    options = BackendOptions(
        device=on, threads=threads or available_cpus(), goal=goal, precision=precision, views=views
    )
    module, _, class_name = _BACKENDS[name].home.partition(":")
    opener: type[GraphBackend] = getattr(import_module(module), class_name)
    try:
        return opener(artifact, options)  # type: ignore[call-arg, arg-type]
    except ParkdetError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{artifact}: {name} cannot open it ({first_line(error)}); run 'parkdet export' again"
        ) from error


def _choose(artifact: Path, backend: str | None, device: str | None) -> tuple[str, str]:
    """The backend's name and the device, `cpu` or `cuda:N`, for an artifact. UsageError where there is none."""
    suffix = ENGINE_SUFFIX if artifact.is_dir() else artifact.suffix.lower()
    readers = [name for name, kind in _BACKENDS.items() if suffix in kind.suffixes]
    if backend is not None and backend not in readers:
        raise UsageError(f"{artifact}: backend '{backend}' does not read '{suffix}'; {', '.join(readers)} does")
    asked = readers if backend is None else [backend]
    on = _device(device, _BACKENDS[asked[0]].devices[0])
    fitting = [name for name in asked if on.partition(":")[0] in _BACKENDS[name].devices]
    if not fitting:
        able = [name for name in readers if on.partition(":")[0] in _BACKENDS[name].devices]
        hint = f"; {', '.join(able)} does" if able else ""
        raise UsageError(f"{artifact}: {', '.join(asked)} does not run on device '{on}'{hint}")
    name = fitting[0]
    package = _BACKENDS[name].package
    if find_spec(package) is None:
        others = [other for other in readers if other != name and find_spec(_BACKENDS[other].package)]
        hint = f", or choose --backend {others[0]}" if others else ""
        if suffix == ENGINE_SUFFIX:
            hint = ", or 'parkdet[rtx]' for engines of TensorRT for RTX alone"
        extra = "cpu" if on == "cpu" else "gpu"
        raise UsageError(f"{package} is not installed: pip install 'parkdet[{extra}]'{hint}")
    return name, on


def _device(text: str | None, default: str) -> str:
    """`cpu` or `cuda:N` of what users write: cpu, cuda, gpu, cuda:1, 1."""
    word = (text if text is not None else default).strip().lower()
    if word == "cpu":
        return word
    number = word.removeprefix("cuda").removeprefix("gpu").removeprefix(":") or "0"
    if not number.isascii() or not number.isdigit():
        raise UsageError(f"device '{text}' is neither cpu nor a CUDA device (cuda:0, or its number)")
    return f"cuda:{int(number)}"


def available_cpus() -> int:
    """Processors that this process may use: its CPU set where the system has one, not the whole machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def heads_to_compute(spec: ModelSpec, views: int | None) -> int | None:
    """How many of the graph's outputs, from the first on, are wanted; None for all."""
    return None if views is None or not spec.tta else heads_of_first_views(len(spec.strides), views)


def spec_from_metadata(path: Path, metadata: dict[str, str]) -> ModelSpec:
    """The model spec in an artifact's metadata; ArtifactError with the remedy when it has none."""
    text = metadata.get(SPEC_KEY)
    if text is None:
        raise ArtifactError(
            f"{path}: does not describe itself (no '{SPEC_KEY}' in its metadata); make it with 'parkdet export'"
        )
    return ModelSpec.from_json(text, str(path))


def check_graph(path: Path, spec: ModelSpec, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
    """ArtifactError unless the graph takes uint8 (B, H, W, 3) and returns the raw heads of its spec."""
    if spec.input_format != "uint8-nhwc" or spec.head != "raw":
        raise ArtifactError(
            f"{path}: was exported for other tools (input {spec.input_format}, head {spec.head}); parkdet runs graphs "
            "that take uint8 images and give raw heads: run 'parkdet export' again without --input and --head"
        )
    takes = ", ".join(f"{i.dtype} {i.shape}" for i in inputs)
    image = inputs[0] if len(inputs) == 1 else None
    if image is None or image.dtype != "uint8" or len(image.shape) != 4 or image.shape[3] not in (3, -1):
        raise ArtifactError(
            f"{path}: takes {takes}, parkdet runs graphs that take uint8 (B, H, W, 3); "
            "run 'parkdet export' again without --input"
        )
    per_cell, channels = (-1, spec.anchors_per_cell), (-1, spec.num_outputs)
    heads = len(head_sources(len(spec.strides), spec.tta))
    fits = len(outputs) == heads and all(
        len(head.shape) == 5 and head.shape[1] in per_cell and head.shape[4] in channels
        and head.dtype in ("float32", "float16")
        for head in outputs
    )  # fmt: skip
    if not fits:
        returns = ", ".join(f"{o.dtype} {o.shape}" for o in outputs)
        views = f" in {len(TTA_VIEWS)} test-time views" if spec.tta else ""
        raise ArtifactError(
            f"{path}: returns {returns}; its spec has {len(spec.strides)} levels{views}, {heads} raw heads "
            f"(B, {spec.anchors_per_cell}, h, w, {spec.num_outputs}); run 'parkdet export' again without --head"
        )


def refuse_unfit_views(spec: ModelSpec, asked: bool, where: str | os.PathLike[str]) -> None:
    """UsageError where test-time augmentation is asked of an artifact that was exported without it."""
    if asked and not spec.tta:
        raise UsageError(
            f"{os.fspath(where)}: was exported without test-time augmentation; export the checkpoint again with "
            "--tta, or run without it"
        )


def first_line(error: BaseException) -> str:
    """What a native library says, without its traceback: the first line that is not a source location."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Exception from ")]
    return (telling or lines or [type(error).__name__])[0]

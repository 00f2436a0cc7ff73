"""ONNX to a serialized engine with TensorRT 10, 11 or TensorRT for RTX: one builder, each native answer checked.

The three Python packages have one API but for what `_configure` asks about; the module is handed in, so that tests
run the same calls against recorded bindings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from parkdet.export.plugin_node import DOMAIN, OPERATOR
from parkdet.runtime.engine_sidecar import Flavour, HardwareCompatibility, ShapeRange
from parkdet.runtime.errors import ArtifactError, Interrupted, UsageError
from parkdet.runtime.model_spec import ModelSpec, TensorSpec
from parkdet.runtime.terminal import stop_signals

Say = Callable[[str], None]
_PACKAGES: dict[Flavour, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13"),
}
"""Module and distribution of each flavour."""
_DTYPES = {"UINT8": "uint8", "HALF": "float16", "FLOAT": "float32", "INT32": "int32", "INT64": "int64"}
_LINES_KEPT = 12
_SAY_EVERY = 5.0
_MALFORMED = 32
"""Bit of TensorRT for RTX's diagnostics for an engine whose header is not one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """What an engine is built for."""

    flavour: Flavour
    architectures: tuple[int, ...] = ()
    """Compute capabilities; without any, the GPU that is here (TensorRT builds for no other)."""
    hardware: HardwareCompatibility = "none"
    batch: ShapeRange
    canvas_height: ShapeRange
    canvas_width: ShapeRange
    workspace_bytes: int | None = None
    """Most that a kernel may use beside its tensors; TensorRT's own limit, all of the GPU's memory, without it."""
    level: int | None = None
    """Optimisation level, 0 (builds fast) to 5 (runs fast); TensorRT's own, 3, without it."""
    plugin: Path | None = None
    """The parkdet plugin's library, for a graph that ends in its node."""


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A serialized engine, what it takes and returns, and the timings that another build may begin with."""

    plan: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    timings: bytes | None
    seconds: float


def load_bindings(flavour: Flavour) -> Any:
    """The Python package of a TensorRT. UsageError with what to install."""
    module, distribution = _PACKAGES[flavour]
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise UsageError(f"--engine {flavour}: {module} {why}; pip install {distribution}") from error


class _Session:
    """One build's log and the checks of what TensorRT answers."""

    def __init__(self, trt: Any, flavour: Flavour, graph_name: str):
        self.lines: list[str] = []
        self.where = f"{graph_name}: {flavour} {trt.__version__}"
        self.logger = _logger(trt, self.lines)

    def demand(self, answer: Any, what: str) -> Any:
        """The answer, unless it is False or None: then an error with the last lines of the log."""
        if answer is None or answer is False:
            raise self.failure(what)
        return answer

    def made(self, kind: Any, *arguments: Any, what: str) -> Any:
        """An object of TensorRT's. Where the library answers with a null pointer the bindings raise a TypeError."""
        try:
            return kind(*arguments)
        except (TypeError, RuntimeError) as error:
            raise self.failure(what) from error

    def failure(self, what: str, detail: str = "") -> ArtifactError:
        said = "".join(f"\n  {line}" for line in self.lines[-_LINES_KEPT:])
        return ArtifactError(f"{self.where} {what}{f': {detail}' if detail else ''}{said}")


def build_engine(
    trt: Any, graph: bytes, graph_name: str, spec: ModelSpec, settings: BuildSettings, say: Say, timings: bytes = b""
) -> Built:
    """Build one engine. ArtifactError with TensorRT's log wherever it answers no; UsageError for what cannot be.

    `timings` are those of an earlier build on the same GPU, version and graph (empty: none). Interrupted where the
    user stops it: TensorRT is asked to leave off at its next step.
    """
    with stop_signals("Stopping the engine's build ...", insisting=False) as stop:
        built = _built(trt, graph, graph_name, spec, settings, say, timings, stop)
        if built is None or stop.is_set():
            raise Interrupted(f"{graph_name}: the engine's build was stopped; nothing was written")
    return built


def _built(
    trt: Any, graph: bytes, graph_name: str, spec: ModelSpec, settings: BuildSettings, say: Say, timings: bytes,
    stop: threading.Event,
) -> Built | None:  # fmt: skip
    """The engine; None where it was stopped."""
    session = _Session(trt, settings.flavour, graph_name)
    started = time.perf_counter()
    remedy = "TensorRT builds on the GPU that the engine is for. Without one: --engine tensorrt-rtx --arch 75,86,89,120"
    builder = session.made(trt.Builder, session.logger, what=f"makes no builder here; {remedy}")
    network = session.demand(
        builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)), "makes no network"
    )
    if spec.head == "plugin":
        _register_plugin(builder, session, settings)
    parser = session.made(trt.OnnxParser, network, session.logger, what="makes no parser")
    if not parser.parse(graph):
        raise session.failure("cannot read the graph", "; ".join(_parser_errors(parser)))
    inputs, outputs = _as_the_spec(session, spec, *_interface(network))
    config = session.demand(builder.create_builder_config(), "makes no configuration")
    _configure(trt, session, builder, network, config, spec, settings)
    if settings.flavour == "tensorrt":
        cache = session.demand(config.create_timing_cache(timings), "makes no timing cache")
        session.demand(config.set_timing_cache(cache, False), "takes no timing cache")
    config.progress_monitor = _monitor(trt, say, stop)
    plan = _build_interruptibly(builder, network, config)
    if stop.is_set():
        return None
    content = bytes(session.demand(plan, "built no engine"))
    if settings.flavour == "tensorrt-rtx":
        _check_validity(trt, session, content)
    else:
        inputs, outputs = _as_the_spec(session, spec, *_read_back(trt, session, content))
    return Built(content, inputs, outputs, _timings(config, settings), time.perf_counter() - started)


def _configure(
    trt: Any, session: _Session, builder: Any, network: Any, config: Any, spec: ModelSpec, settings: BuildSettings
) -> None:
    if settings.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(settings.architectures)
        for index, architecture in enumerate(settings.architectures):
            capability = getattr(trt.ComputeCapability, f"SM{architecture}")
            session.demand(config.set_compute_capability(capability, index), f"takes no target {architecture}")
        # Else what is larger than its limit for static memory allocates when it runs, and no CUDA graph can record it.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    elif settings.hardware != "none":
        level = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}[settings.hardware]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if settings.workspace_bytes is not None:
        pool = trt.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, settings.workspace_bytes)
        if (granted := config.get_memory_pool_limit(pool)) != settings.workspace_bytes:
            raise session.failure(f"grants a workspace of {granted:,} bytes, not {settings.workspace_bytes:,}")
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    if all(side > 0 for side in spec.inputs[0].shape):
        return  # nothing dynamic, and then TensorRT wants no profile
    profile = session.demand(builder.create_optimization_profile(), "makes no optimisation profile")
    shapes = [_input_shape(spec, settings, bound) for bound in ("low", "best", "high")]
    refused = f"takes no optimisation profile of {', '.join(map(str, shapes))}"
    try:
        profile.set_shape(network.get_input(0).name, *shapes)
    except RuntimeError as error:  # the bindings' way to hand on a false
        raise session.failure(refused, str(error)) from error
    if (index := config.add_optimization_profile(profile)) < 0:
        raise session.failure(refused, f"answer {index}")


def _input_shape(spec: ModelSpec, settings: BuildSettings, bound: str) -> tuple[int, ...]:
    batch, height, width = (
        int(getattr(of, bound)) for of in (settings.batch, settings.canvas_height, settings.canvas_width)
    )
    return (batch, height, width, 3) if spec.input_format == "uint8-nhwc" else (batch, 3, height, width)


def _register_plugin(builder: Any, session: _Session, settings: BuildSettings) -> None:
    if settings.flavour == "tensorrt-rtx":
        # Registering a plugin's creator makes its parser abort the process.
        raise UsageError("--head plugin with --engine tensorrt-rtx: TensorRT for RTX has no plugins; use --head raw")
    if settings.plugin is None or not settings.plugin.is_file():
        raise UsageError(
            f"--head plugin: {settings.plugin or 'no library'} is not there; name the parkdet plugin with --plugin"
        )
    registry = session.demand(builder.get_plugin_registry(), "has no plugin registry")
    session.demand(registry.load_library(str(settings.plugin)), f"does not load {settings.plugin}")
    session.demand(registry.get_creator(OPERATOR, "1", DOMAIN), f"finds no {OPERATOR} version 1 in {settings.plugin}")


def _parser_errors(parser: Any) -> list[str]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} '{error.node_name()}': {error.desc()}" for error in errors] or ["no reason given"]


def _interface(network: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return _tensors((t.name, t.dtype, t.shape) for t in inputs), _tensors((t.name, t.dtype, t.shape) for t in outputs)


def _tensors(described: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=str(name), dtype=_DTYPES.get(dtype.name, dtype.name), shape=tuple(int(d) for d in shape))
        for name, dtype, shape in described
    )


def _read_back(trt: Any, session: _Session, plan: bytes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the engine that the plan becomes on the GPU that built it."""
    runtime = session.made(trt.Runtime, session.logger, what="makes no runtime to read the engine with")
    engine = session.demand(runtime.deserialize_cuda_engine(plan), "cannot read the engine that it built")
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    sides: dict[bool, list[tuple[str, Any, Any]]] = {True: [], False: []}
    for name in names:
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        sides[is_input].append((name, engine.get_tensor_dtype(name), engine.get_tensor_shape(name)))
    return _tensors(sides[True]), _tensors(sides[False])


def _check_validity(trt: Any, session: _Session, plan: bytes) -> None:
    """What TensorRT for RTX says of an engine without a GPU: whether its header is one."""
    runtime = session.made(trt.Runtime, session.logger, what="makes no runtime to read the engine with")
    _, diagnostics = runtime.get_engine_validity(plan)
    if diagnostics & _MALFORMED:
        raise session.failure("built an engine that its own validity check calls malformed")


def _as_the_spec(
    session: _Session, spec: ModelSpec, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What was found, in the spec's order: an engine has its own. ArtifactError unless names, types and shapes are
    the spec's."""
    ordered = []
    for what, wanted, found in (("takes", spec.inputs, inputs), ("returns", spec.outputs, outputs)):
        by_name = {tensor.name: tensor for tensor in found}
        if set(by_name) != {tensor.name for tensor in wanted}:
            raise session.failure(f"{what} {', '.join(by_name)}, the spec says {', '.join(t.name for t in wanted)}")
        for tensor in wanted:
            other = by_name[tensor.name]
            same = len(other.shape) == len(tensor.shape) and all(
                a == b or -1 in (a, b) for a, b in zip(tensor.shape, other.shape, strict=True)
            )
            if other.dtype != tensor.dtype or not same:
                raise session.failure(
                    f"{what} {other.name} as {other.dtype} {other.shape}, the spec says {tensor.dtype} {tensor.shape}"
                )
        ordered.append(tuple(by_name[tensor.name] for tensor in wanted))
    return ordered[0], ordered[1]


def _build_interruptibly(builder: Any, network: Any, config: Any) -> Any:
    """The build in a thread of its own, so that signals reach us while the native call runs."""
    answer: list[Any] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            answer.append(builder.build_serialized_network(network, config))
        except BaseException as error:  # raised again below, in the thread that waits
            failure.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="tensorrt-build", daemon=True)
    thread.start()
    while not done.wait(0.2):
        pass
    thread.join()
    if failure:
        raise failure[0]
    return answer[0]


def _timings(config: Any, settings: BuildSettings) -> bytes | None:
    if settings.flavour != "tensorrt":
        return None
    cache = config.get_timing_cache()
    serialized = cache.serialize() if cache is not None else None
    return bytes(serialized) if serialized is not None else None


def _logger(trt: Any, lines: list[str]) -> Any:
    """A logger that keeps warnings and errors for the error message, out of the user's sight until then."""

    class BuildLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                lines.append(f"[{severity.name.lower().replace('_', ' ')}] {msg}")

    return BuildLogger()


def _monitor(trt: Any, say: Say, stop: threading.Event) -> Any:
    """Progress in a line every few seconds; `stop` ends the build at its next step."""

    class BuildProgress(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._said = time.monotonic()
            self._lock = threading.Lock()  # TensorRT calls from several threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._steps[phase_name] = num_steps
            del parent_phase

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                now = time.monotonic()
                if now - self._said >= _SAY_EVERY:
                    self._said = now
                    say(f"engine: {phase_name}, step {step + 1} of {self._steps.get(phase_name, step + 1)}")
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._steps.pop(phase_name, None)

    return BuildProgress()

"""The engine builder's calls, held to the recorded Python bindings of TensorRT 10.16, 11.4 and TensorRT for RTX.

The doubles have the methods and properties of the real classes and no others (`tests/gpu_free/tensorrt_api`), and write
down every call.
"""

# ruff: noqa: ARG002 - the doubles have the parameters of the real methods, whether they need them or not
from __future__ import annotations

import dataclasses
import enum
import os
import signal
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from parkdet.export import tensorrt_build
from parkdet.export.engine import EngineJob, Gpu, engine_name, targets, timing_cache_path
from parkdet.export.tensorrt_build import BuildSettings, build_engine, load_bindings
from parkdet.runtime import ModelSpec
from parkdet.runtime.engine_sidecar import ShapeRange
from parkdet.runtime.errors import ArtifactError, Interrupted, UsageError
from parkdet.runtime.model_spec import TensorSpec
from tests.gpu_free.tensorrt_api.surface import Strict, Surface

SPEC = ModelSpec(
    class_names=("a",),
    strides=(8, 16),
    anchors=(((10.0, 13.0),), ((30.0, 61.0),)),
    imgsz=640,
    precision="fp16",
    inputs=(TensorSpec(name="images", dtype="uint8", shape=(-1, 64, 96, 3)),),
    outputs=(
        TensorSpec(name="head0", dtype="float16", shape=(-1, 1, 8, 12, 6)),
        TensorSpec(name="head1", dtype="float16", shape=(-1, 1, 4, 6, 6)),
    ),
)
PLAN = b"a plan" * 20


def settings(flavour: Any = "tensorrt", **changes: Any) -> BuildSettings:
    made = BuildSettings(
        flavour=flavour,
        architectures=(86, 89) if flavour == "tensorrt-rtx" else (),
        batch=ShapeRange(low=1, best=8, high=16),
        canvas_height=ShapeRange.fixed(64),
        canvas_width=ShapeRange.fixed(96),
    )
    return dataclasses.replace(made, **changes)


class BuilderSurface(Surface):
    """With the conversion that pybind11 makes by itself, tuples to Dims, and any severity for a logger."""

    def _takes(self, annotation: str, value: Any) -> bool:
        if annotation == "Dims":
            return isinstance(value, tuple) and all(isinstance(side, int) for side in value)
        if annotation == "bool":  # an alias of the bindings' own in the record
            return isinstance(value, bool)
        return annotation == "ILogger.Severity" or super()._takes(annotation, value)


def tensorrt(recorded: str, **answers: Any) -> Any:
    """A module like TensorRT's Python package. `answers` replace what a method returns: `parse=False`."""
    surface = BuilderSurface(recorded)
    # The real enumerations convert to numbers, which flags need.
    for name, kind in list(surface.enumerations.items()):
        surface.enumerations[name] = enum.IntEnum(
            name, {member: index for index, member in enumerate(kind.__members__)}
        )
    names = surface.enumerations

    class ITensor(Strict):
        def __init__(self, tensor: TensorSpec):
            kinds = {"uint8": "UINT8", "float16": "HALF", "float32": "FLOAT"}
            self.name, self.shape = tensor.name, tensor.shape
            self.dtype = names["DataType"][kinds[tensor.dtype]]

    class INetworkDefinition(Strict):
        num_inputs, num_outputs = 1, 2

        def get_input(self, index: int) -> ITensor:
            return ITensor(SPEC.inputs[index])

        def get_output(self, index: int) -> ITensor:
            return ITensor(SPEC.outputs[index] if index else answers.get("output", SPEC.outputs[0]))

    class IOptimizationProfile(Strict):
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            pass

    class ITimingCache(Strict):
        def serialize(self) -> Any:
            return b"timings"

    class IBuilderConfig(Strict):
        progress_monitor: Any = None
        hardware_compatibility_level: Any = None
        builder_optimization_level: int = 3
        if recorded == "rtx":
            num_compute_capabilities: int = 0

            def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
                return bool(answers.get("set_compute_capability", True))

            def set_flag(self, flag: Any) -> None:
                pass

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._limit = pool_size

        def get_memory_pool_limit(self, pool: Any) -> int:
            return int(answers.get("get_memory_pool_limit", self._limit))

        def add_optimization_profile(self, profile: Any) -> int:
            return int(answers.get("add_optimization_profile", 0))

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return answers.get("create_timing_cache", ITimingCache())

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            return bool(answers.get("set_timing_cache", True))

        def get_timing_cache(self) -> Any:
            return ITimingCache()

    class IPluginRegistry(Strict):
        def load_library(self, plugin_path: str) -> Any:
            return answers.get("load_library", object())

        def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
            return answers.get("get_creator", object())

    class ILogger(Strict):
        def log(self, severity: Any, msg: str) -> None: ...

    class IProgressMonitor(Strict):
        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None: ...

    class Builder(Strict):
        def __init__(self, logger: Any):
            if answers.get("builder") is None and "builder" in answers:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            assert flags == 1 << int(names["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"])
            return answers.get("create_network", INetworkDefinition())

        def create_builder_config(self) -> Any:
            return answers.get("create_builder_config", IBuilderConfig())

        def create_optimization_profile(self) -> Any:
            return answers.get("create_optimization_profile", IOptimizationProfile())

        def get_plugin_registry(self) -> Any:
            return answers.get("get_plugin_registry", IPluginRegistry())

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            monitor = config.progress_monitor
            monitor.phase_start("kernels", "", 2)
            if answers.get("interrupt") == "build":
                os.kill(os.getpid(), signal.SIGINT)
            going = monitor.step_complete("kernels", 0)
            until = time.monotonic() + 10
            while going and answers.get("interrupt"):
                assert time.monotonic() < until, "nobody stops the build"
                going = monitor.step_complete("kernels", 1)
            monitor.phase_finish("kernels")
            self._logger.log(SimpleNamespace(name="ERROR"), "what TensorRT says")
            return answers.get("build", PLAN) if going else None

    class ParserError(Strict):
        def desc(self) -> str:
            return "no such operator"

        def node_name(self) -> str:
            return "nms"

        def node_operator(self) -> str:
            return "NonMaxSuppression"

    class OnnxParser(Strict):
        num_errors = 1

        def __init__(self, network: Any, logger: Any):
            pass

        def parse(self, model: bytes, path: str | None = None) -> bool:
            if answers.get("interrupt") == "parse":
                with suppress(KeyboardInterrupt):  # as the bindings do with an exception of a callback
                    signal.raise_signal(signal.SIGINT)
            return bool(answers.get("parse", True))

        def get_error(self, index: int) -> Any:
            return ParserError()

    class ICudaEngine(Strict):
        num_io_tensors = 3

        def get_tensor_name(self, index: int) -> str:
            return (*reversed(SPEC.outputs), *SPEC.inputs)[index].name  # an engine has an order of its own

        def get_tensor_mode(self, name: str) -> Any:
            return names["TensorIOMode"]["INPUT" if name == "images" else "OUTPUT"]

        def get_tensor_dtype(self, name: str) -> Any:
            return ITensor(self._of(name)).dtype

        def get_tensor_shape(self, name: str) -> Any:
            return self._of(name).shape if name != "images" else answers.get("engine_shape", SPEC.inputs[0].shape)

        def _of(self, name: str) -> TensorSpec:
            return next(t for t in (*SPEC.inputs, *SPEC.outputs) if t.name == name)

    class Runtime(Strict):
        def __init__(self, logger: Any):
            pass

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            return answers.get("deserialize", ICudaEngine())

        if recorded == "rtx":

            def get_engine_validity(self, buffer: bytes) -> Any:
                return names["EngineValidity"]["INVALID"], answers.get("diagnostics", 0)

    doubles = [
        ITensor, INetworkDefinition, IOptimizationProfile, ITimingCache, IBuilderConfig, IPluginRegistry, ILogger,
        IProgressMonitor, Builder, ParserError, OnnxParser, ICudaEngine, Runtime,
    ]  # fmt: skip
    for double in doubles:
        double.surface = surface  # type: ignore[attr-defined]
        for name, value in vars(double).items():
            if not name.startswith("_") and name != "surface" and not callable(value):
                surface.check_property(double.__name__, name)
    module = SimpleNamespace(__version__="10.16.1.11", **{double.__name__: double for double in doubles}, **names)
    module.surface = surface
    return module


FLAVOURS = [("10", "tensorrt"), ("11", "tensorrt"), ("rtx", "tensorrt-rtx")]


def build(
    trt: Any, made: BuildSettings, spec: ModelSpec = SPEC, say: Any = lambda _: None, timings: bytes = b""
) -> Any:
    return build_engine(trt, b"graph", "best.onnx", spec, made, say, timings)


@pytest.mark.parametrize(("recorded", "flavour"), FLAVOURS)
def test_the_calls_are_those_of_the_bindings(recorded: str, flavour: Any) -> None:
    trt = tensorrt(recorded)
    built = build(trt, settings(flavour, workspace_bytes=4 * 10**9, level=5), timings=b"of before")
    assert built.plan == PLAN
    assert (built.inputs, built.outputs) == (SPEC.inputs, SPEC.outputs)
    log = "\n".join(trt.surface.log)
    assert "IOptimizationProfile.set_shape('images', (1, 64, 96, 3), (8, 64, 96, 3), (16, 64, 96, 3))" in log
    assert "IBuilderConfig.set_memory_pool_limit(MemoryPoolType.WORKSPACE" in log
    if flavour == "tensorrt-rtx":
        assert "set_compute_capability(ComputeCapability.SM86, 0)" in log
        assert "set_compute_capability(ComputeCapability.SM89, 1)" in log
        assert "IBuilderConfig.set_flag(BuilderFlag.REQUIRE_USER_ALLOCATION)" in log
        assert "Runtime.get_engine_validity(<120 bytes>)" in log
        assert "timing" not in log
        assert built.timings is None
    else:
        assert "IBuilderConfig.create_timing_cache(<9 bytes>)" in log
        assert "Runtime.deserialize_cuda_engine(<120 bytes>)" in log
        assert built.timings == b"timings"


def test_a_static_graph_has_no_profile() -> None:
    trt = tensorrt("11")
    static = dataclasses.replace(SPEC, inputs=(dataclasses.replace(SPEC.inputs[0], shape=(2, 64, 96, 3)),))
    with pytest.raises(ArtifactError):  # the double's network is dynamic: what it takes is not what the spec says
        build(tensorrt("11", engine_shape=(3, 64, 96, 3)), settings(), static)
    build(trt, settings(), static)
    assert not any("Profile" in call for call in trt.surface.log)


@pytest.mark.parametrize(("recorded", "flavour"), FLAVOURS)
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"builder": None}, "makes no builder here"),
        ({"create_network": None}, "makes no network"),
        ({"parse": False}, r"cannot read the graph: NonMaxSuppression 'nms': no such operator"),
        ({"create_builder_config": None}, "makes no configuration"),
        ({"create_optimization_profile": None}, "makes no optimisation profile"),
        ({"add_optimization_profile": -1}, r"takes no optimisation profile of .*answer -1"),
        ({"get_memory_pool_limit": 5}, "grants a workspace of 5 bytes, not 4,000,000,000"),
        ({"build": None}, r"built no engine\n  \[error\] what TensorRT says"),
        (
            {"output": TensorSpec(name="head0", dtype="float32", shape=(-1, 1, 8, 12, 6))},
            r"returns head0 as float32 .*the spec says float16",
        ),
        (
            {"output": TensorSpec(name="other", dtype="float16", shape=(-1,))},
            "returns other, head1, the spec says head0, head1",
        ),
        (
            {"output": TensorSpec(name="head0", dtype="float16", shape=(-1, 1, 8, 13, 6))},
            r"returns head0 as float16 \(-1, 1, 8, 13, 6\)",
        ),
    ],
)
def test_each_no_of_tensorrt_is_an_error_with_its_log(
    recorded: str, flavour: Any, answers: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message) as failure:
        build(tensorrt(recorded, **answers), settings(flavour, workspace_bytes=4 * 10**9))
    assert str(failure.value).startswith(f"best.onnx: {flavour} 10.16.1.11 ")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"create_timing_cache": None}, "makes no timing cache"),
        ({"set_timing_cache": False}, "takes no timing cache"),
        ({"deserialize": None}, "cannot read the engine that it built"),
        ({"engine_shape": (-1, 64, 96, 4)}, r"takes images as uint8 \(-1, 64, 96, 4\)"),
    ],
)
def test_what_only_tensorrt_answers(answers: dict[str, Any], message: str) -> None:
    for recorded in ("10", "11"):
        with pytest.raises(ArtifactError, match=message):
            build(tensorrt(recorded, **answers), settings())


def test_what_only_tensorrt_for_rtx_answers() -> None:
    with pytest.raises(ArtifactError, match="takes no target 86"):
        build(tensorrt("rtx", set_compute_capability=False), settings("tensorrt-rtx"))
    with pytest.raises(ArtifactError, match="malformed"):
        build(tensorrt("rtx", diagnostics=32), settings("tensorrt-rtx"))


@pytest.mark.parametrize(("recorded", "flavour"), FLAVOURS)
def test_progress_is_told_and_a_stop_ends_the_build(
    recorded: str, flavour: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_build, "_SAY_EVERY", 0.0)
    said: list[str] = []
    build(tensorrt(recorded), settings(flavour), say=said.append)
    assert said == ["engine: kernels, step 1 of 2"]
    for moment in ("parse", "build"):
        with pytest.raises(Interrupted, match="nothing was written"):
            build(tensorrt(recorded, interrupt=moment), settings(flavour))


@pytest.mark.parametrize("level", ["ampere-plus", "same-compute-capability"])
@pytest.mark.parametrize("recorded", ["10", "11"])
def test_hardware_compatibility(recorded: str, level: Any) -> None:
    build(tensorrt(recorded), settings(hardware=level))


def test_a_graph_with_the_plugin(tmp_path: Any) -> None:
    library = tmp_path / "libparkdet.so"
    library.write_bytes(b"elf")
    spec = dataclasses.replace(SPEC, head="plugin")
    for recorded in ("10", "11"):
        trt = tensorrt(recorded)
        build(trt, settings(plugin=library), spec)
        log = "\n".join(trt.surface.log)
        assert f"IPluginRegistry.load_library('{library}')" in log
        assert "IPluginRegistry.get_creator('ParkdetNMS', '1', 'parkdet')" in log
        for answers, message in (
            ({"load_library": None}, "does not load"),
            ({"get_creator": None}, "finds no ParkdetNMS version 1"),
        ):
            with pytest.raises(ArtifactError, match=message):
                build(tensorrt(recorded, **answers), settings(plugin=library), spec)
        with pytest.raises(UsageError, match="name the parkdet plugin with --plugin"):
            build(tensorrt(recorded), settings(), spec)
    with pytest.raises(UsageError, match="has no plugins"):
        build(tensorrt("rtx"), settings("tensorrt-rtx", plugin=library), spec)


def test_timings_are_kept_by_gpu_version_and_graph(tmp_path: Any) -> None:
    gpu = Gpu("NVIDIA T4", 75)
    path = timing_cache_path(tmp_path, gpu, "10.16.1.11", "a" * 64)
    others = [
        timing_cache_path(tmp_path, Gpu("NVIDIA TITAN RTX", 75), "10.16.1.11", "a" * 64),
        timing_cache_path(tmp_path, gpu, "11.4.0.106", "a" * 64),
        timing_cache_path(tmp_path, gpu, "10.16.1.11", "b" * 64),
    ]
    assert len({path, *others}) == 4
    job = EngineJob(b"graph", "best.onnx", SPEC, settings(), gpu, tmp_path / "timings")
    first, second = tensorrt("10"), tensorrt("10")
    _, sidecar = job.build(first, lambda _: None)
    assert "IBuilderConfig.create_timing_cache(<0 bytes>)" in first.surface.log
    job.build(second, lambda _: None)
    assert "IBuilderConfig.create_timing_cache(<7 bytes>)" in second.surface.log
    assert (sidecar.architectures, sidecar.gpu, sidecar.engine_bytes) == ((75,), "NVIDIA T4", len(PLAN))


def test_targets_are_grouped_as_the_api_allows() -> None:
    rtx = tensorrt("rtx")
    assert targets("tensorrt-rtx", [120, 86, 75, 89, 86], rtx) == [(75,), (86, 89, 120)]
    assert targets("tensorrt-rtx", [75], rtx) == [(75,)]
    for architecture in (90, 100):
        with pytest.raises(UsageError, match=rf"--arch {architecture}: .*build on such a GPU with --engine tensorrt$"):
            targets("tensorrt-rtx", [86, architecture], rtx)
    with pytest.raises(UsageError, match=r"not for 61$"):
        targets("tensorrt-rtx", [61], rtx)
    with pytest.raises(UsageError, match="--arch 75,80,86,89,120,121"):
        targets("tensorrt-rtx", [], rtx)
    with pytest.raises(UsageError, match="one architecture"):
        targets("tensorrt", [75, 86], tensorrt("10"))
    assert engine_name("best", (86,)) == "best.sm86.engine"
    assert engine_name("best", (86, 89, 120)) == "best.sm86-120.engine"


def test_a_tensorrt_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UsageError, match="pip install tensorrt-cu13"):
        load_bindings("tensorrt")

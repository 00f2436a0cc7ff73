"""Engines built, loaded and run through the real bindings: what they are given arrives, what they refuse is told."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from typing import Any

import pytest

from parkdet.export import tensorrt_build
from parkdet.export.config import GraphOptions
from parkdet.export.graph import build_graph, serialized
from parkdet.export.tensorrt_build import BuildSettings, build_engine
from parkdet.runtime.engine_sidecar import ShapeRange
from parkdet.runtime.errors import ArtifactError, Interrupted
from parkdet.runtime.model_spec import ModelSpec
from parkdet.train.model.network import Yolov5
from tests.export.conftest import small_network
from tests.gpu_free.driver.live.conftest import SimulatedTensorRt


def settings(**changes: Any) -> BuildSettings:
    made = BuildSettings(
        flavour="tensorrt",
        batch=ShapeRange(low=1, best=4, high=8),
        canvas_height=ShapeRange.fixed(64),
        canvas_width=ShapeRange.fixed(96),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def network() -> Yolov5:
    return small_network()


@pytest.fixture(scope="module")
def graph(network: Yolov5) -> tuple[bytes, ModelSpec]:
    """A half-precision graph for canvases of 64 x 96, any batch."""
    made = build_graph(network, GraphOptions(precision="fp16", canvas_hw=(64, 96)))
    return serialized(made.model), made.spec


def build(trt: Any, graph: tuple[bytes, ModelSpec], made: BuildSettings, **more: Any) -> Any:
    return build_engine(trt, graph[0], "best.onnx", graph[1], made, more.pop("say", lambda _: None), **more)


def test_everything_that_is_set_arrives(
    trt: Any, native: SimulatedTensorRt, graph: tuple[bytes, ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_build, "_SAY_EVERY", 0.0)
    said: list[str] = []
    made = settings(workspace_bytes=3 * 10**9, level=5, hardware="ampere-plus")
    built = build(trt, graph, made, say=said.append, timings=b"before;")
    names = {kind: {n: int(m) for n, m in getattr(trt, kind).__members__.items()} for kind in (
        "NetworkDefinitionCreationFlag", "MemoryPoolType", "HardwareCompatibilityLevel")}  # fmt: skip
    assert native.calls() == [
        "createInferBuilder",
        f"createNetworkV2 {1 << names['NetworkDefinitionCreationFlag']['STRONGLY_TYPED']}",
        "createNvOnnxParser",
        f"parse {len(graph[0])}",
        "createBuilderConfig",
        f"setHardwareCompatibilityLevel {names['HardwareCompatibilityLevel']['AMPERE_PLUS']}",
        f"setMemoryPoolLimit {names['MemoryPoolType']['WORKSPACE']} 3000000000",
        "setBuilderOptimizationLevel 5",
        "createOptimizationProfile",
        "setDimensions images 0 1x64x96x3",
        "setDimensions images 1 4x64x96x3",
        "setDimensions images 2 8x64x96x3",
        "addOptimizationProfile",
        "createTimingCache 7",
        "setTimingCache 0",
        "buildSerializedNetwork",
        "createInferRuntime",
        f"deserializeCudaEngine {len(built.plan)}",
        "getTimingCache",
        "serialize",
    ]
    assert built.timings == b"before;timed;"
    assert said[0] == "engine: Tactic Selection, step 1 of 2"
    assert said[-1] == "engine: Building Engine, step 3 of 3"
    spec = graph[1]
    assert [(t.name, t.dtype, t.shape[1:]) for t in built.inputs] == [("images", "uint8", (64, 96, 3))]
    assert {t.name: t.dtype for t in built.outputs} == {t.name: "float16" for t in spec.outputs}


@pytest.mark.usefixtures("native")
def test_a_stop_reaches_the_build(trt: Any, graph: tuple[bytes, ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "_SAY_EVERY", 0.0)
    main = threading.main_thread().ident
    assert main is not None

    def say(_: str) -> None:
        assert threading.get_ident() != main
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.6)  # the thread that waits looks five times a second

    with pytest.raises(Interrupted, match="nothing was written"):
        build(trt, graph, settings(), say=say)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("createInferBuilder", "makes no builder here"),
        ("createNetworkV2", "makes no network"),
        ("parse", r"cannot read the graph: Frobnicate 'node 7': it is no graph"),
        ("createBuilderConfig", "makes no configuration"),
        ("setMemoryPoolLimit", r"grants a workspace of 0 bytes, not 3,000,000,000"),
        ("createOptimizationProfile", "makes no optimisation profile"),
        ("setDimensions", "takes no optimisation profile"),
        ("addOptimizationProfile", "takes no optimisation profile"),
        ("createTimingCache", "makes no timing cache"),
        ("setTimingCache", "takes no timing cache"),
        ("buildSerializedNetwork", "built no engine"),
        ("createNvOnnxParser", "makes no parser"),
        ("createInferRuntime", "makes no runtime to read the engine with"),
        ("deserializeCudaEngine", "cannot read the engine that it built"),
    ],
)
def test_each_native_no_is_an_error_with_its_log(
    trt: Any, native: SimulatedTensorRt, graph: tuple[bytes, ModelSpec], method: str, message: str
) -> None:
    native.refuse(method)
    with pytest.raises(ArtifactError, match=message) as failure:
        build(trt, graph, settings(workspace_bytes=3 * 10**9))
    assert str(failure.value).startswith(f"best.onnx: tensorrt {trt.__version__} ")
    assert f"[error] {method} was made to fail" in str(failure.value)


@pytest.mark.parametrize("method", ["getTimingCache", "serialize"])
def test_without_timings_there_is_an_engine_all_the_same(
    trt: Any, native: SimulatedTensorRt, graph: tuple[bytes, ModelSpec], method: str
) -> None:
    native.refuse(method)
    built = build(trt, graph, settings())
    assert (built.timings, len(built.plan) > len(graph[0])) == (None, True)

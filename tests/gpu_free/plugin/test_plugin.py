"""The NMS plugin: its core on the CPU, and the library through a host's life cycle where TensorRT's headers are."""

from __future__ import annotations

import ctypes
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from parkdet.export.plugin_node import with_plugin
from parkdet.runtime.heads import RawHead, decode_candidates
from parkdet.runtime.model_spec import ModelSpec, TensorSpec
from parkdet.runtime.nms import NmsSettings, suppress
from parkdet.runtime.views import head_sources
from tests.gpu_free.kernels.simulation import compiler
from tests.gpu_free.plugin.plugin_build import (
    FLOAT32,
    INT32,
    PLUGIN,
    Attributes,
    cuda_headers,
    dims_of,
    host_library,
    outputs_of,
    plugin_library,
    registry_library,
    shared_core,
    tensorrt_headers,
)

SPEC = ModelSpec(
    class_names=("car", "person", "cart"), strides=(8, 16),
    anchors=(((10, 13), (30, 20)), ((60, 50), (100, 90))), imgsz=96,
)  # fmt: skip
ATTRIBUTES = Attributes(
    strides=SPEC.strides, anchors=np.array(SPEC.anchors).ravel().tolist(), num_classes=3, conf=0.2, iou=0.1, max_det=200
)


def raw_heads(batch: int, seed: int = 0, half: bool = True) -> list[RawHead]:
    """Heads of a canvas of 80 x 112, some objects in them."""
    rng = np.random.default_rng(seed)
    dtype = np.float16 if half else np.float32
    return [rng.normal(-1, 1.5, (batch, 2, 80 // s, 112 // s, 8)).astype(dtype) for s in SPEC.strides]


def expected(heads: Sequence[RawHead], attributes: Attributes = ATTRIBUTES, spec: ModelSpec = SPEC) -> list[Any]:
    """What the specification gives."""
    settings = NmsSettings(
        conf=attributes.conf, iou=attributes.iou, max_det=attributes.max_det, multi_label=bool(attributes.multi_label),
        agnostic=bool(attributes.agnostic),
    )  # fmt: skip
    return [suppress(one, settings)[0] for one in decode_candidates(heads, spec, settings.conf)]


def check(outputs: Sequence[np.ndarray[Any, Any]], right: Sequence[Any]) -> None:
    """The outputs hold these detections, and nothing beyond them."""
    num_dets, boxes, scores, classes = outputs
    for image, detections in enumerate(right):
        kept = int(num_dets[image, 0])
        assert kept == len(detections)
        assert np.array_equal(classes[image, :kept], detections.class_ids)
        assert np.allclose(boxes[image, :kept], detections.xyxy, atol=1e-3, rtol=1e-5)
        assert np.allclose(scores[image, :kept], detections.scores, atol=1e-6)
        assert (
            (boxes[image, kept:] == 0).all()
            and (scores[image, kept:] == 0).all()
            and (classes[image, kept:] == -1).all()
        )


class Core:
    """NmsCore through its C interface."""

    def __init__(self, library: ctypes.CDLL, attributes: Attributes) -> None:
        self.library = library
        self.handle = library.core_make()
        self.arrays = attributes.arrays()

    def set_all(self) -> bool:
        return all(self.set(name, values) for name, values in self.arrays.items())

    def set(self, name: str, values: np.ndarray[Any, Any]) -> bool:
        kind = {"i": 1, "f": 0}[values.dtype.kind] if values.dtype.itemsize == 4 else 2
        return bool(self.library.core_set(self.handle, name.encode(), kind, values.ctypes.data, values.size))

    def complete(self) -> bool:
        return bool(self.library.core_complete(self.handle))

    def accepts(self, dims: np.ndarray[Any, Any]) -> bool:
        return bool(self.library.core_accepts(self.handle, dims.ctypes.data, len(dims)))

    @property
    def error(self) -> str:
        text: bytes = self.library.core_error(self.handle)
        return text.decode()

    def close(self) -> None:
        self.library.core_drop(self.handle)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("no g++ (or what CXX names) to compile the plugin's core with")
    loaded = ctypes.CDLL(str(shared_core()))
    size, address = ctypes.c_size_t, ctypes.c_void_p
    for name, result, arguments in (
        ("core_make", address, []), ("core_copy", address, [address]), ("core_drop", None, [address]),
        ("core_error", ctypes.c_char_p, [address]), ("core_complete", ctypes.c_bool, [address]),
        ("core_set", ctypes.c_bool, [address, ctypes.c_char_p, ctypes.c_int, address, size]),
        ("core_accepts", ctypes.c_bool, [address, address, size]), ("core_workspace", size, [address, ctypes.c_int64]),
        ("core_values", address, [address, ctypes.c_char_p, ctypes.POINTER(size)]),
        ("core_field", ctypes.c_char_p, [size, address, address]),
        ("core_output_shape", ctypes.c_int, [address, ctypes.c_int, ctypes.c_int64, address]),
        ("core_run", ctypes.c_char_p, [address, address, size, address, ctypes.c_int, address, address]),
    ):  # fmt: skip
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


@pytest.fixture
def core(library: ctypes.CDLL) -> Iterator[Core]:
    made = Core(library, ATTRIBUTES)
    yield made
    made.close()


def test_the_adapter_is_thin() -> None:
    assert len((PLUGIN / "nms_plugin.cpp").read_text().splitlines()) <= 150


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("changed", [{}, {"multi_label": 0, "conf": 0.4}, {"agnostic": 1, "iou": 0.05}, {"max_det": 9}])
def test_the_core_gives_what_the_specification_gives(library: ctypes.CDLL, half: bool, changed: dict[str, Any]) -> None:
    attributes = replace(ATTRIBUTES, **changed)
    heads = raw_heads(2, half=half)
    right = expected(heads, attributes)
    assert sum(map(len, right)) > 15
    check(_run(library, attributes, heads, half), right)


def _run(library: ctypes.CDLL, attributes: Attributes, heads: Sequence[RawHead], half: bool) -> list[Any]:
    """The outputs of a run of a copy of the core, as a clone of the plugin would give them."""
    core, dims, batch = Core(library, attributes), dims_of(heads), len(heads[0])
    assert core.set_all() and core.complete() and core.accepts(dims), core.error
    workspace = np.full(library.core_workspace(core.handle, batch) + 512, 0xCD, np.uint8)
    outputs = outputs_of(batch, attributes.max_det)
    pointers = [(ctypes.c_void_p * len(some))(*(one.ctypes.data for one in some)) for some in (heads, outputs)]
    start = workspace.ctypes.data + -workspace.ctypes.data % 256
    copy = library.core_copy(core.handle)
    core.close()
    trouble = library.core_run(copy, dims.ctypes.data, len(heads), pointers[0], half, pointers[1], start)
    library.core_drop(copy)
    assert trouble is None
    return outputs


def test_a_launch_that_fails_is_told(core: Core, library: ctypes.CDLL) -> None:
    """No image, so no block: the grid is one that no GPU takes either."""
    assert core.set_all()
    heads = raw_heads(0)
    raw, into = (ctypes.c_void_p * 2)(), (ctypes.c_void_p * 4)()
    trouble = library.core_run(core.handle, dims_of(heads).ctypes.data, len(heads), raw, True, into, None)
    assert trouble == b"a grid must not be empty, nor over 65535 in y or z"


@pytest.mark.parametrize("half", [True, False])
def test_heads_of_several_views_are_turned_back(library: ctypes.CDLL, half: bool) -> None:
    spec, rng = replace(SPEC, tta=True), np.random.default_rng(5)
    sources = head_sources(len(SPEC.strides), tta=True)
    heads: list[RawHead] = []
    for source in sources:
        stride = SPEC.strides[source.level]
        rows, columns = (source.view.padded(side, spec.stride_max) // stride for side in (80, 112))
        heads.append(rng.normal(-1, 1.5, (1, 2, rows, columns, 8)).astype(np.float16 if half else np.float32))
    attributes = replace(
        ATTRIBUTES,
        strides=[SPEC.strides[source.level] for source in sources],
        anchors=np.array([SPEC.anchors[source.level] for source in sources]).ravel().tolist(),
        view_scales=[source.view.scale for source in sources],
        view_flips=[int(source.view.mirrored) for source in sources],
    )
    check(_run(library, attributes, heads, half), expected(heads, attributes, spec))


@pytest.mark.parametrize("tta", [True, False])
def test_the_node_that_export_writes_is_one_that_the_core_takes(library: ctypes.CDLL, tta: bool) -> None:
    """Its attributes as TensorRT's parser hands them over: int32 and float32, lists as they are."""
    sources = head_sources(len(SPEC.strides), tta)
    shapes = []
    for source in sources:
        stride = SPEC.strides[source.level]
        rows, columns = (source.view.padded(side, SPEC.stride_max) // stride for side in (80, 112))
        shapes.append((1, 2, rows, columns, 8))
    outputs = tuple(TensorSpec(name=s.name, dtype="float32", shape=d) for s, d in zip(sources, shapes, strict=True))
    spec = replace(SPEC, tta=tta, outputs=outputs, conf=0.2, iou=0.1, max_det=200)
    heads = [helper.make_tensor_value_info(one.name, TensorProto.FLOAT, one.shape) for one in outputs]
    model, _ = with_plugin(helper.make_model(helper.make_graph([], "raw", [], heads)), spec)
    (node,) = model.graph.node
    own = {"plugin_version": b"1", "plugin_namespace": b"parkdet"}
    core = Core(library, ATTRIBUTES)
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.name in own:
            assert value == own[attribute.name]
            continue
        whole = attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS)
        assert core.set(attribute.name, np.atleast_1d(np.array(value, np.int32 if whole else np.float32))), core.error
    assert core.complete(), core.error
    assert core.accepts(np.array(shapes, np.int64)), core.error
    assert (node.op_type, node.domain, list(node.input)) == ("ParkdetNMS", "parkdet", [one.name for one in outputs])
    core.close()


def test_fields_come_back_as_they_were_set(core: Core, library: ctypes.CDLL) -> None:
    assert core.set_all()
    whole, is_list, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    names: list[str] = []
    while name := library.core_field(len(names), ctypes.byref(whole), ctypes.byref(is_list)):
        names.append(name.decode())
        address = library.core_values(core.handle, name, ctypes.byref(count))
        dtype: Any = np.int32 if whole.value else np.float32
        values = np.frombuffer(ctypes.string_at(address, 4 * count.value), dtype)
        assert np.array_equal(values, core.arrays[names[-1]])
    assert sorted(names) == sorted(core.arrays)
    assert library.core_values(core.handle, b"score_threshold", ctypes.byref(count)) is None
    assert count.value == 0


def test_shapes_of_the_outputs(core: Core, library: ctypes.CDLL) -> None:
    assert core.set_all()
    dims = (ctypes.c_int64 * 3)()
    shapes = []
    for output in range(5):
        count = library.core_output_shape(core.handle, output, 7, dims)
        shapes.append(tuple(dims[:count]))
    assert shapes == [(7, 1), (7, 200, 4), (7, 200), (7, 200), ()]


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("score_threshold", np.zeros(1, np.float32), "field 'score_threshold' is not one of version 1"),
        ("conf", np.zeros(1, np.int32), "field 'conf' has another type"),
        ("conf", np.zeros(1, np.float64), "field 'conf' has another type"),
        ("max_det", np.zeros(2, np.int32), "field 'max_det' has 2 values"),
    ],
)
def test_fields_that_are_not_of_the_version_are_refused(core: Core, name: str, values: Any, told: str) -> None:
    assert not core.set(name, values)
    assert told in core.error


def test_a_field_without_its_data_is_refused(core: Core, library: ctypes.CDLL) -> None:
    for name, kind, count in (("num_classes", 1, 1), ("anchors", 0, 8)):
        assert not library.core_set(core.handle, name.encode(), kind, None, count)
        assert f"field '{name}' has no data" in core.error


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"strides": ()}, "strides names 0 heads"), ({"strides": (8,) * 17}, "strides names 17 heads"),
        ({"view_scales": (1.0,)}, "a value for each of 2 heads"),
        ({"view_flips": (1, 0, 0)}, "a value for each of 2 heads"),
        ({"anchors": (1.0,) * 7}, "anchors has 7 values"), ({"anchors": (1.0,) * 36}, "anchors has 36 values"),
        ({"num_classes": 0}, "must be at least 1"), ({"max_det": 0}, "must be at least 1"),
        ({"conf": 1.5}, "from 0 to 1"), ({"iou": float("nan")}, "from 0 to 1"),
        ({"strides": (8, 0)}, "must be positive"),
        ({"view_scales": (1.0, 0.0)}, "must be positive"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_refused(library: ctypes.CDLL, changed: dict[str, Any], told: str) -> None:
    core = Core(library, replace(ATTRIBUTES, **changed))
    assert core.set_all()
    assert not core.complete()
    assert told in core.error
    core.close()


def test_heads_that_do_not_fit_the_fields_are_refused(core: Core) -> None:
    assert core.set_all()
    right = dims_of(raw_heads(2))
    wrongs = [
        right[:1],
        np.array([right[0], right[1] + [1, 0, 0, 0, 0]]),
        right * [1, 1, 1, 1, 0] + [0, 0, 0, 0, 9],
        right * [1, 0, 1, 1, 1] + [0, 3, 0, 0, 0],
        right * [1, 1, 0, 1, 1],
        right * [1, 1, 4000, 4000, 1],
    ]
    for wrong in wrongs:
        assert not core.accepts(np.ascontiguousarray(wrong, np.int64))
        assert core.error.startswith("ParkdetNMS: ")
    assert core.accepts(right)


# With TensorRT's headers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosted() -> Any:
    """The plugin's library and a host that was compiled against TensorRT's headers."""
    tensorrt, cuda = tensorrt_headers(), cuda_headers()
    if compiler() is None:
        pytest.skip("no g++ (or what CXX names) to compile the plugin with")
    if tensorrt is None:
        pytest.skip("TENSORRT_INCLUDE_DIR names no folder with NvInferRuntime.h: the plugin's life cycle is not run")
    if cuda is None:
        pytest.skip("CUDA's headers are not installed (CUDA_HOME): the plugin's life cycle is not run")
    host = ctypes.CDLL(str(host_library(tensorrt, cuda)))
    host.host_run.restype = host.host_said.restype = ctypes.c_char_p
    host.host_run.argtypes = [
        ctypes.c_char_p, *[ctypes.c_void_p] * 4, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
        ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 3,
    ]  # fmt: skip
    return host, plugin_library(tensorrt, cuda)


def _host(
    hosted: Any, attributes: Attributes, heads: Sequence[RawHead], most: int, half: bool
) -> tuple[str | None, list[Any]]:
    """What the host has to say of a life cycle, and the outputs."""
    host, library = hosted
    arrays = {name: np.ascontiguousarray(values) for name, values in attributes.arrays().items()}
    outputs = outputs_of(len(heads[0]), attributes.max_det)
    count, names = len(arrays), [name.encode() for name in arrays]
    types = [INT32 if values.dtype.kind == "i" else FLOAT32 for values in arrays.values()]
    dims, workspace = dims_of(heads), ctypes.c_size_t()
    said = host.host_run(
        str(library).encode(), (ctypes.c_char_p * count)(*names), (ctypes.c_int * count)(*types),
        (ctypes.c_void_p * count)(*(v.ctypes.data for v in arrays.values())),
        (ctypes.c_int * count)(*(v.size for v in arrays.values())), count, dims.ctypes.data, len(heads), half, most,
        len(heads[0]), (ctypes.c_void_p * len(heads))(*(head.ctypes.data for head in heads)),
        (ctypes.c_void_p * 4)(*(out.ctypes.data for out in outputs)), ctypes.byref(workspace),
    )  # fmt: skip
    return (said.decode() if said else None), outputs


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("batch", "most"), [(1, 1), (2, 5)])
def test_the_plugin_through_its_life_cycle(hosted: Any, half: bool, batch: int, most: int) -> None:
    heads = raw_heads(batch, seed=3, half=half)
    said, outputs = _host(hosted, ATTRIBUTES, heads, most, half)
    assert said is None, said
    check(outputs, expected(heads))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_classes": 0}, "createPlugin refused: ParkdetNMS: num_classes, max_det and max_candidates must be"),
        ({"num_classes": 4}, "configurePlugin refused: ParkdetNMS: input 0 is no head of (batch, 2, rows, columns, 9)"),
        ({"others": {"nms_type": np.zeros(1, np.int32)}}, "field nms_type of type 5 is not declared"),
    ],
)
def test_what_the_plugin_refuses_it_tells_tensorrts_logger(hosted: Any, changed: dict[str, Any], told: str) -> None:
    said, _ = _host(hosted, replace(ATTRIBUTES, **changed), raw_heads(1), 1, True)
    assert said is not None
    assert told in said


def test_memory_that_runs_out_reaches_tensorrt_as_a_refusal(hosted: Any) -> None:
    anchors = np.zeros(2**26, np.float32)  # never touched, so it is address space alone
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + anchors.nbytes // 2, before[1]))
    try:
        said, _ = _host(hosted, replace(ATTRIBUTES, others={"anchors": anchors}), raw_heads(1), 1, True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert said is not None
    assert "createPlugin refused: ParkdetNMS: std::bad_alloc" in said


@pytest.mark.parametrize("asked", [True, False])
def test_a_host_that_only_opens_the_library_finds_the_plugin_if_it_asks(hosted: Any, asked: bool) -> None:
    _, plugin = hosted
    tensorrt, cuda = tensorrt_headers(), cuda_headers()
    assert tensorrt is not None
    assert cuda is not None
    registry = registry_library(tensorrt, cuda)
    program = f"""
import ctypes
ctypes.CDLL({str(plugin)!r})
print(ctypes.CDLL({str(registry)!r}).creators_registered())
"""
    environment = {"LD_LIBRARY_PATH": str(registry.parent)} | ({"PARKDET_NMS_REGISTER_ON_LOAD": "1"} if asked else {})
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ("1" if asked else "0"), run.stderr


def test_a_host_without_tensorrt_hears_on_stderr_that_nothing_was_registered(hosted: Any, tmp_path: Path) -> None:
    _, plugin = hosted
    tensorrt, cuda = tensorrt_headers(), cuda_headers()
    assert tensorrt is not None
    assert cuda is not None
    (tmp_path / registry_library(tensorrt, cuda).name).touch()  # no library, and one that this machine has stays hidden
    program = f"import ctypes; ctypes.CDLL({str(plugin)!r})"
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "PARKDET_NMS_REGISTER_ON_LOAD": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"ParkdetNMS is not registered: libnvinfer\.so\.\d+ is not found\n", run.stderr)

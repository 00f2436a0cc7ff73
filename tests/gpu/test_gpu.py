"""On a GPU: the kernels and the TensorRT backend give what the CPU gives, replay, last, and how fast they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.runtime.backends.base import BackendOptions
from parkdet.runtime.backends.tensorrt import TensorRtBackend
from parkdet.runtime.cuda.device_kernels import DeviceKernels
from parkdet.runtime.cuda.driver import Device, DeviceBuffer, Event, PinnedBuffer, Stream, download, upload
from parkdet.runtime.cuda.kernels import (
    HeadGeometry,
    OutputLayout,
    bind_workspace,
    letterbox_launch,
    nms_launches,
    nms_parameters,
    workspace_bytes,
)
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.heads import RawHead, decode_candidates
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings, suppress
from tests.gpu.conftest import SIMULATED
from tests.gpu_free.driver.simulated.engines import CANVAS, NMS, batch_of, on_the_cpu, picture, same
from tests.runtime.conftest import TinyModel

pytestmark = pytest.mark.gpu

CONTEST = NmsSettings()
DEVICE = BackendOptions(device=f"cuda:{os.environ.get('PARKDET_GPU', '0')}")


class _Nms:
    """The post-processing of FP16 heads that lie on the device."""

    def __init__(self, heads: list[RawHead], spec: ModelSpec, settings: NmsSettings) -> None:
        self.batch = len(heads[0])
        geometries = [
            HeadGeometry(grid_hw=(head.shape[2], head.shape[3]), stride=stride, anchors_wh=anchors)
            for head, stride, anchors in zip(heads, spec.strides, spec.anchors, strict=True)
        ]
        self.parameters = nms_parameters(geometries, spec.num_classes, settings, half_heads=True)
        self.parameters.batch = self.batch
        self.layout = OutputLayout(self.batch, settings.max_det)
        self.buffers = [DeviceBuffer(head.nbytes) for head in heads]
        self.staging = [PinnedBuffer(head.nbytes) for head in heads]
        self.workspace, self.outputs = DeviceBuffer(workspace_bytes(self.batch)), DeviceBuffer(self.layout.nbytes)
        self.results = PinnedBuffer(self.layout.nbytes)
        for index, (head, staged, buffer) in enumerate(zip(heads, self.staging, self.buffers, strict=True)):
            staged.view(np.float16, head.shape)[:] = head
            self.parameters.heads[index].raw = buffer.pointer
        bind_workspace(self.parameters, self.workspace.pointer)
        self.layout.bind(self.parameters, self.outputs.pointer)

    def up(self, stream: Stream) -> None:
        for staged, buffer in zip(self.staging, self.buffers, strict=True):
            upload(buffer.pointer, staged, staged.bytes, stream)

    def found(self, stream: Stream) -> list[Any]:
        download(self.results, self.outputs.pointer, self.layout.nbytes, stream)
        stream.synchronize()
        return self.layout.read(self.results.view(np.uint8, (self.layout.nbytes,)), self.batch)

    def close(self) -> None:
        for buffer in (*self.buffers, *self.staging, self.workspace, self.outputs, self.results):
            buffer.close()


def _heads(batch: int, canvas: tuple[int, int], spec: ModelSpec, seed: int) -> list[RawHead]:
    """Raw heads in which about one anchor in fifty is an object."""
    rng = np.random.default_rng(seed)
    made: list[RawHead] = []
    for stride, anchors in zip(spec.strides, spec.anchors, strict=True):
        shape = (batch, len(anchors), canvas[0] // stride, canvas[1] // stride, spec.num_outputs)
        head = rng.normal(0, 1, shape)
        head[..., 4] = np.where(rng.random(shape[:4]) < 0.02, rng.normal(0, 2, shape[:4]), -9)
        made.append(head.astype(np.float16))
    return made


def _contest_spec() -> ModelSpec:
    """Classes, strides and anchors of the contest's model."""
    anchors = ((19, 27), (44, 40), (38, 94)), ((96, 68), (86, 152), (180, 137)), ((140, 301), (303, 264), (238, 542))
    return ModelSpec(
        class_names=tuple(f"class {index}" for index in range(14)), strides=(8, 16, 32, 64),
        anchors=(*anchors, ((436, 615), (739, 380), (925, 792))), imgsz=1536,
    )  # fmt: skip


@pytest.mark.parametrize("image_hw", [(64, 96), (1080, 1920), (53, 31), (40, 40), (480, 640)])
def test_the_letterbox_is_opencvs_within_a_grey_level(gpu: Device, image_hw: tuple[int, int]) -> None:
    assert gpu
    image = picture(*image_hw, seed=1)
    box = Letterbox.fit(image_hw, 96 if SIMULATED else 1536, 32)
    canvas_bytes = 3 * box.canvas_hw[0] * box.canvas_hw[1]
    with (
        DeviceKernels() as kernels,
        Stream() as stream,
        DeviceBuffer(image.nbytes) as source,
        DeviceBuffer(canvas_bytes) as canvas,
        PinnedBuffer(image.nbytes) as staged,
        PinnedBuffer(canvas_bytes) as result,
    ):
        staged.view(np.uint8, image.shape)[:] = image
        upload(source.pointer, staged, image.nbytes, stream)
        kernels.run([letterbox_launch(box, source.pointer, canvas.pointer)], stream)
        download(result, canvas.pointer, canvas_bytes, stream)
        stream.synchronize()
        ours = result.view(np.uint8, (*box.canvas_hw, 3)).astype(np.int16)
    assert np.abs(ours - box.apply(image)).max() <= 1


@pytest.mark.parametrize("settings", [CONTEST, NmsSettings(conf=0.25, iou=0.45, max_det=300, multi_label=False)])
def test_post_processing_is_numpys(gpu: Device, settings: NmsSettings) -> None:
    assert gpu
    spec = _contest_spec()
    heads = _heads(2, (128, 128) if SIMULATED else (896, 1600), spec, 0)
    right = [suppress(one, settings) for one in decode_candidates(heads, spec, settings.conf)]
    assert sum(len(found) for found, _ in right) > 10
    nms = _Nms(heads, spec, settings)
    with DeviceKernels() as kernels, Stream() as stream:
        nms.up(stream)
        kernels.run(nms_launches(nms.parameters), stream)
        assert same(nms.found(stream), right, exact=False)
    nms.close()


def test_detections_are_those_of_the_cpu(gpu: Device, engine: Path, model: TinyModel) -> None:
    assert gpu
    images = [picture(64, 96, seed) for seed in range(4)]
    letterboxes = [Letterbox.fit((64, 96), 96, 16, CANVAS)] * 4
    with TensorRtBackend(engine, DEVICE) as backend:
        half = backend.precision == "fp16"
        right = on_the_cpu(model, images, letterboxes, NMS, half)
        canvases = np.stack([box.apply(image) for box, image in zip(letterboxes, images, strict=True)])
        for head, true_head in zip(backend.infer(canvases), model.heads(canvases), strict=True):
            assert np.allclose(head, true_head, atol=2e-2, rtol=2e-2)
        found = backend.detect(images, letterboxes, NMS)
    for (ours, _), (theirs, _) in zip(found, right, strict=True):
        assert abs(len(ours) - len(theirs)) <= 1
        assert np.allclose(ours.scores[:3], theirs.scores[:3], atol=1e-2)
        assert np.allclose(ours.xyxy[:3], theirs.xyxy[:3], atol=1)


def test_a_replayed_graph_gives_the_same(gpu: Device, engine: Path, figures: dict[str, Any]) -> None:
    assert gpu
    batches = [batch_of(4, seed) for seed in range(3)]
    with TensorRtBackend(engine, DEVICE) as backend:
        rounds = [[backend.detect(*batch, NMS) for batch in batches] for _ in range(4)]
        figures[f"graphs, {engine.stem}"] = [prepared.capturable for prepared in backend._prepared.values()]
    for later in rounds[1:]:
        assert all(same(ours, first) for ours, first in zip(later, rounds[0], strict=True))


def test_memory_stays_and_results_too_over_many_batches(gpu: Device, engine: Path, figures: dict[str, Any]) -> None:
    batches = [batch_of(count, seed) for seed, count in enumerate((4, 3, 4, 1))]
    with TensorRtBackend(engine, DEVICE) as backend:
        right = [backend.detect(*batch, NMS) for batch in batches]
        for batch in batches * 3:
            backend.detect(*batch, NMS)
        before, _ = gpu.memory()
        runs = 1 if SIMULATED else 2000
        for _ in range(runs):
            for batch, first in zip(batches, right, strict=True):
                assert same(backend.detect(*batch, NMS), first)
        after, _ = gpu.memory()
    figures[f"soak, {engine.stem}"] = {"batches": runs * len(batches), "bytes_lost": before - after}
    assert before - after < 1 << 20


@pytest.mark.parametrize("batch", [1, 16])
def test_how_long_post_processing_takes(gpu: Device, figures: dict[str, Any], batch: int) -> None:
    """At the contest's canvas, against the time that reading the objectness of all anchors takes."""
    batch = 1 if SIMULATED else batch
    spec = _contest_spec()
    heads = _heads(batch, (64, 128) if SIMULATED else (896, 1600), spec, 1)
    nms = _Nms(heads, spec, CONTEST)
    rounds = 1 if SIMULATED else 50
    with DeviceKernels() as kernels, Stream() as stream, Event(timing=True) as begin, Event(timing=True) as end:
        nms.up(stream)
        launches = nms_launches(nms.parameters)
        kernels.run(launches, stream)
        begin.record(stream)
        for _ in range(rounds):
            kernels.run(launches, stream)
        end.record(stream)
        end.synchronize()
        milliseconds = end.milliseconds_since(begin) / rounds
    nms.close()
    # A sector of 32 bytes is what a GPU reads for one number; two passes over all anchors.
    sectors = 2 * 32 * batch * nms.parameters.num_anchors
    measured = {"milliseconds": milliseconds}
    if bandwidth := gpu.bandwidth():  # a virtual GPU's driver may tell no clock
        least = sectors / bandwidth * 1e3
        measured |= {"least": least, "factor": milliseconds / least}
    figures[f"post-processing, batch {batch}"] = measured


def test_how_many_images_a_second(gpu: Device, engine: Path, figures: dict[str, Any]) -> None:
    """The tiny detector: what upload, letterbox, NMS and Python cost beside the engine."""
    assert gpu
    images, letterboxes = batch_of(4, 0)
    with TensorRtBackend(engine, DEVICE) as backend:
        for _ in range(5):
            backend.detect(images, letterboxes, NMS)
        runs = 2 if SIMULATED else 500
        started = time.perf_counter()
        for _ in range(runs):
            backend.detect(images, letterboxes, NMS)
        seconds = time.perf_counter() - started
    figures[f"images per second, tiny detector, {engine.stem}"] = 4 * runs / seconds


def test_the_plugin_through_trtexec(gpu: Device, tmp_path: Path, repository: Path, figures: dict[str, Any]) -> None:
    assert gpu
    needed = {"trtexec": shutil.which("trtexec"), "cmake": shutil.which("cmake"), "nvcc": shutil.which("nvcc")}
    missing = [name for name, found in needed.items() if found is None]
    if missing or SIMULATED:
        pytest.skip(f"not there: {', '.join(missing) or 'a GPU'}")
    if "TENSORRT_INCLUDE_DIR" not in os.environ:
        pytest.skip("TENSORRT_INCLUDE_DIR does not name TensorRT's headers")
    build = tmp_path / "plugin"
    configure = ["cmake", "-S", str(repository / "runtime/cuda/plugin"), "-B", str(build)]
    for command in (configure, ["cmake", "--build", str(build)]):
        subprocess.run(command, check=True, timeout=900)
    graph, answers = tmp_path / "plugin.onnx", tmp_path / "outputs.json"
    _plugin_graph(graph)
    spec, random = TinyModel.random().spec, np.random.default_rng(3)
    heads: list[RawHead] = [random.normal(-1, 2, (1, 2, 80 // s, 112 // s, 8)).astype(np.float32) for s in spec.strides]
    inputs = [f"head{level}:{tmp_path / f'head{level}.bin'}" for level in range(len(heads))]
    for level, head in enumerate(heads):
        head.tofile(tmp_path / f"head{level}.bin")
    run = subprocess.run(
        ["trtexec", f"--onnx={graph}", "--stronglyTyped", f"--dynamicPlugins={build / 'libparkdet_nms.so'}",
         "--iterations=100", f"--loadInputs={','.join(inputs)}", f"--exportOutput={answers}"],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    told = ("Throughput", "GPU Compute Time")
    figures["trtexec"] = [line for line in run.stdout.splitlines() if any(word in line for word in told)]
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    found = _trtexec_outputs(answers)
    ((right, _),) = [suppress(one, CONTEST) for one in decode_candidates(heads, spec, CONTEST.conf)]
    assert found["num_dets"].item() == len(right) > 10
    # It writes six digits.
    assert np.array_equal(found["classes"][0, : len(right)], right.class_ids)
    assert np.allclose(found["scores"][0, : len(right)], right.scores, atol=1e-5)
    assert np.allclose(found["boxes"][0, : len(right)], right.xyxy, atol=1e-2)


def _trtexec_outputs(path: Path) -> dict[str, NDArray[np.float64]]:
    """What `trtexec --exportOutput` wrote, by name: a list of names, dimensions (1x50x4 or (1, 50, 4)), and values."""
    return {
        tensor["name"]: np.array(tensor["values"]).reshape(
            [int(side) for side in re.findall(r"\d+", tensor["dimensions"])]
        )
        for tensor in json.loads(path.read_text())
    }


def test_what_trtexec_writes_is_read(tmp_path: Path) -> None:
    written = tmp_path / "outputs.json"
    written.write_text(
        '[\n  { "name" : "num_dets"\n  , "dimensions" : "1x1"\n  , "values" : [ 2 ]\n  }\n'
        ', { "name" : "boxes"\n  , "dimensions" : "(1, 2, 4)"\n  , "values" : [ 0, 1, 2.5, 3, 4, 5, 6, 7e-5 ]\n  }\n]\n'
    )
    found = _trtexec_outputs(written)
    assert found["num_dets"].item() == 2
    assert found["boxes"].shape == (1, 2, 4)


def _plugin_graph(path: Path) -> None:
    """Two FP32 heads straight into ParkdetNMS."""
    import onnx
    from onnx import TensorProto, helper

    spec = TinyModel.random().spec
    heads = [
        helper.make_tensor_value_info(f"head{level}", TensorProto.FLOAT, [1, 2, 80 // stride, 112 // stride, 8])
        for level, stride in enumerate(spec.strides)
    ]
    kinds = (("num_dets", TensorProto.INT32, [1, 1]), ("boxes", TensorProto.FLOAT, [1, 50, 4]),
             ("scores", TensorProto.FLOAT, [1, 50]), ("classes", TensorProto.INT32, [1, 50]))  # fmt: skip
    node = helper.make_node(
        "ParkdetNMS", [head.name for head in heads], [name for name, _, _ in kinds], domain="parkdet",
        plugin_version="1", plugin_namespace="parkdet", conf=0.01, iou=0.7, max_det=50, max_candidates=30000,
        multi_label=1, agnostic=0, num_classes=3, strides=list(spec.strides),
        anchors=[float(side) for side in np.array(spec.anchors).ravel()],
        view_scales=[1.0, 1.0], view_flips=[0, 0],
    )  # fmt: skip
    outputs = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in kinds]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("parkdet", 1)]
    graph = helper.make_graph([node], "nms", heads, outputs)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)

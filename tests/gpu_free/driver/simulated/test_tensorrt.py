"""The TensorRT backend on the simulated driver gives what the CPU gives, whenever the streams run."""

from __future__ import annotations

import hashlib
import itertools
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parkdet.runtime import engine_sidecar
from parkdet.runtime.backends import tensorrt_memory
from parkdet.runtime.backends.base import BackendOptions, FinishingBackend, open_backend
from parkdet.runtime.backends.tensorrt import DeviceImage, TensorRtBackend
from parkdet.runtime.cuda.driver import Device, Event, Stream, call
from parkdet.runtime.detector import Detector
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.heads import decode_candidates
from parkdet.runtime.model_spec import ModelSpec, TensorSpec
from parkdet.runtime.nms import NmsSettings, suppress
from tests.gpu_free.driver.simulated.engines import (
    CANVAS,
    NMS,
    Found,
    batch_of,
    make_engine,
    on_the_cpu,
    picture,
    same,
    views_onnx,
)
from tests.gpu_free.driver.simulated.tensorrt_double import simulated_engine
from tests.runtime.conftest import TinyModel

OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719


@pytest.mark.parametrize("flavour", ["10", "11", "rtx"])
@pytest.mark.parametrize("half", [True, False])
def test_detections_are_those_of_the_cpu(
    trt: Any, tmp_path: Path, model: TinyModel, simulation: Any, flavour: str, half: bool
) -> None:
    assert simulation is not None
    engine = make_engine(tmp_path / "x.engine", model, flavour, half=half)
    images = [picture(64, 96, seed) for seed in range(4)]
    letterboxes = [Letterbox.fit((64, 96), 96, 16, CANVAS)] * 4
    expected = on_the_cpu(model, images, letterboxes, NMS, half)
    assert sum(len(found) for found, _ in expected) > 10
    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
        assert isinstance(backend, FinishingBackend)
        assert (backend.canvases, backend.precision) == ((CANVAS,), "fp16" if half else "fp32")
        for _ in range(3):  # as it is, recorded, replayed
            assert same(backend.detect(images, letterboxes, NMS), expected, exact=False)
    assert "IExecutionContext.execute_async_v3(<address>)" in trt.surface.log


def test_settings_reach_the_kernels(backend: TensorRtBackend, model: TinyModel) -> None:
    images, letterboxes = [picture(64, 96, 5)], [Letterbox.fit((64, 96), 96, 16, CANVAS)]
    for nms in (
        NmsSettings(conf=0.05, iou=0.7, max_det=50), NmsSettings(conf=0.3, iou=0.2, max_det=3, multi_label=False),
        NmsSettings(conf=0.1, agnostic=True, iou=0.3), NmsSettings(conf=0.999),
    ):  # fmt: skip
        assert same(backend.detect(images, letterboxes, nms), on_the_cpu(model, images, letterboxes, nms), exact=False)


def test_scaled_images_are_letterboxed_on_the_device(backend: TensorRtBackend, model: TinyModel) -> None:
    images, letterboxes = batch_of(4, 0)
    found = backend.detect(images, letterboxes, NMS)
    expected = on_the_cpu(model, images, letterboxes, NMS)
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        # One grey level here and there moves scores a little; the best boxes stay.
        best = theirs.scores > 0.5
        assert best.sum() <= len(ours)
        for box, score, class_id in zip(theirs.xyxy[best], theirs.scores[best], theirs.class_ids[best], strict=True):
            near = (np.abs(ours.xyxy - box).max(1) < 3) & (ours.class_ids == class_id)
            assert np.abs(ours.scores[near] - score).min() < 0.1


def test_no_image_is_no_work_and_a_batch_shares_a_canvas(backend: TensorRtBackend) -> None:
    image = picture(64, 96, 1)
    boxes = [Letterbox.fit((64, 96), 96, 16, CANVAS), Letterbox.fit((64, 96), 96, 16, (112, 112))]
    with pytest.raises(ValueError, match="share one canvas"):
        backend.detect([image, image], boxes, NMS)
    with pytest.raises(ArtifactError, match=r"built for canvases from \(80, 112\) to \(80, 112\), not \(112, 112\)"):
        backend.detect([image], boxes[1:], NMS)


@cache
def _serial(engine: Path) -> list[Found]:
    """One batch after the other, with nothing else in progress."""
    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
        answers = []
        for images, letterboxes in BATCHES:
            answers.append(backend.detect(images, letterboxes, NMS))
            with backend._device.current():
                backend._device.synchronize()
        return answers


BATCHES = [batch_of(count, seed) for seed, count in enumerate((2, 2, 1, 2, 5, 2, 2, 2))]


def test_batches_from_several_threads_give_the_serial_result(trt: Any, shared_engine: Path, simulation: Any) -> None:
    assert trt is not None
    expected = _serial(shared_engine)
    assert sum(len(one) for found in expected for one, _ in found) > 50
    simulation.reset()
    with TensorRtBackend(shared_engine, BackendOptions(device="cuda:0")) as backend, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: backend.detect(batch[0], batch[1], NMS), BATCHES))
    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert "cuGraphLaunch" in simulation.calls()


@pytest.mark.parametrize("missing", ["the wait for the copy", "the wait for the results", "the copy's event"])
def test_a_removed_wait_shows_when_streams_run_late(
    trt: Any, shared_engine: Path, simulation: Any, order: str, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    assert trt is not None
    if order != "late":
        pytest.skip("streams that run early hide it")
    expected = _serial(shared_engine)
    if missing == "the wait for the copy":
        monkeypatch.setattr(Stream, "wait", lambda *_: None)
    elif missing == "the wait for the results":
        monkeypatch.setattr(Event, "synchronize", lambda *_: None)
    else:
        record, counter = Event.record, itertools.count()
        monkeypatch.setattr(
            Event, "record", lambda self, stream: None if next(counter) % 2 == 0 else record(self, stream)
        )
    wrong = 0
    with TensorRtBackend(shared_engine, BackendOptions(device="cuda:0")) as backend:
        for batch, right in zip(BATCHES, expected, strict=True):
            try:
                wrong += not same(backend.detect(*batch, NMS), right)
            except ValueError:  # what came back is no list of detections
                wrong += 1
    assert wrong
    simulation.forget()


def test_a_batch_is_recorded_on_its_second_run_and_replayed(backend: TensorRtBackend, simulation: Any) -> None:
    images, letterboxes = batch_of(4, 1)
    counts = []
    first = backend.detect(images, letterboxes, NMS)
    for _ in range(6):
        simulation.reset()
        assert same(backend.detect(images, letterboxes, NMS), first)
        calls = simulation.calls()
        counts.append((calls.count("cuStreamBeginCapture"), calls.count("cuGraphLaunch"), calls.count("run:host")))
    # Two slots: each runs a batch as it is, records it, then replays it.
    assert counts == [(0, 0, 1), (1, 1, 1), (1, 1, 1), (0, 1, 1), (0, 1, 1), (0, 1, 1)]


def test_other_pictures_and_other_settings_are_not_mixed_up_by_graphs(backend: TensorRtBackend, engine: Path) -> None:
    batches = [batch_of(2, seed) for seed in range(2)]
    settings = [NMS, NmsSettings(conf=0.4, max_det=5), NmsSettings(conf=0.1, iou=0.3, max_det=50)]
    cases = [(batch, nms) for batch in batches for nms in settings]
    rounds = [[backend.detect(*batch, nms) for batch, nms in cases] for _ in range(3)]
    for index, (batch, nms) in enumerate(cases):
        with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as fresh:
            expected = fresh.detect(*batch, nms)
        assert all(same(found[index], expected) for found in rounds)


def test_of_many_recorded_batches_the_least_used_are_given_back(
    backend: TensorRtBackend, simulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_memory, "_KEPT_GRAPHS", 1)
    batch, others = batch_of(2, 1), NmsSettings(conf=0.4, max_det=5)
    first = [backend.detect(*batch, nms) for nms in (NMS, others)]
    for _ in range(2):
        for nms, expected in zip((NMS, others), first, strict=True):
            assert all(same(backend.detect(*batch, nms), expected) for _ in range(6))
    calls = simulation.calls()
    assert calls.count("cuStreamBeginCapture") - calls.count("cuGraphExecDestroy") == 2  # one a slot


@pytest.mark.parametrize("flavour", ["11", "rtx"])
def test_an_engine_that_cannot_be_recorded_runs_without_and_says_so(
    backend: TensorRtBackend, trt: Any, simulation: Any, caplog: pytest.LogCaptureFixture, flavour: str
) -> None:
    images, letterboxes = batch_of(1, 1)
    first = backend.detect(images, letterboxes, NMS)
    if flavour == "rtx":
        trt.answers["IExecutionContext", "is_stream_capturable"] = False
    else:
        simulation.fail("cuStreamEndCapture", 0, 901)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert same(backend.detect(images, letterboxes, NMS), first)
    assert "cuGraphLaunch" not in simulation.calls()
    assert caplog.text.count("runs without") == 1


def test_a_batch_that_does_not_fit_is_halved_and_said(
    backend: TensorRtBackend, model: TinyModel, simulation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    images, letterboxes = batch_of(9, 2)
    simulation.fail("cuMemAlloc", 4, OUT_OF_MEMORY)
    with caplog.at_level(logging.WARNING):
        found = backend.detect(images, letterboxes, NMS)
    assert "a batch of 4 does not fit the simulated device" in caplog.text
    assert "going on with 2 at a time" in caplog.text
    assert len(found) == 9
    assert "IExecutionContext" in str(type(next(iter(backend._prepared.values())).context._native))
    assert {batch for _, batch in backend._prepared} == {1, 2}
    assert same(backend.detect(images, letterboxes, NMS), found)
    assert model is not None


def test_one_image_that_does_not_fit_is_an_error_with_the_remedy(backend: TensorRtBackend, simulation: Any) -> None:
    images, letterboxes = batch_of(4, 2)
    simulation.fail("cuMemAlloc", 0, OUT_OF_MEMORY)
    with pytest.raises(
        ArtifactError, match=r"a batch of 1 does not fit the simulated device: \d.\d of \d.\d GiB are free"
    ):
        backend.detect(images, letterboxes, NMS)
    simulation.reset()
    assert len(backend.detect(images, letterboxes, NMS)) == 4


def test_a_batch_larger_than_the_engines_or_smaller(
    trt: Any, tmp_path: Path, model: TinyModel, simulation: Any
) -> None:
    assert trt is not None
    assert simulation is not None
    images, letterboxes = batch_of(7, 3)
    fixed = make_engine(tmp_path / "fixed.engine", model, batches=(3, 3))
    wide = make_engine(tmp_path / "wide.engine", model, batches=(2, 16))
    answers: list[Found] = []
    canvases = np.stack([box.apply(image) for box, image in zip(letterboxes, images, strict=True)])
    for engine in (fixed, wide):
        with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
            answers.append(backend.detect(images, letterboxes, NMS))
            assert same(backend.detect(images[:1], letterboxes[:1], NMS), answers[0][:1])
            for ours, theirs in zip(backend.infer(canvases), model.heads(canvases), strict=True):
                assert ours.dtype == np.float32
                assert np.allclose(ours, theirs, atol=2e-2, rtol=2e-3)
    assert same(answers[0], answers[1])


def test_an_engine_for_a_range_of_canvases(trt: Any, tmp_path: Path, model: TinyModel, simulation: Any) -> None:
    assert trt is not None
    assert simulation is not None
    engine = make_engine(tmp_path / "range.engine", model, canvases=((48, 64), (112, 112)))
    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
        assert (backend.canvases, backend.fixed_input) == ((), (None, None, None))
        for shape in ((64, 96), (96, 64), (96, 96), (64, 96), (96, 64), (64, 96), (96, 64), (64, 96), (96, 64)):
            image, box = picture(*shape, seed=4), Letterbox.fit(shape, 96, 16)
            assert same(backend.detect([image], [box], NMS), on_the_cpu(model, [image], [box], NMS), exact=False)
            # Six pairs of batch and canvas are more than the contexts that are kept.
            pair = on_the_cpu(model, [image, image], [box, box], NMS)
            assert same(backend.detect([image, image], [box, box], NMS), pair, exact=False)
            heads = backend.infer(box.apply(image)[None])
            assert np.allclose(heads[1], model.heads(box.apply(image)[None])[1], atol=2e-2, rtol=2e-3)
        with pytest.raises(ArtifactError, match=r"from \(48, 64\) to \(112, 112\), not \(144, 112\)"):
            backend.detect([image], [Letterbox.fit(shape, 96, 16, (144, 112))], NMS)


def test_the_views_of_test_time_augmentation_are_joined(trt: Any, tmp_path: Path, simulation: Any) -> None:
    assert trt is not None
    assert simulation is not None
    import onnxruntime as ort

    model = TinyModel.random(tta=True)
    engine = make_engine(tmp_path / "views.engine", model, batches=(1, 1))
    outputs = views_onnx(tmp_path / "views.onnx", model.spec)
    simulated_engine(engine, tmp_path / "views.onnx", 1, 1)
    content = engine.read_bytes()
    sidecar = engine_sidecar.read(engine)
    spec = replace(sidecar.spec, outputs=tuple(outputs))
    digest = hashlib.sha256(content).hexdigest()
    engine_sidecar.write(engine, replace(sidecar, spec=spec, engine_sha256=digest, engine_bytes=len(content)))
    image, box = picture(64, 96, 9), Letterbox.fit((64, 96), 96, 16, CANVAS)
    session = ort.InferenceSession(tmp_path / "views.onnx", providers=["CPUExecutionProvider"])
    raw = session.run([output.name for output in outputs], {"images": box.apply(image)[None]})
    (candidates,) = decode_candidates([head.astype(np.float16) for head in raw], spec, NMS.conf)
    right = [suppress(candidates, NMS)]
    assert len(right[0][0]) > 5
    with TensorRtBackend(engine, BackendOptions(device="cuda:0")) as backend:
        for _ in range(4):
            assert same(backend.detect([image], [box], NMS), right, exact=False)


def test_several_engines_of_other_canvases_share_a_context(
    trt: Any, tmp_path: Path, model: TinyModel, simulation: Any
) -> None:
    assert trt is not None
    folder = tmp_path / "engines"
    folder.mkdir()
    make_engine(folder / "wide.engine", model, canvas=(80, 112))
    make_engine(folder / "tall.engine", model, canvas=(112, 80))
    wide, tall = picture(64, 96, 1), picture(96, 64, 2)
    boxes = {shape: Letterbox.fit(shape, 96, 16) for shape in ((64, 96), (96, 64))}
    assert boxes[64, 96].canvas_hw == (80, 112)
    with open_backend(folder) as backend:
        assert isinstance(backend, TensorRtBackend)
        assert backend.canvases == ((80, 112), (112, 80))
        for image in (wide, tall, wide, tall, wide, tall, wide, tall):
            box = boxes[image.shape[0], image.shape[1]]
            assert same(backend.detect([image], [box], NMS), on_the_cpu(model, [image], [box], NMS), exact=False)
            canvas = box.apply(image)[None]
            assert np.allclose(backend.infer(canvas)[0], model.heads(canvas)[0], atol=2e-2, rtol=2e-3)
        assert simulation.live()["contexts"] == 1
    make_engine(folder / "again.engine", model, canvas=(112, 80))
    with pytest.raises(
        ArtifactError, match=r"tall.engine: does not go with .*again.engine: engines that are opened together"
    ):
        open_backend(folder)


def test_images_of_others_on_the_device_after_their_stream(
    backend: TensorRtBackend, model: TinyModel, order: str
) -> None:
    """As a program with pycuda, CuPy or torch would: its memory, its stream, handed over as integers."""
    images = [picture(64, 96, seed) for seed in range(3)]
    letterboxes = [Letterbox.fit((64, 96), 96, 16, CANVAS)] * 3
    expected = on_the_cpu(model, images, letterboxes, NMS)
    pitch = 3 * 96 + 32
    with Device() as device, device.current():
        stream = int(call("cuStreamCreate", 1))
        pointers = [int(call("cuMemAlloc", 64 * pitch)) for _ in images]
        pinned = int(call("cuMemHostAlloc", 64 * pitch * 3, 0))
        import ctypes

        host = np.ndarray(
            (3, 64, pitch), np.uint8, buffer=memoryview((ctypes.c_uint8 * (64 * pitch * 3)).from_address(pinned))
        )
        for index, image in enumerate(images):
            host[index, :, : 3 * 96] = image.reshape(64, -1)
            call("cuMemcpyHtoDAsync", pointers[index], pinned + index * 64 * pitch, 64 * pitch, stream)
        found = backend.detect_on_device([DeviceImage(p, pitch) for p in pointers], letterboxes, NMS, stream)
        assert same(found, expected, exact=False)
        for pointer in pointers:
            call("cuMemFree", pointer)
        call("cuMemFreeHost", pinned)
        call("cuStreamDestroy", stream)
    assert order


def test_engines_that_this_machine_cannot_run(
    trt: Any, tmp_path: Path, model: TinyModel, simulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # as if it were not installed
    assert trt is not None
    assert simulation is not None
    for changed, told in (
        ({"architectures": (86,)}, "built for compute capability 8.6, this GPU has 7.5"),
        ({"version": "10.16.1.11"}, "was built with TensorRT 10.16.1.11, this is 11.4.0.106"),
        ({"engine_sha256": "1" * 64}, "is not the file that"),
    ):
        engine = make_engine(tmp_path / "wrong.engine", model, **changed)
        with pytest.raises(ArtifactError, match=told):
            open_backend(engine)
    engine = make_engine(tmp_path / "rtx.engine", model, "rtx")
    with pytest.raises(UsageError, match="tensorrt_rtx cannot be imported"):
        open_backend(engine)
    other: ModelSpec = replace(model.spec, outputs=(TensorSpec(name="x", dtype="float16", shape=(1,)),))
    engine = make_engine(tmp_path / "names.engine", model, spec=other)
    with pytest.raises(ArtifactError, match="gives head1, head0, its model spec x"):
        open_backend(engine)
    (tmp_path / "bad.engine").write_bytes(b"no engine")
    with pytest.raises(ArtifactError, match=r"has no bad\.engine\.json beside it"):
        open_backend(tmp_path / "bad.engine")


def test_the_detector_runs_on_an_engine(trt: Any, engine: Path, model: TinyModel, simulation: Any) -> None:
    assert trt is not None
    assert simulation is not None
    image = picture(64, 96, 7)
    with Detector(engine, conf=0.2, iou=0.5, max_det=20, multi_label=True) as detector:
        found = detector(image)
    ((expected, _),) = on_the_cpu(model, [image], [Letterbox.fit((64, 96), 96, 16, CANVAS)], NMS)
    assert len(expected) > 2
    assert np.allclose(found.scores, expected.scores, atol=1e-5)


def test_after_close_nothing_runs(backend: TensorRtBackend) -> None:
    backend.close()
    with pytest.raises(ValueError, match="closed"):
        backend.detect(*batch_of(2, 1), NMS)

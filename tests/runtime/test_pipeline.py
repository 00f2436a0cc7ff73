"""The pipeline: the same result as one image at a time by hand, whatever the batch, the threads or the stops."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import polars as pl
import pytest

from parkdet.runtime.canvas_choice import fit_letterbox
from parkdet.runtime.errors import ArtifactError, DataError, ParkdetError, UsageError
from parkdet.runtime.geometry import FloatArray, ImageArray, Letterbox, areas, xyxy_to_xywh
from parkdet.runtime.heads import decode_heads
from parkdet.runtime.loading import ImageItem
from parkdet.runtime.nms import NmsSettings, non_max_suppression
from parkdet.runtime.pipeline import Pipeline, PipelineReport, PipelineSettings
from parkdet.runtime.shards import FailedImage
from parkdet.runtime.store import RunStore, covered_images, failed_images, read_predictions

SIZES = ((60, 90), (90, 60), (60, 90), (50, 50), (1, 1), (300, 40), (90, 60), (60, 90), (45, 96), (60, 90), (7, 3))
FINGERPRINT = {"model": "m"}


class NumpyBackend:
    """The tiny model in numpy, with what a test wants to see or to happen."""

    name = "numpy"
    path = Path("tiny")
    precision = "fp32"

    def __init__(self, model: Any, parallel: int = 2, fixed: tuple[int | None, ...] = (None, None, None)) -> None:
        self.model = model
        self.spec = model.spec
        self.parallel = parallel
        self.fixed_input: Any = fixed
        self.shapes: list[tuple[int, ...]] = []
        self.running = 0
        self.most_running = 0
        self.before: Callable[[int], None] = lambda _: None
        self._lock = threading.Lock()

    def infer(self, canvases: ImageArray) -> list[FloatArray]:
        with self._lock:
            self.shapes.append(canvases.shape)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            calls = len(self.shapes)
        try:
            self.before(calls)
            heads: list[FloatArray] = self.model.heads(canvases)
            return heads
        finally:
            with self._lock:
                self.running -= 1

    def close(self) -> None:
        pass


@pytest.fixture
def backend(tiny_model: Any) -> NumpyBackend:
    return NumpyBackend(tiny_model)


@pytest.fixture
def items(tmp_path: Path, picture: Callable[..., ImageArray]) -> list[ImageItem]:
    """Images of mixed sizes, among them five that cannot be read; ids neither dense nor ascending."""
    made = []
    for index, (height, width) in enumerate(SIZES):
        path = tmp_path / f"이미지 {index:02d}.png"
        cv2.imencode(".png", picture(height, width, index))[1].tofile(path)
        made.append(ImageItem(image_id=1000 - 7 * index, file_name=path.name, path=path))
    bad = {"zero.png": b"", "text.png": b"no image here, only a text" * 9}
    bad["cut.png"] = made[0].path.read_bytes()[:-30] if made[0].path else b""
    for index, (name, content) in enumerate(bad.items()):
        (tmp_path / name).write_bytes(content)
        made.insert(3 * index, ImageItem(image_id=index, file_name=name, path=tmp_path / name))
    made.append(ImageItem(image_id=50, file_name="gone.png", path=tmp_path / "gone.png"))
    made.append(ImageItem(image_id=51, file_name="../out.png", path=None, problem="leaves the folder"))
    return made


def _by_hand(items: list[ImageItem], model: Any, nms: NmsSettings, imgsz: int) -> pl.DataFrame:
    """One image after the other through the public functions, no pipeline."""
    rows = []
    for item in items:
        image = cv2.imread(os.fspath(item.path), cv2.IMREAD_COLOR) if item.path and item.path.exists() else None
        if image is None:
            continue
        letterbox = Letterbox.fit((image.shape[0], image.shape[1]), imgsz, model.spec.stride_max)
        decoded = decode_heads(model.heads(letterbox.apply(np.asarray(image, np.uint8))[None]), model.spec)[0]
        found = non_max_suppression(decoded, nms.conf, nms.iou, nms.max_det, nms.multi_label, nms.agnostic)
        xyxy = letterbox.to_image(found.xyxy)
        for box, area, score, class_id in zip(xyxy, areas(xyxy), found.scores, found.class_ids, strict=True):
            if area > 0:
                values = [float(v) for v in xyxy_to_xywh(box)]
                rows.append((item.image_id, model.spec.category_ids[class_id], *values, float(score)))
    columns = {"image_id": pl.Int64, "category_id": pl.Int32}
    columns |= dict.fromkeys(("x", "y", "w", "h", "score"), pl.Float32)  # type: ignore[arg-type]
    return pl.DataFrame(rows, schema=columns, orient="row").sort("image_id", maintain_order=True)


def _run(
    backend: NumpyBackend, items: list[ImageItem], folder: Path, stop: threading.Event | None = None, **settings: Any
) -> PipelineReport:
    pipeline = Pipeline(backend, PipelineSettings(imgsz=96, **settings))
    with RunStore(folder, FINGERPRINT) as store:
        return pipeline.run(items, store, stop=stop)


def test_no_images_are_no_work(backend: NumpyBackend, tmp_path: Path) -> None:
    report = _run(backend, [], tmp_path / "run")
    assert (report.done, report.failed, report.interrupted) == (0, [], False)
    assert backend.shapes == []


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("shard_images", [4, 500])
@pytest.mark.parametrize("loaders", [1, 4])
@pytest.mark.parametrize("nms", [NmsSettings(), NmsSettings(conf=0.25, iou=0.45, max_det=300, multi_label=False)])
def test_the_result_is_that_of_single_images_by_hand(
    backend: NumpyBackend, items: list[ImageItem], tmp_path: Path, batch_size: int, shard_images: int, loaders: int,
    nms: NmsSettings,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    report = _run(backend, items, run, nms=nms, batch_size=batch_size, shard_images=shard_images, loaders=loaders)
    expected = _by_hand(items, backend.model, nms, 96)
    assert len(expected) > 100
    assert read_predictions(run).equals(expected)
    assert report.done == len(SIZES) == len(covered_images(run))
    assert len(list((run / "predictions").iterdir())) == -(-len(items) // shard_images)
    assert all(shape[0] <= batch_size for shape in backend.shapes)
    assert backend.most_running <= backend.parallel


def test_images_of_one_canvas_share_a_batch(backend: NumpyBackend, items: list[ImageItem], tmp_path: Path) -> None:
    _run(backend, items, tmp_path / "run", batch_size=4)
    assert (4, *Letterbox.fit((60, 90), 96, 16).canvas_hw, 3) in backend.shapes
    assert sum(shape[0] for shape in backend.shapes) == len(SIZES)


def test_each_canvas_of_a_shard_comes_once(backend: NumpyBackend, items: list[ImageItem], tmp_path: Path) -> None:
    """A backend keeps few of them compiled: mixed, eight canvases took twice the time."""
    backend.parallel = 1
    many = [replace(item, image_id=100 * turn + number) for turn in range(3) for number, item in enumerate(items)]
    _run(backend, many, tmp_path / "run", batch_size=1)
    canvases = [shape[1:3] for shape in backend.shapes]
    assert sorted(canvases) == sorted(Letterbox.fit(image_hw, 96, 16).canvas_hw for image_hw in SIZES * 3)
    # Two calls may change places where one canvas follows another.
    assert sum(one != other for one, other in itertools.pairwise(canvases)) <= 2 * len(set(canvases))


def test_images_that_cannot_be_read_are_recorded_with_the_reason(
    backend: NumpyBackend, items: list[ImageItem], tmp_path: Path
) -> None:
    report = _run(backend, items, tmp_path / "run", shard_images=5)
    reasons = {image.file_name: image.reason for image in failed_images(tmp_path / "run")}
    assert reasons.keys() == {"zero.png", "text.png", "cut.png", "gone.png", "../out.png"}
    assert reasons["zero.png"] == "has zero bytes"
    assert reasons["cut.png"].startswith("is cut off")
    assert reasons["gone.png"] == "does not exist"
    assert reasons["../out.png"] == "leaves the folder"
    assert sorted(image.image_id for image in report.failed) == [0, 1, 2, 50, 51]


def test_a_second_run_does_only_what_is_missing_and_tries_failed_images_again(
    backend: NumpyBackend, items: list[ImageItem], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _run(backend, items, run)
    backend.shapes.clear()
    again = _run(backend, items, run)
    assert (again.done, len(again.failed), backend.shapes) == (0, 5, [])
    assert len(list((run / "predictions").iterdir())) == 1  # the same failures need no new shard
    mended = next(item for item in items if item.file_name == "zero.png")
    assert mended.path is not None
    mended.path.write_bytes(items[1].path.read_bytes() if items[1].path else b"")
    third = _run(backend, items, run)
    assert (third.done, len(third.failed)) == (1, 4)
    assert read_predictions(run).equals(_by_hand(items, backend.model, NmsSettings(), 96))
    assert len(failed_images(run)) == 4


@pytest.mark.parametrize("after", [1, 2, 5, 9])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stop_saves_what_is_done_and_the_next_run_completes_it(
    backend: NumpyBackend, items: list[ImageItem], tmp_path: Path, after: int, batch_size: int
) -> None:
    run, stop = tmp_path / "run", threading.Event()
    backend.before = lambda calls: stop.set() if calls == after else None
    report = _run(backend, items, run, stop=stop, batch_size=batch_size, shard_images=6)
    assert len(covered_images(run)) == report.done >= min(after, 1)
    if after < 3:
        assert report.interrupted
    backend.before = lambda _: None
    rest = _run(backend, items, run, batch_size=2)
    assert rest.done == len(SIZES) - report.done
    assert read_predictions(run).equals(_by_hand(items, backend.model, NmsSettings(), 96))


def test_an_error_of_the_model_is_raised_and_finished_images_are_kept(
    backend: NumpyBackend, items: list[ImageItem], tmp_path: Path
) -> None:
    def fail(calls: int) -> None:
        if calls == 6:
            raise ArtifactError("broken")

    backend.before = fail
    with pytest.raises(ArtifactError, match="broken"):
        _run(backend, items, tmp_path / "run")
    done = len(covered_images(tmp_path / "run"))
    assert 3 <= done < len(SIZES)
    backend.before = lambda _: None
    assert _run(backend, items, tmp_path / "run").done == len(SIZES) - done
    assert read_predictions(tmp_path / "run").equals(_by_hand(items, backend.model, NmsSettings(), 96))


def test_a_full_disk_stops_the_run_and_the_next_one_completes_it(
    backend: NumpyBackend, items: list[ImageItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []

    def full(descriptor: int) -> None:
        syncs.append(descriptor)
        if len(syncs) == 7:  # two a file: run.json, two shards, then the third shard fails
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ParkdetError, match="No space left"):
            _run(backend, items, tmp_path / "run", shard_images=4)
    assert 0 < len(covered_images(tmp_path / "run")) < len(SIZES)
    _run(backend, items, tmp_path / "run", shard_images=4)
    assert read_predictions(tmp_path / "run").equals(_by_hand(items, backend.model, NmsSettings(), 96))


def test_the_caps_are_counted(backend: NumpyBackend, items: list[ImageItem], tmp_path: Path) -> None:
    with RunStore(tmp_path / "run", FINGERPRINT) as store:
        Pipeline(backend, PipelineSettings(imgsz=96, nms=NmsSettings(max_det=5))).run(items, store)
        assert store.caps.at_max_det > 0
        assert store.detections <= 5 * len(SIZES)
        # By hand: images that have more than 5 survivors without the cap.
        expected = _by_hand(items, backend.model, NmsSettings(max_det=10_000), 96)
        counts = expected.group_by("image_id").len()
        assert store.caps.at_max_det >= counts.filter(pl.col("len") > 5).height
    with RunStore(tmp_path / "all", FINGERPRINT) as store:
        Pipeline(backend, PipelineSettings(imgsz=96, nms=NmsSettings(max_det=10_000))).run(items, store)
        assert store.caps.at_max_det == 0
        assert store.detections == len(expected)


def test_canvases_in_memory_are_bounded(
    backend: NumpyBackend, tmp_path: Path, picture: Callable[..., ImageArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(os.fspath(path), picture(40, 60))
    many = [ImageItem(image_id=i, file_name="a.png", path=path) for i in range(120)]
    loaded, finished = 0, 0
    most = 0
    apply = Letterbox.apply

    def counting(self: Letterbox, image: ImageArray) -> ImageArray:
        nonlocal loaded, most
        loaded += 1
        most = max(most, loaded - finished)
        return apply(self, image)

    def slow(_: int) -> None:
        nonlocal finished
        time.sleep(0.005)
        finished += 2

    monkeypatch.setattr(Letterbox, "apply", counting)
    backend.before = slow
    _run(backend, many, tmp_path / "run", batch_size=2, loaders=2)
    # Ahead: loaders + 2 batches; waiting: one group of less than a batch; with the runners: 2 * parallel batches.
    assert most <= (2 + 4) + 2 + 2 * 4 + 2


def test_results_are_let_go_once_they_are_written(backend: NumpyBackend, items: list[ImageItem]) -> None:
    """Else a run's memory grows with its images."""
    written: list[list[weakref.ref[FloatArray]]] = []
    alive: list[int] = []

    class Sink:
        covered: ClassVar[set[int]] = set()
        failed: ClassVar[list[FailedImage]] = []

        def write(self, results: Any, failed: Any, caps: Any = None) -> None:  # noqa: ARG002 - the protocol
            alive.append(sum(scores() is not None for shard in written for scores in shard))
            written.append([weakref.ref(result.scores) for result in results])

    many = [replace(item, image_id=1000 * turn + number) for turn in range(9) for number, item in enumerate(items)]
    Pipeline(backend, PipelineSettings(imgsz=96, shard_images=10)).run(many, Sink())
    assert sum(map(len, written)) == 9 * len(SIZES)
    # The shard before may be in its writer's hands still; none from earlier.
    assert max(alive) <= 10


def test_an_id_given_twice_is_refused(backend: NumpyBackend, items: list[ImageItem], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image id 0 is given twice, to zero\.png and zero\.png"):
        _run(backend, [*items, items[0]], tmp_path / "run")


def test_times_of_all_stages_are_measured(backend: NumpyBackend, items: list[ImageItem], tmp_path: Path) -> None:
    backend.before = lambda _: time.sleep(0.02)
    report = _run(backend, items, tmp_path / "run")
    assert all(seconds > 0 for seconds in report.times.seconds.values())
    assert report.times.seconds["model"] >= 0.02 * len(SIZES)
    assert report.times.bottleneck() == "model"


@pytest.mark.parametrize("image_hw", [(60, 90), (90, 60), (1, 1), (5, 4000), (64, 96), (1080, 1920)])
def test_an_image_fits_the_one_canvas_of_a_graph_of_fixed_size(tiny_model: Any, image_hw: tuple[int, int]) -> None:
    backend = NumpyBackend(tiny_model, fixed=(1, 64, 96))
    letterbox = fit_letterbox(image_hw, 96, backend)
    assert letterbox.canvas_hw == (64, 96)
    height, width = letterbox.resized_hw
    assert height <= 64
    assert width <= 96
    assert max(height / 64, width / 96) > 0.9  # as large as fits


@pytest.mark.parametrize("wrong", [{"imgsz": 0}, {"batch_size": 0}, {"shard_images": 0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        PipelineSettings(**{"imgsz": 96, **wrong})

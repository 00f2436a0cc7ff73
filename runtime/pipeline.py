"""Images to shards: decode, letterbox, model, post-processing and writing, overlapped and bounded.

Threads decode and letterbox ahead in the order of the images; canvases of one size are gathered in batches;
other threads run the model and then decode the heads and suppress, so that the model works on the next batch
meanwhile. A shard is a stretch of the image list, written when all of it is done. Results do not depend on
batch size, threads, or where an earlier run was interrupted.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parkdet.runtime.backends.base import Backend, FinishingBackend, available_cpus
from parkdet.runtime.canvas_choice import fit_letterbox
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.geometry import ImageArray, Letterbox, xyxy_to_xywh
from parkdet.runtime.images import read_image
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings
from parkdet.runtime.post_processing import ProcessedImage, finish, post_process
from parkdet.runtime.shards import CapCounts, FailedImage, ImageResult
from parkdet.runtime.store import RunStore

_SHARD_IMAGES = {False: 500, True: 100}
"""By whether candidates are kept: an image's may take a megabyte, and a shard's are in memory until it is written."""
_WAITING_BATCHES = 4
"""Canvases of rare sizes wait for company up to this many batches in all; then the oldest go as they are."""

STAGES = ("decode", "letterbox", "model", "post", "write")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageItem:
    """One image to be done."""

    image_id: int
    file_name: str
    path: Path | None
    """None for one that is known to be missing."""
    problem: str = "does not exist"
    """Why there is no path."""

    def file_bytes(self) -> int:
        """Size of the file; -1 where there is none."""
        try:
            return -1 if self.path is None else self.path.stat().st_size
        except OSError:
            return -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """How images become detections, and how the work is cut. Only the first two change the result."""

    nms: NmsSettings = field(default_factory=NmsSettings)
    imgsz: int
    """Length in pixels to which the long side is scaled."""
    batch_size: int = 1
    shard_images: int | None = None
    """Images a shard; by default 500, or 100 where candidates are kept."""
    keep_candidates: bool = False
    """Whether results bring what entered their NMS."""
    loaders: int | None = None
    """Threads that decode and letterbox; by default as many as the process has processors, at most 16."""

    def __post_init__(self) -> None:
        for name in ("imgsz", "batch_size", "shard_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")


@dataclass(slots=True)
class StageTimes:
    """Seconds of work by stage, summed over its threads, and over how many threads it could spread."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    lanes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 1))

    def bottleneck(self) -> str:
        """The stage that would take longest if it ran alone on its threads."""
        return max(STAGES, key=lambda stage: self.seconds[stage] / self.lanes[stage])


@dataclass(slots=True, kw_only=True)
class PipelineReport:
    """What one run did."""

    done: int = 0
    """Images with a result from this run."""
    failed: list[FailedImage] = field(default_factory=list)
    """Images of this run that could not be read."""
    interrupted: bool = False
    seconds: float = 0.0
    times: StageTimes = field(default_factory=StageTimes)


def refuse_unfit_views(spec: ModelSpec, asked: bool, where: str | os.PathLike[str]) -> None:
    """UsageError unless the artifact makes the views that were asked for, and this version can merge them."""
    if asked and not spec.tta:
        raise UsageError(
            f"{os.fspath(where)}: was exported without test-time augmentation; export again with --tta, "
            "or run without it"
        )
    if spec.tta:
        raise UsageError(
            f"{os.fspath(where)}: makes the views of test-time augmentation, which this version does not run; "
            "export again without --tta"
        )


@dataclass(slots=True)
class _Loaded:
    """An image ready for the backend, or the reason why not."""

    item: ImageItem
    pixels: ImageArray | None = None
    """Its canvas; the decoded image where the backend letterboxes."""
    letterbox: Letterbox | None = None
    file_bytes: int = -1
    reason: str = ""
    decode_s: float = 0.0
    letterbox_s: float = 0.0


@dataclass(slots=True)
class _Done:
    """A batch's results."""

    images: list[tuple[ImageResult, CapCounts]]
    model_s: float
    post_s: float


class Pipeline:
    """A backend with its settings, ready to work through a list of images into a store."""

    def __init__(self, backend: Backend, settings: PipelineSettings) -> None:
        refuse_unfit_views(backend.spec, False, backend.path)
        self.backend = backend
        self._finisher = backend if isinstance(backend, FinishingBackend) and not settings.keep_candidates else None
        self.settings = settings
        self._model_slots = threading.BoundedSemaphore(backend.parallel)
        self._loaders = settings.loaders or min(available_cpus(), 16)
        # While some post-process, as many others keep the model busy.
        self._runners = 2 * backend.parallel

    def run(
        self,
        items: Sequence[ImageItem],
        store: RunStore,
        *,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PipelineReport:
        """Do the images that the open store does not cover, shard by shard.

        Images that cannot be read are recorded with the reason and tried again by the next run. When `stop`
        is set, work in progress is finished and stored, and the report says so. `on_progress` gets images done
        by this run and images to do. An error of the model or the disk stores what is finished and is raised.
        """
        _check_ids(items)
        covered = store.covered
        todo = [item for item in items if item.image_id not in covered]
        report = PipelineReport()
        report.times.lanes.update(
            decode=self._loaders, letterbox=self._loaders, model=self.backend.parallel, post=self._runners
        )
        started = time.perf_counter()
        with (
            _single_threaded_cv2(),
            ThreadPoolExecutor(self._loaders, "loader") as loaders,
            ThreadPoolExecutor(self._runners, "runner") as runners,
        ):
            run = _Run(self, store, report, stop or threading.Event(), on_progress, len(todo), runners)
            loading = _ahead(loaders, self._load, todo, self._loaders + 2 * self.settings.batch_size)
            step = self.settings.shard_images or _SHARD_IMAGES[self.settings.keep_candidates]
            for start in range(0, len(todo), step):
                if run.stop.is_set():
                    break
                run.shard(todo[start : start + step], loading)
            loading.close()
        report.interrupted = run.stop.is_set() and report.done + len(report.failed) < len(todo)
        report.seconds = time.perf_counter() - started
        return report

    def _load(self, item: ImageItem) -> _Loaded:
        import cv2

        started = time.perf_counter()
        if item.path is None:
            return _Loaded(item, reason=item.problem)
        try:
            file_bytes = item.file_bytes()
            image = read_image(item.path)
        except DataError as error:
            return _Loaded(item, reason=str(error).removeprefix(f"{item.path}: "))
        decoded = time.perf_counter()
        letterbox = fit_letterbox((image.shape[0], image.shape[1]), self.settings.imgsz, self.backend)
        try:
            pixels = letterbox.apply(image) if self._finisher is None else image
        except (cv2.error, MemoryError) as error:
            return _Loaded(item, reason=f"cannot be scaled ({str(error).strip() or 'out of memory'})")
        return _Loaded(
            item,
            pixels,
            letterbox,
            file_bytes=file_bytes,
            decode_s=decoded - started,
            letterbox_s=time.perf_counter() - decoded,
        )

    def _run_batch(self, batch: list[_Loaded]) -> _Done:
        letterboxes = [loaded.letterbox for loaded in batch if loaded.letterbox is not None]
        finished, model_s, post_s = self._detect([_taken(loaded) for loaded in batch], letterboxes)
        started = time.perf_counter()
        spec = self.backend.spec
        category_ids = np.array(spec.category_ids, np.int32)
        images = []
        for loaded, letterbox, image in zip(batch, letterboxes, finished, strict=True):
            detections = image.detections
            result = ImageResult(
                image_id=loaded.item.image_id,
                file_bytes=loaded.file_bytes,
                xywh=np.asarray(xyxy_to_xywh(detections.xyxy), np.float32),
                scores=detections.scores,
                category_ids=category_ids[detections.class_ids],
                candidates=image.kept(loaded.item.image_id, letterbox, self.settings.nms, category_ids)
                if self.settings.keep_candidates
                else None,
            )
            images.append((result, image.caps))
        return _Done(images, model_s, post_s + time.perf_counter() - started)

    def _detect(
        self, pixels: list[ImageArray], letterboxes: list[Letterbox]
    ) -> tuple[list[ProcessedImage], float, float]:
        """What was found on a batch, in image pixels, and the seconds that model and post-processing took."""
        nms = self.settings.nms
        if self._finisher is not None:
            with self._model_slots:
                started = time.perf_counter()
                on_canvas = self._finisher.detect(pixels, letterboxes, nms)
                modelled = time.perf_counter()
            found = [finish(*one, letterbox) for one, letterbox in zip(on_canvas, letterboxes, strict=True)]
        else:
            canvases = np.stack(pixels)
            pixels.clear()
            with self._model_slots:
                started = time.perf_counter()
                heads = self.backend.infer(canvases)
                modelled = time.perf_counter()
            del canvases
            found = post_process(heads, self.backend.spec, nms, letterboxes)
        return found, modelled - started, time.perf_counter() - modelled


class _Run:
    """One pass over a list of images: what is in progress, and what is finished but not yet stored."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: RunStore,
        report: PipelineReport,
        stop: threading.Event,
        on_progress: Callable[[int, int], None] | None,
        total: int,
        runners: ThreadPoolExecutor,
    ) -> None:
        self.pipeline = pipeline
        self.store = store
        self.report = report
        self.stop = stop
        self.on_progress = on_progress
        self.total = total
        self.runners = runners
        self.in_flight: set[Future[_Done]] = set()
        self.results: dict[int, tuple[ImageResult, CapCounts]] = {}
        self.failed: list[FailedImage] = []

    def shard(self, items: list[ImageItem], loading: Iterator[_Loaded]) -> None:
        """Do a stretch of the list and write its shard; on an error or a stop, what there is of it."""
        groups: OrderedDict[tuple[int, int], list[_Loaded]] = OrderedDict()
        batch_size = self.pipeline.settings.batch_size
        self.results, self.failed = {}, []
        try:
            for _ in items:
                if self.stop.is_set():
                    groups.clear()
                    break
                loaded = next(loading)
                self._count_loading(loaded)
                if loaded.letterbox is None:
                    self._fail(loaded)
                    continue
                canvas = loaded.letterbox.canvas_hw
                group = groups.setdefault(canvas, [])
                group.append(loaded)
                if len(group) == batch_size:
                    self._start(groups.pop(canvas))
                elif sum(map(len, groups.values())) >= _WAITING_BATCHES * batch_size:
                    self._start(groups.popitem(last=False)[1])
            for rest in groups.values():
                if not self.stop.is_set():
                    self._start(rest)
            self._collect(0)
        finally:
            self._salvage()
            self._write(items)

    def _start(self, batch: list[_Loaded]) -> None:
        self._collect(self.pipeline._runners - 1)
        self.in_flight.add(self.runners.submit(self.pipeline._run_batch, batch))

    def _collect(self, leave: int) -> None:
        """Take in finished batches until at most `leave` are in progress. Raises what a batch raised."""
        while len(self.in_flight) > leave:
            finished, self.in_flight = wait(self.in_flight, return_when=FIRST_COMPLETED)
            for future in finished:
                self._take(future.result())

    def _salvage(self) -> None:
        """After an error: the batches still in progress may be sound."""
        for future in wait(self.in_flight).done:
            if future.exception() is None:
                self._take(future.result())
        self.in_flight = set()

    def _take(self, done: _Done) -> None:
        self.results.update((result.image_id, (result, caps)) for result, caps in done.images)
        self.report.times.seconds["model"] += done.model_s
        self.report.times.seconds["post"] += done.post_s
        self.report.done += len(done.images)
        self._tell()

    def _fail(self, loaded: _Loaded) -> None:
        item = loaded.item
        failed = FailedImage(image_id=item.image_id, file_name=item.file_name, reason=loaded.reason)
        self.failed.append(failed)
        self.report.failed.append(failed)
        self._tell()

    def _count_loading(self, loaded: _Loaded) -> None:
        self.report.times.seconds["decode"] += loaded.decode_s
        self.report.times.seconds["letterbox"] += loaded.letterbox_s

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.report.done + len(self.report.failed), self.total)

    def _write(self, items: list[ImageItem]) -> None:
        """Store what is finished, in the order of the list. Failures on record already need no shard."""
        finished = [self.results[item.image_id] for item in items if item.image_id in self.results]
        on_record = self.store.failed
        if not finished and all(failed in on_record for failed in self.failed):
            return
        started = time.perf_counter()
        caps = sum((caps for _, caps in finished), CapCounts())
        self.store.write([result for result, _ in finished], self.failed, caps)
        self.report.times.seconds["write"] += time.perf_counter() - started


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[ImageItem], _Loaded], items: Sequence[ImageItem], window: int
) -> Generator[_Loaded]:
    """Results of `load` in the order of the items, at most `window` of them begun and not yet taken."""
    waiting: deque[Future[_Loaded]] = deque()
    upcoming = iter(items)
    try:
        for item in upcoming:
            waiting.append(pool.submit(load, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _taken(loaded: _Loaded) -> ImageArray:
    """The pixels, handed over: a batch in progress must not hold them twice."""
    pixels, loaded.pixels = loaded.pixels, None
    assert pixels is not None
    return pixels


def _check_ids(items: Sequence[ImageItem]) -> None:
    seen: dict[int, str] = {}
    for item in items:
        if item.image_id in seen:
            raise DataError(
                f"image id {item.image_id} is given twice, to {seen[item.image_id]} and {item.file_name}; "
                "a prediction could not say which it is for"
            )
        seen[item.image_id] = item.file_name


@contextmanager
def _single_threaded_cv2() -> Iterator[None]:
    """OpenCV without threads of its own: whole images are spread over ours."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)

"""Images to shards: decode, letterbox, model, post-processing and writing, overlapped and bounded.

Threads decode and letterbox ahead in the order of the images; canvases of one size are gathered in batches;
other threads run the model and then decode the heads and suppress, so that the model works on the next batch
meanwhile. A shard is a stretch of the image list, written when all of it is done, while the next one is already
in progress. Results do not depend on batch size, threads, or where an earlier run was interrupted.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from parkdet.runtime.backends.base import Backend, FinishingBackend, available_cpus
from parkdet.runtime.canvas_choice import fit_letterbox, in_canvas_order
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.geometry import ImageArray, Letterbox, xyxy_to_xywh
from parkdet.runtime.loading import ImageItem, LoadedImage, ahead, load_image, single_threaded_cv2
from parkdet.runtime.nms import NmsSettings
from parkdet.runtime.post_processing import ProcessedImage, finish, post_process
from parkdet.runtime.shards import CapCounts, FailedImage, ImageResult

_SHARD_IMAGES = {False: 500, True: 100}
"""By whether candidates are kept: an image's may take a megabyte, and a shard's are in memory until it is written."""
_WAITING_BATCHES = 4
"""Canvases of rare sizes wait for company up to this many batches in all; then the oldest go as they are."""

STAGES = ("decode", "letterbox", "model", "post", "write")


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


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One way to run an image: by which graph, at which size."""

    name: str
    backend: Backend
    imgsz: int
    cost: float = 1.0
    """What an image costs the model, relative to the other plans."""


class PlanChooser(Protocol):
    """Says by which of the plans the next image is run; asked when its decoding begins, in one thread."""

    def next_plan(self, left: int) -> int | None:
        """Index of the plan for the next image, `left` of which are not begun, it among them; None for none."""
        ...

    def finished(self, plan: int, images: int, cold: bool = False) -> None:
        """So many images of a plan have a result, or could not be read; `cold` if a graph may have been compiled."""
        ...


class ShardSink(Protocol):
    """Where finished stretches of the image list go: an open `RunStore`, or what brings them to one."""

    @property
    def covered(self) -> set[int]:
        """Ids of the images that have a result already."""
        ...

    @property
    def failed(self) -> list[FailedImage]:
        """Images on record as unreadable."""
        ...

    def write(
        self, results: Sequence[ImageResult], failed: Sequence[FailedImage], caps: CapCounts | None = None
    ) -> object:
        """Take a stretch; it is safe when this returns."""
        ...


class _FirstPlan:
    """Every image by the first plan."""

    def next_plan(self, left: int) -> int | None:  # noqa: ARG002 - the protocol's signature
        return 0

    def finished(self, plan: int, images: int, cold: bool = False) -> None:
        pass


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
    out_of_time: bool = False
    """Whether the chooser of plans left images undone."""
    seconds: float = 0.0
    times: StageTimes = field(default_factory=StageTimes)


@dataclass(slots=True)
class _Done:
    """A batch's results."""

    plan: int
    images: list[tuple[ImageResult, CapCounts]]
    model_s: float
    post_s: float
    cold: bool
    """Whether it, or another at its side, was the first of its size, for which a graph may have been compiled."""


class Pipeline:
    """A backend with its settings, ready to work through a list of images into a store."""

    def __init__(self, backend: Backend, settings: PipelineSettings, plans: Sequence[Plan] = ()) -> None:
        """`plans`: those that a chooser may choose from; the backend at the settings' size without it."""
        self.plans = tuple(plans) or (Plan("", backend, settings.imgsz),)
        self.settings = settings
        self.parallel = max(plan.backend.parallel for plan in self.plans)
        self._model_slots = threading.BoundedSemaphore(self.parallel)
        self._sizes: set[tuple[int, ...]] = set()
        """Plan, canvas and batch of what was run already."""
        self._cold_batches = 0
        self._sizes_lock = threading.Lock()
        self.loaders = settings.loaders or min(available_cpus(), 16)
        # While some post-process, as many others keep the model busy.
        self.runners = 2 * self.parallel

    def run(
        self,
        items: Sequence[ImageItem],
        store: ShardSink,
        *,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        chooser: PlanChooser | None = None,
    ) -> PipelineReport:
        """Do the images that the open store does not cover, shard by shard.

        Images that cannot be read are recorded with the reason and tried again by the next run. When `stop`
        is set, work in progress is finished and stored, and the report says so. `on_progress` gets images done
        by this run and images to do. An error of the model or the disk stores what is finished and is raised.
        """
        _check_ids(items)
        covered = store.covered
        todo = [item for item in items if item.image_id not in covered]
        run = _Run(self, store, todo, stop or threading.Event(), on_progress, chooser or _FirstPlan())
        started = time.perf_counter()
        with (
            single_threaded_cv2(),
            ThreadPoolExecutor(self.loaders, "loader") as loaders,
            ThreadPoolExecutor(self.runners, "runner") as runners,
        ):
            run.work(loaders, runners)
        report = run.report
        left = report.done + len(report.failed) < len(todo)
        report.interrupted = run.stop.is_set() and left
        report.out_of_time = left and not report.interrupted
        report.seconds = time.perf_counter() - started
        return report

    def load(self, job: tuple[ImageItem, int]) -> LoadedImage:
        """Decode one image and put it on the canvas of its plan."""
        item, plan = job
        backend, imgsz = self.plans[plan].backend, self.plans[plan].imgsz
        return load_image(
            item, plan, lambda image_hw: fit_letterbox(image_hw, imgsz, backend), self._finisher(plan) is None
        )

    def run_batch(self, batch: list[LoadedImage]) -> _Done:
        """Detections of images that share a plan and a canvas."""
        plan = batch[0].plan
        letterboxes = [loaded.letterbox for loaded in batch if loaded.letterbox is not None]
        with self._noting_first((plan, *letterboxes[0].canvas_hw, len(batch))) as cold:
            finished, model_s, post_s = self._detect(plan, [loaded.take_pixels() for loaded in batch], letterboxes)
        started = time.perf_counter()
        category_ids = np.array(self.plans[plan].backend.spec.category_ids, np.int32)
        keeps, nms = self.settings.keep_candidates, self.settings.nms
        images = []
        for loaded, letterbox, image in zip(batch, letterboxes, finished, strict=True):
            image_id, found = loaded.item.image_id, image.detections
            result = ImageResult(
                image_id=image_id,
                file_bytes=loaded.file_bytes,
                xywh=np.asarray(xyxy_to_xywh(found.xyxy), np.float32),
                scores=found.scores,
                category_ids=category_ids[found.class_ids],
                plan=self.plans[plan].name if len(self.plans) > 1 else "",
                candidates=image.kept(image_id, letterbox, nms, category_ids) if keeps else None,
            )
            images.append((result, image.caps))
        return _Done(plan, images, model_s, post_s + time.perf_counter() - started, any(cold))

    @contextmanager
    def _noting_first(self, size: tuple[int, ...]) -> Iterator[list[bool]]:
        """Around a batch of a size: whether it, or one that was in progress when it began or ended, was the first."""
        with self._sizes_lock:
            first = size not in self._sizes
            self._sizes.add(size)
            self._cold_batches += first
            cold = [self._cold_batches > 0]
        try:
            yield cold
        finally:
            with self._sizes_lock:
                cold.append(self._cold_batches > 0)
                self._cold_batches -= first

    def _detect(
        self, plan: int, pixels: list[ImageArray], letterboxes: list[Letterbox]
    ) -> tuple[list[ProcessedImage], float, float]:
        """What was found on a batch, in image pixels, and the seconds that model and post-processing took."""
        nms = self.settings.nms
        if (finisher := self._finisher(plan)) is not None:
            with self._model_slots:
                started = time.perf_counter()
                on_canvas = finisher.detect(pixels, letterboxes, nms)
                modelled = time.perf_counter()
            found = [finish(*one, letterbox) for one, letterbox in zip(on_canvas, letterboxes, strict=True)]
        else:
            backend = self.plans[plan].backend
            canvases = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
            pixels.clear()
            with self._model_slots:
                started = time.perf_counter()
                heads = backend.infer(canvases)
                modelled = time.perf_counter()
            del canvases
            found = post_process(heads, backend.spec, nms, letterboxes, self.settings.keep_candidates)
        return found, modelled - started, time.perf_counter() - modelled

    def _finisher(self, plan: int) -> FinishingBackend | None:
        """The plan's backend where it is to letterbox and suppress by itself: it gives no candidates."""
        backend = self.plans[plan].backend
        return backend if isinstance(backend, FinishingBackend) and not self.settings.keep_candidates else None


@dataclass(slots=True)
class _OpenShard:
    """A stretch of the image list that is in progress."""

    items: list[ImageItem]
    results: dict[int, tuple[ImageResult, CapCounts]] = field(default_factory=dict)
    failed: list[FailedImage] = field(default_factory=list)

    def is_complete(self) -> bool:
        return len(self.results) + len(self.failed) == len(self.items)


class _Run:
    """One pass over a list of images: what is in progress, and what is finished but not yet stored."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: ShardSink,
        todo: list[ImageItem],
        stop: threading.Event,
        on_progress: Callable[[int, int], None] | None,
        chooser: PlanChooser,
    ) -> None:
        self.pipeline = pipeline
        self.store = store
        self.todo = todo
        self.stop = stop
        self.on_progress = on_progress
        self.chooser = chooser
        self.report = PipelineReport()
        self.report.times.lanes.update(
            decode=pipeline.loaders, letterbox=pipeline.loaders, model=pipeline.parallel, post=pipeline.runners
        )
        self.shard_images = pipeline.settings.shard_images or _SHARD_IMAGES[pipeline.settings.keep_candidates]
        self.shards: deque[_OpenShard] = deque()
        """Those that are begun and not written yet; nobody else may hold one, with all of its results."""
        self.shard_of: dict[int, _OpenShard] = {}
        self.groups: OrderedDict[tuple[int, tuple[int, int]], list[LoadedImage]] = OrderedDict()
        self.in_flight: set[Future[_Done]] = set()

    def work(self, loaders: ThreadPoolExecutor, runners: ThreadPoolExecutor) -> None:
        """Do the images and write their shards; on an error or a stop, what is finished of them."""
        window = self.pipeline.loaders + 2 * self.pipeline.settings.batch_size
        loading = ahead(loaders, self.pipeline.load, self._jobs(), window)
        try:
            for number, loaded in enumerate(loading):
                if self.stop.is_set():
                    break
                if number % self.shard_images == 0:
                    # A rare canvas must not hold back the shard that it belongs to.
                    self._start_all(runners)
                self._gather(loaded, runners)
            if not self.stop.is_set():
                self._start_all(runners)
            self._collect(0)
        finally:
            loading.close()
            self._salvage()
            self._write_rest()

    def _jobs(self) -> Iterator[tuple[ImageItem, int]]:
        """Image by image as its turn to be decoded comes, with the plan that is chosen then."""
        for start in range(0, len(self.todo), self.shard_images):
            shard = _OpenShard(self.todo[start : start + self.shard_images])
            # For a deadline speeds are watched as images come, so canvases must come mixed.
            first, plain = self.pipeline.plans[0], isinstance(self.chooser, _FirstPlan)
            order = in_canvas_order(shard.items, first.imgsz, first.backend) if plain else shard.items
            for number, item in enumerate(order, start):
                if self.stop.is_set() or (plan := self.chooser.next_plan(len(self.todo) - number)) is None:
                    return
                if number == start:
                    self.shards.append(shard)
                self.shard_of[item.image_id] = shard
                yield item, plan

    def _gather(self, loaded: LoadedImage, runners: ThreadPoolExecutor) -> None:
        times, batch_size = self.report.times.seconds, self.pipeline.settings.batch_size
        times["decode"] += loaded.decode_s
        times["letterbox"] += loaded.letterbox_s
        if loaded.letterbox is None:
            self._fail(loaded)
            return
        key = (loaded.plan, loaded.letterbox.canvas_hw)
        group = self.groups.setdefault(key, [])
        group.append(loaded)
        if len(group) == batch_size:
            self._start(self.groups.pop(key), runners)
        elif sum(map(len, self.groups.values())) >= _WAITING_BATCHES * batch_size:
            self._start(self.groups.popitem(last=False)[1], runners)

    def _start_all(self, runners: ThreadPoolExecutor) -> None:
        while self.groups:
            self._start(self.groups.popitem(last=False)[1], runners)

    def _start(self, batch: list[LoadedImage], runners: ThreadPoolExecutor) -> None:
        self._collect(self.pipeline.runners - 1)
        self.in_flight.add(runners.submit(self.pipeline.run_batch, batch))

    def _collect(self, leave: int) -> None:
        """Take in finished batches until at most `leave` are in progress. Raises what a batch raised."""
        while len(self.in_flight) > leave:
            finished, self.in_flight = wait(self.in_flight, return_when=FIRST_COMPLETED)
            for future in finished:
                self._take(future.result())
            self._write_complete()

    def _salvage(self) -> None:
        """After an error: the batches still in progress may be sound."""
        for future in wait(self.in_flight).done:
            if future.exception() is None:
                self._take(future.result())
        self.in_flight = set()

    def _take(self, done: _Done) -> None:
        for result, caps in done.images:
            self.shard_of.pop(result.image_id).results[result.image_id] = result, caps
        self.report.times.seconds["model"] += done.model_s
        self.report.times.seconds["post"] += done.post_s
        self.report.done += len(done.images)
        self._tell(done.plan, len(done.images), done.cold)

    def _fail(self, loaded: LoadedImage) -> None:
        item = loaded.item
        failed = FailedImage(image_id=item.image_id, file_name=item.file_name, reason=loaded.reason)
        self.shard_of.pop(item.image_id).failed.append(failed)
        self.report.failed.append(failed)
        self._tell(loaded.plan, 1)

    def _tell(self, plan: int, images: int, cold: bool = False) -> None:
        self.chooser.finished(plan, images, cold)
        if self.on_progress is not None:
            self.on_progress(self.report.done + len(self.report.failed), len(self.todo))

    def _write_complete(self) -> None:
        while self.shards and self.shards[0].is_complete():
            self._write(self.shards.popleft())

    def _write_rest(self) -> None:
        while self.shards:
            self._write(self.shards.popleft())

    def _write(self, shard: _OpenShard) -> None:
        """Store what is finished, in the order of the list. Failures on record already need no shard."""
        finished = [shard.results[item.image_id] for item in shard.items if item.image_id in shard.results]
        on_record = self.store.failed
        if not finished and all(failed in on_record for failed in shard.failed):
            return
        started = time.perf_counter()
        caps = sum((caps for _, caps in finished), CapCounts())
        self.store.write([result for result, _ in finished], shard.failed, caps)
        self.report.times.seconds["write"] += time.perf_counter() - started


def _check_ids(items: Sequence[ImageItem]) -> None:
    seen: dict[int, str] = {}
    for item in items:
        if item.image_id in seen:
            raise DataError(
                f"image id {item.image_id} is given twice, to {seen[item.image_id]} and {item.file_name}; "
                "a prediction could not say which it is for"
            )
        seen[item.image_id] = item.file_name

"""A run's shards on many machines: one Ray actor a GPU, or a share of the processors, each with the whole pipeline.

The driver alone holds the run folder and writes its shards, so the files are those of a run in one process. Workers
open the artifact and the images under the driver's paths: a file system that all machines see. A worker that is lost
costs the shard that it was doing, which the next free worker does again; another worker is asked for in its place.
(`ray.util.ActorPool` does not say which task a dead actor had, so the bookkeeping is here.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from parkdet.runtime.backends.base import available_cpus, open_backend
from parkdet.runtime.errors import ParkdetError, UsageError
from parkdet.runtime.loading import ImageItem
from parkdet.runtime.pipeline import Pipeline, PipelineReport, PipelineSettings
from parkdet.runtime.shards import CapCounts, FailedImage, ImageResult
from parkdet.runtime.store import RunStore

_SHARDS_A_WORKER = 4
"""At least, so that the last ones end together."""
_LARGEST_SHARD = 500
_LOSSES_A_WORKER = 3
"""Lost workers, for each of those asked for, after which the run gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every worker needs."""

    artifact: Path
    settings: PipelineSettings
    backend: str
    device: str
    precision: str
    """What the driver's backend computes in: a worker of another is refused."""
    threads: int = 1
    """Processors of a worker."""


@dataclass(slots=True)
class ShardWork:
    """A finished shard on its way to the driver; what a pipeline writes to instead of a run folder."""

    covered: set[int] = field(default_factory=set)
    results: list[ImageResult] = field(default_factory=list)
    failed: list[FailedImage] = field(default_factory=list)
    caps: CapCounts = field(default_factory=CapCounts)
    report: PipelineReport = field(default_factory=PipelineReport)

    def write(
        self, results: Sequence[ImageResult], failed: Sequence[FailedImage], caps: CapCounts | None = None
    ) -> None:
        """Take in what the pipeline finished."""
        self.results += results
        self.failed += failed
        self.caps += caps or CapCounts()


class ShardWorker:
    """The pipeline in a process of its own."""

    def __init__(self, job: Job) -> None:
        asked: Any = job.precision if job.precision in ("fp32", "bf16") and job.backend == "openvino" else None
        self._backend = open_backend(job.artifact, job.backend, job.device, job.threads, precision=asked)
        if self._backend.precision != job.precision:
            raise UsageError(
                f"a worker computes in {self._backend.precision}, the run in {job.precision}: name a --precision that "
                "all machines have"
            )
        self._pipeline = Pipeline(self._backend, job.settings)

    def ready(self) -> None:
        """Answers once the artifact is open."""

    def run(self, items: list[ImageItem]) -> ShardWork:
        """Do a stretch of the image list."""
        work = ShardWork()
        work.report = self._pipeline.run(items, work)
        return work


def run_on_ray(
    job: Job,
    items: Sequence[ImageItem],
    store: RunStore,
    *,
    address: str | None,
    workers: int | None,
    stop: threading.Event,
    on_progress: Callable[[int, int], None] | None = None,
) -> PipelineReport:
    """Do the images that the open store does not cover, on a cluster: as `Pipeline.run`, with its report.

    `address`: of a running cluster; a local one is started without it. UsageError where Ray is not installed or the
    cluster cannot be reached, ParkdetError when workers are lost again and again.
    """
    if find_spec("ray") is None:
        raise UsageError("--executor ray: Ray is not installed: pip install 'parkdet[ray]'")
    import ray

    started = time.perf_counter()
    covered = store.covered
    todo = [item for item in items if item.image_id not in covered]
    try:
        local: dict[str, Any] = {} if address else {"num_cpus": available_cpus(), "include_dashboard": False}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--address {address}: there is no Ray cluster that answers ({error})") from error
    try:
        on_gpu = job.device.startswith("cuda")
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        machines = len(ray.nodes())  # type: ignore[no-untyped-call]
        count = workers or max(int(resources.get("GPU", 0)) if on_gpu else machines, 1)
        share = resources.get("CPU", 1.0) / count
        remote = ray.remote(num_cpus=min(share, max(int(share), 1)), num_gpus=int(on_gpu), max_restarts=0)(ShardWorker)
        own = Job(
            artifact=job.artifact.resolve(), settings=job.settings, backend=job.backend,
            # Ray shows an actor its own GPU only, as the first.
            device="cuda:0" if on_gpu else "cpu", precision=job.precision, threads=max(int(share), 1),
        )  # fmt: skip
        size = min(-(-len(todo) // (_SHARDS_A_WORKER * count)) or 1, job.settings.shard_images or _LARGEST_SHARD)
        run = _ClusterRun(lambda: remote.remote(own), store, len(todo), stop, on_progress)
        run.work(deque([_absolute(todo[i : i + size]) for i in range(0, len(todo), size)]), count)
    finally:
        ray.shutdown()
    report = run.report
    report.interrupted = stop.is_set() and report.done + len(report.failed) < len(todo)
    report.seconds = time.perf_counter() - started
    return report


class _ClusterRun:
    """Which worker does what."""

    def __init__(
        self,
        new_worker: Callable[[], Any],
        store: RunStore,
        total: int,
        stop: threading.Event,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.new_worker = new_worker
        self.store = store
        self.total = total
        self.stop = stop
        self.on_progress = on_progress
        self.report = PipelineReport()
        self.waiting: dict[Any, tuple[Any, list[ImageItem] | None]] = {}
        """What a worker is asked for -> the worker, and its shard; no shard while it opens the artifact."""

    def work(self, shards: deque[list[ImageItem]], workers: int) -> None:
        import ray

        for _ in range(workers):
            self._ask_for_worker()
        losses = 0
        while shards or any(shard for _, shard in self.waiting.values()):
            if self.stop.is_set():
                shards.clear()
            answered, _ = ray.wait(list(self.waiting), timeout=0.5)
            for question in answered:
                worker, shard = self.waiting.pop(question)
                try:
                    work = ray.get(question)
                except ray.exceptions.RayActorError as error:
                    losses += 1
                    if losses > _LOSSES_A_WORKER * workers:
                        raise ParkdetError(f"workers are lost again and again, the last one so: {error}") from error
                    _say_lost(losses, shard)
                    if shard:
                        shards.appendleft(shard)
                    self._ask_for_worker()
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise _own_error(error) from error
                if shard:
                    self._store(work)
                if shards:
                    shard = shards.popleft()
                    self.waiting[worker.run.remote(shard)] = worker, shard

    def _ask_for_worker(self) -> None:
        worker = self.new_worker()
        self.waiting[worker.ready.remote()] = worker, None

    def _store(self, work: ShardWork) -> None:
        started = time.perf_counter()
        on_record = self.store.failed
        if work.results or any(failed not in on_record for failed in work.failed):
            self.store.write(work.results, work.failed, work.caps)
        report = self.report
        report.done += work.report.done
        report.failed += work.report.failed
        for stage, seconds in work.report.times.seconds.items():
            report.times.seconds[stage] += seconds
        report.times.seconds["write"] += time.perf_counter() - started
        report.times.lanes.update(work.report.times.lanes)
        if self.on_progress is not None:
            self.on_progress(report.done + len(report.failed), self.total)


def _absolute(items: list[ImageItem]) -> list[ImageItem]:
    """The items with paths that hold in a process with another working folder."""
    return [
        item if item.path is None
        else ImageItem(image_id=item.image_id, file_name=item.file_name, path=item.path.absolute())
        for item in items
    ]  # fmt: skip


def _say_lost(losses: int, shard: list[ImageItem] | None) -> None:
    what = f"; its {len(shard)} images are done by another" if shard else ""
    click.echo(f"a worker was lost ({losses} so far){what}", err=True)


def _own_error(error: Any) -> BaseException:
    """What the worker raised, if it is an error of ours; else an error that says so."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ParkdetError) else ParkdetError(f"a worker failed: {str(error).strip()}")

"""What `parkdet bench` does: measure an artifact, perhaps beside another, and say whether a job is done in time."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from parkdet.runtime.backends.base import (
    Backend,
    available_cpus,
    open_backend,
    refuse_unfit_views,
    resolve_artifact,
)
from parkdet.runtime.bench import (
    Comparison,
    Latency,
    PipelineSpeed,
    StageSpeeds,
    Throughput,
    compare,
    measure_latency,
    measure_pipeline,
    measure_stages,
    measure_throughput,
    peak_memory_bytes,
    reset_peak_memory,
    sample,
)
from parkdet.runtime.canvas_choice import fit_letterbox
from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import DataError, GateError, UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.images import list_images, read_image
from parkdet.runtime.nms import NmsSettings
from parkdet.runtime.pipeline import PipelineSettings
from parkdet.runtime.plans import open_plans
from parkdet.runtime.shards import write_atomically
from parkdet.runtime.terminal import quiet_decoders


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `parkdet bench` was asked for."""

    weights: Path
    vs: Path | None = None
    source: Path | None = None
    data: Path | None = None
    imgsz: int | None = None
    batch_sizes: tuple[int, ...] = (1,)
    seconds: float = 5.0
    """A measurement."""
    images: int | None = None
    """Size of a job, whose time is foretold."""
    deadline: float | None = None
    """Seconds that it may take."""
    tta: bool = False
    fallbacks: tuple[Path, ...] = ()
    how: dict[str, Any] = field(default_factory=dict)
    """Arguments of `open_backend`: backend, device, threads, precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Distance to what the device could do at most."""

    gflop_an_image: float
    peak_gflop_per_s: float
    """Of a large convolution in the precision of the model, measured now."""
    share: float
    """Of the peak that the model's best throughput uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """How a job of many images would go."""

    images: int
    deadline_s: float | None
    seconds: float
    """By the best plan for all."""
    plans: dict[str, int]
    """Images by plan so that the deadline is kept, as many as can be by the better one."""
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    weights: str
    backend: str
    precision: str
    machine: str
    canvas_hw: tuple[int, int]
    sample: str
    latency: tuple[Latency, ...]
    throughput: tuple[Throughput, ...]
    stages: StageSpeeds
    pipelines: tuple[PipelineSpeed, ...]
    """Of every plan; the first is the artifact as asked for."""
    peak_memory_mb: float
    limit: Limit | None
    comparison: Comparison | None = None
    vs: str | None = None
    forecast: Forecast | None = None


def run_bench(options: BenchOptions, json_path: Path | None = None) -> BenchReport:
    """Measure, print the figures on stdout, write them as JSON if asked. GateError where the job would be late."""
    if options.deadline is not None and options.images is None:
        raise UsageError("--deadline is for a job of so many --images: give that, too")
    path = resolve_artifact(options.weights)
    if options.vs is not None:
        resolve_artifact(options.vs)  # before anything is measured
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise UsageError(f"--json {json_path}: is a folder, or in one that is not there; name a file")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parkdet-bench-")))
        stack.enter_context(quiet_decoders())
        paths, what = sample(options.source or options.data, _listed(options), folder)
        reset_peak_memory()
        report = _measure(stack, options, path, paths, what)
    for line in _lines(report):
        click.echo(line)
    if json_path is not None:
        write_atomically(json_path, (json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n").encode())
    if report.forecast is not None and not report.forecast.fits:
        raise GateError(
            f"{path}: {report.forecast.images:,} images are not done in {_clock(report.forecast.deadline_s or 0)} by "
            "any plan; give more time or a smaller model"
        )
    return report


def _measure(stack: ExitStack, options: BenchOptions, path: Path, paths: Sequence[Path], what: str) -> BenchReport:
    with open_backend(path, goal="latency", **options.how) as backend:
        refuse_unfit_views(backend.spec, options.tta, path)
        imgsz = options.imgsz or backend.spec.imgsz
        canvas = _canvas(backend, paths[0], imgsz)
        click.echo(f"measuring {path.name} on {backend.name} in {backend.precision} ...", err=True)
        latency = tuple(measure_latency(backend, _batch(canvas, size), options.seconds) for size in options.batch_sizes)
    wants_plans = options.images is not None
    plans = open_plans(stack, path, imgsz, cheaper=wants_plans, fallbacks=options.fallbacks, **options.how)
    best = plans[0].backend
    throughput = tuple(measure_throughput(best, _batch(canvas, size), options.seconds) for size in options.batch_sizes)
    fastest = max(throughput, key=lambda one: one.images_per_s)
    spec = best.spec
    settings = PipelineSettings(
        imgsz=imgsz, batch_size=fastest.batch, nms=NmsSettings(conf=spec.conf, iou=spec.iou, max_det=spec.max_det)
    )
    stages = measure_stages(best, paths, settings, fastest.images_per_s)
    pipelines = []
    for plan in plans:
        click.echo(f"measuring the pipeline: {plan.name} ...", err=True)
        pipelines.append(measure_pipeline(plan, paths, settings, options.seconds))
    memory = peak_memory_bytes() / 1e6
    comparison = None
    if options.vs is not None:
        other_path = resolve_artifact(options.vs)
        click.echo(f"measuring in turn with {other_path.name} ...", err=True)
        with open_backend(other_path, **options.how) as other:
            sides = [(each, _batch(_canvas(each, paths[0], imgsz), fastest.batch)) for each in (best, other)]
            comparison = compare(sides[0], sides[1], max(2 * options.seconds, 7))
    return BenchReport(
        weights=str(path),
        backend=best.name,
        precision=best.precision,
        machine=f"{platform.machine()}, {stages.cpus} processors of this process",
        canvas_hw=(canvas.shape[0], canvas.shape[1]),
        sample=what,
        latency=latency,
        throughput=throughput,
        stages=stages,
        pipelines=tuple(pipelines),
        peak_memory_mb=memory,
        limit=_limit(best, path, canvas, fastest, options),
        comparison=comparison,
        vs=None if options.vs is None else str(options.vs),
        forecast=None if options.images is None else forecast(options.images, options.deadline, pipelines),
    )


def forecast(images: int, deadline: float | None, pipelines: Sequence[PipelineSpeed]) -> Forecast:
    """The time of a job by the best plan, and with a deadline how many images each plan would get.

    The best plan that is in time alone shares the images with the next better one, as `infer --deadline` does.
    """
    seconds = [1 / speed.images_per_s for speed in pipelines]
    names = [speed.plan for speed in pipelines]
    alone = images * seconds[0]
    if deadline is None or alone <= deadline:
        return Forecast(images=images, deadline_s=deadline, seconds=alone, plans={names[0]: images}, fits=True)
    for plan in range(1, len(seconds)):
        if images * seconds[plan] <= deadline:
            spare = deadline - images * seconds[plan]
            better = int(spare / (seconds[plan - 1] - seconds[plan])) if seconds[plan - 1] > seconds[plan] else 0
            shares = {names[plan - 1]: better, names[plan]: images - better}
            return Forecast(images=images, deadline_s=deadline, seconds=alone, plans=shares, fits=True)
    return Forecast(images=images, deadline_s=deadline, seconds=alone, plans={}, fits=False)


def _listed(options: BenchOptions) -> list[Path]:
    if options.source is not None and options.data is not None:
        raise UsageError("give the images with --data or with --source, not both")
    if options.source is not None:
        return list_images(options.source)
    if options.data is not None:
        found = [record.path for record in ContestData(options.data).test_images() if record.path is not None]
        if not found:
            raise DataError(f"{options.data}: none of its test images has a file")
        return found
    return []


def _canvas(backend: Backend, path: Path, imgsz: int) -> ImageArray:
    image = read_image(path)
    return fit_letterbox((image.shape[0], image.shape[1]), imgsz, backend).apply(image)


def _batch(canvas: ImageArray, size: int) -> ImageArray:
    return np.repeat(canvas[None], size, axis=0)


def _limit(
    backend: Backend, path: Path, canvas: ImageArray, fastest: Throughput, options: BenchOptions
) -> Limit | None:
    """None where the graph or the device is not one that this can be said of."""
    from importlib.util import find_spec

    from parkdet.runtime.flops import count_flops, matrix_peak

    if path.suffix.lower() not in (".onnx", ".xml") or find_spec("openvino") is None:
        return None
    if (options.how.get("device") or "cpu") != "cpu":
        return None
    flops = count_flops(path, (1, canvas.shape[0], canvas.shape[1]))
    peak = matrix_peak(backend.precision, options.how.get("threads") or available_cpus())
    return Limit(gflop_an_image=flops / 1e9, peak_gflop_per_s=peak / 1e9, share=flops * fastest.images_per_s / peak)


def _lines(report: BenchReport) -> list[str]:
    stages = report.stages
    height, width = report.canvas_hw
    lines = [
        f"{report.weights} on {report.backend} in {report.precision}; {report.machine}",
        f"canvas {height} x {width}; {report.sample}",
        "",
        "batch   latency p50   p90   p99 ms   images/s",
    ]
    for latency, throughput in zip(report.latency, report.throughput, strict=True):
        lines.append(
            f"{latency.batch:5} {latency.p50_ms:13.1f} {latency.p90_ms:5.1f} {latency.p99_ms:5.1f} "
            f"{throughput.images_per_s:13.2f}"
        )
    first = report.pipelines[0]
    lines += [
        "",
        "ms an image, alone: "
        f"decode {stages.decode_ms:.1f}, letterbox {stages.letterbox_ms:.1f}, post-processing {stages.post_ms:.1f} on "
        f"one processor; model {stages.model_ms:.1f} on {stages.cpus}",
        f"pipeline: {first.images_per_s:.2f} images/s, {1000 / first.images_per_s / stages.bound_ms:.2f} times the "
        f"lower bound of {stages.bound_ms:.1f} ms (model, and decoding over {stages.cpus}); "
        f"bottleneck: {first.bottleneck}",
        f"peak memory: {report.peak_memory_mb:,.0f} MB",
    ]
    if report.limit is not None:
        lines.append(
            f"limit: {report.limit.gflop_an_image:,.1f} GFLOP an image, {100 * report.limit.share:.0f} % of the "
            f"{report.limit.peak_gflop_per_s:,.0f} GFLOP/s that a large convolution reaches here"
        )
    if report.comparison is not None:
        c = report.comparison
        lines.append(
            f"{c.ratio:.2f} times the images/s of {report.vs} (from {c.lowest:.2f} to {c.highest:.2f} in {c.rounds} "
            "rounds in turn)"
        )
    if report.forecast is not None:
        lines += _forecast_lines(report.forecast, report.pipelines)
    return lines


def _forecast_lines(job: Forecast, pipelines: Sequence[PipelineSpeed]) -> list[str]:
    lines = ["", f"{job.images:,} images:"]
    lines += [f"  {_clock(job.images / speed.images_per_s):>9}  all by {speed.plan}" for speed in pipelines]
    if job.deadline_s is not None:
        shares = ", ".join(f"{images:,} by {plan}" for plan, images in job.plans.items() if images)
        lines.append(f"in {_clock(job.deadline_s)}: {shares or 'not by any plan'}")
    return lines


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"

"""How fast an artifact is here: latency, throughput, each stage of the pipeline, memory, distance to the limit."""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parkdet.runtime.backends.base import Backend, available_cpus
from parkdet.runtime.canvas_choice import fit_letterbox
from parkdet.runtime.errors import DataError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.images import read_image
from parkdet.runtime.loading import ImageItem, single_threaded_cv2
from parkdet.runtime.pipeline import Pipeline, PipelineSettings, Plan
from parkdet.runtime.post_processing import post_process
from parkdet.runtime.store import RunStore

WARM_UP_RUNS = 2
SAMPLE_IMAGES = 32
"""Images that stages are timed on; they are run again and again."""
_DRAWN = (8, 1080, 1920)
"""Number, height and width of the images that are drawn when none are given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One call of the model after the other."""

    batch: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """As many calls of the model at once as it is made for."""

    batch: int
    images_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpeeds:
    """Milliseconds an image of each stage alone, on one processor but for the model's."""

    decode_ms: float
    letterbox_ms: float
    post_ms: float
    model_ms: float
    """An image's share of the time with all of the model's calls at once."""
    cpus: int

    @property
    def bound_ms(self) -> float:
        """What an image takes at least: the model alone on all processors, and decoding spread over them."""
        return self.model_ms + self.decode_ms / self.cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpeed:
    """The whole pipeline on the sample's images."""

    plan: str
    images: int
    images_per_s: float
    bottleneck: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Throughput of one artifact over another's, measured in turn."""

    ratio: float
    """Median of the rounds."""
    lowest: float
    highest: float
    rounds: int


def measure_latency(backend: Backend, canvases: ImageArray, seconds: float) -> Latency:
    """Call the model for so long, at least ten times, after a warm-up."""
    for _ in range(WARM_UP_RUNS):
        backend.infer(canvases)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < end:
        started = time.perf_counter()
        backend.infer(canvases)
        times.append(1000 * (time.perf_counter() - started))
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    return Latency(batch=len(canvases), runs=len(times), p50_ms=float(p50), p90_ms=float(p90), p99_ms=float(p99))


def measure_throughput(backend: Backend, canvases: ImageArray, seconds: float) -> Throughput:
    """Call the model from as many threads as it is made for, after a warm-up of each."""
    with ThreadPoolExecutor(backend.parallel) as pool:
        list(pool.map(lambda _: backend.infer(canvases), range(WARM_UP_RUNS * backend.parallel)))
        started = time.perf_counter()

        def work(_: int) -> int:
            calls = 0
            while calls == 0 or time.perf_counter() - started < seconds:
                backend.infer(canvases)
                calls += 1
            return calls

        calls = sum(pool.map(work, range(backend.parallel)))
        elapsed = time.perf_counter() - started
    return Throughput(batch=len(canvases), images_per_s=calls * len(canvases) / elapsed)


def compare(
    one: tuple[Backend, ImageArray], other: tuple[Backend, ImageArray], seconds: float, rounds: int = 7
) -> Comparison:
    """One backend's throughput, on canvases of its own, over the other's, in turn: what else runs here meets both."""
    ratios = []
    for _ in range(rounds):
        speeds = [measure_throughput(*side, seconds / rounds).images_per_s for side in (one, other)]
        ratios.append(speeds[0] / speeds[1])
    return Comparison(ratio=statistics.median(ratios), lowest=min(ratios), highest=max(ratios), rounds=rounds)


def measure_stages(
    backend: Backend, paths: Sequence[Path], settings: PipelineSettings, images_per_s: float
) -> StageSpeeds:
    """Each stage on the sample, one image after the other; `images_per_s` is the model's throughput."""
    seconds = dict.fromkeys(("decode", "letterbox", "post"), 0.0)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[stage] += time.perf_counter() - started

    with single_threaded_cv2():
        for path in paths:
            with timed("decode"):
                image = read_image(path)
            letterbox = fit_letterbox((image.shape[0], image.shape[1]), settings.imgsz, backend)
            with timed("letterbox"):
                canvas = letterbox.apply(image)
            heads = backend.infer(canvas[None])
            with timed("post"):
                post_process(heads, backend.spec, settings.nms, [letterbox])
    return StageSpeeds(
        decode_ms=1000 * seconds["decode"] / len(paths),
        letterbox_ms=1000 * seconds["letterbox"] / len(paths),
        post_ms=1000 * seconds["post"] / len(paths),
        model_ms=1000 / images_per_s,
        cpus=available_cpus(),
    )


def measure_pipeline(plan: Plan, paths: Sequence[Path], settings: PipelineSettings, seconds: float) -> PipelineSpeed:
    """Run the sample through the whole pipeline, again and again for about so long, into a folder that is removed."""
    pipeline = Pipeline(plan.backend, settings, [plan])

    def run(images: int) -> tuple[float, str]:
        items = [
            ImageItem(image_id=number, file_name=path.name, path=path)
            for number, path in enumerate(paths[i % len(paths)] for i in range(images))
        ]
        with tempfile.TemporaryDirectory(prefix="parkdet-bench-") as folder, RunStore(folder, {}) as store:
            report = pipeline.run(items, store)
        return report.seconds, report.times.bottleneck()

    few = max(2 * pipeline.parallel * settings.batch_size, 4)
    run(few)  # compiles
    guess = run(few)[0] / few
    images = max(int(seconds / guess), few)
    elapsed, bottleneck = run(images)
    return PipelineSpeed(plan=plan.name, images=images, images_per_s=images / elapsed, bottleneck=bottleneck)


def sample(source: Path | None, listed: Sequence[Path], folder: Path) -> tuple[list[Path], str]:
    """Images to measure on, and what they are in words: the user's, else drawn ones written into `folder`.

    Those of the user's that cannot be read are left out. DataError when none can.
    """
    if listed:
        step = max(len(listed) // SAMPLE_IMAGES, 1)
        chosen = listed[::step][:SAMPLE_IMAGES]
        paths, errors = [], []
        for path in chosen:
            try:
                read_image(path)
                paths.append(path)
            except DataError as error:
                errors.append(error)
        if not paths:
            raise errors[0]
        left_out = f" ({len(errors)} more could not be read)" if errors else ""
        return paths, f"{len(paths)} images of {source}{left_out}"
    import cv2

    count, height, width = _DRAWN
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        small = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
        image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        noisy = np.clip(image + rng.integers(-6, 7, image.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.png")
        paths[-1].write_bytes(cv2.imencode(".png", noisy)[1].tobytes())
    return paths, f"{count} drawn PNGs of {width} x {height}"


def reset_peak_memory() -> None:
    """From here on `peak_memory_bytes` counts anew, where the system lets it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The most memory that the process had at once since the last reset, or since it began."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

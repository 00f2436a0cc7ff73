"""`parkdet submit` against the reference's cut, ten times as many detections, and thresholds by class on images held
back.

Run with `./dev benchmarks tests/submission/test_bench.py`. The reference's code is not part of this project: its cut is
modelled here after its description. It starts at the confidence of the inference and raises it by 0.01 until the
file is small enough; at every step it writes the whole list of dicts with `json.dump`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from parkdet.runtime.shards import ImageResult
from parkdet.runtime.store import RunStore
from parkdet.submission.lines import SubmissionFormat
from parkdet.submission.tune import Validation, tune

LIMIT = 20_000_000
FIRST_IMAGE, IMAGES = 10_000, 19_521
IMAGES_A_SHARD = 1024
SUBMIT = """
import re, sys
from pathlib import Path
from parkdet.cli.main import main
code = main()
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
"""The command, and the most memory that it had in KiB. (`ru_maxrss` would be no less than what this process had when
it started the other one.)"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contest's data folder without its images, whose sizes the JSON gives."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("train/label", "test/images"):
        (root / folder).mkdir(parents=True)
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 15)]
    empty = {"images": [], "annotations": [], "categories": categories}
    (root / "train" / "label" / "Train.json").write_text(json.dumps(empty))
    images = [
        {"id": number, "file_name": f"{number}.png", "width": 1920, "height": 1080}
        for number in range(FIRST_IMAGE, FIRST_IMAGE + IMAGES)
    ]
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": images}))
    return root


def write_run(folder: Path, table: pl.DataFrame) -> Path:
    """The table as `parkdet infer` stores it."""
    columns = {name: table[name].to_numpy() for name in table.columns}
    starts = np.searchsorted(columns["image_id"], np.arange(FIRST_IMAGE, FIRST_IMAGE + IMAGES + 1))
    with RunStore(folder, {"model": "bench"}) as store:
        for first in range(0, IMAGES, IMAGES_A_SHARD):
            results = []
            for image in range(first, min(first + IMAGES_A_SHARD, IMAGES)):
                rows = slice(starts[image], starts[image + 1])
                results.append(
                    ImageResult(
                        image_id=FIRST_IMAGE + image,
                        file_bytes=1,
                        xywh=np.stack([columns[name][rows] for name in "xywh"], axis=1),
                        scores=columns["score"][rows],
                        category_ids=columns["category_id"][rows],
                    )
                )
            store.write(results, [])
    return folder


def reference_cut(table: pl.DataFrame, path: Path) -> tuple[float, int, int]:
    """Seconds, rewrites and detections kept of the cut as described above; the dicts exist before the clock starts."""
    detections = [
        {
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [round(x, 1), round(y, 1), round(w, 1), round(h, 1)],
            "score": round(score, 4),
            "segmentation": [],
        }
        for image_id, category_id, x, y, w, h, score in table.iter_rows()
    ]
    started = time.perf_counter()
    confidence, rewrites = 0.01, 0
    while True:
        kept = [detection for detection in detections if detection["score"] >= confidence]
        with path.open("w") as file:
            json.dump(kept, file)
        rewrites += 1
        if path.stat().st_size < LIMIT:
            return time.perf_counter() - started, rewrites, len(kept)
        confidence += 0.01


def submit(run: Path, data: Path) -> tuple[float, float, int, int]:
    """Seconds and most MiB of the whole process, detections kept and bytes of `parkdet submit`."""
    command = [sys.executable, "-P", "-c", SUBMIT, "submit", "--predictions", run, "--data", data]
    started = time.perf_counter()
    out = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    seconds = time.perf_counter() - started
    kept = next(line for line in out if line.startswith("kept"))
    size = (run / "submission.json").stat().st_size
    assert size < LIMIT
    return seconds, int(out[-1]) / 1024, int(kept.split()[-1].replace(",", "")), size


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_against_the_reference(tmp_path: Path, data: Path, random_table: Callable[..., pl.DataFrame]) -> None:
    table = random_table(976_050)
    run = write_run(tmp_path / "run", table)
    ours = min(submit(run, data) for _ in range(3))
    seconds, rewrites, kept = reference_cut(table, tmp_path / "reference.json")
    after = min(submit(run, data) for _ in range(2))
    best = min(ours, after)
    print(
        f"\n{table.height:,} detections, {os.cpu_count()} processors.\n"
        f"The reference's cut: {seconds:.1f} s, {rewrites} rewrites, {kept:,} kept, "
        f"{(tmp_path / 'reference.json').stat().st_size:,} bytes.\n"
        f"parkdet submit, the whole process: {ours[0]:.2f} s before and {after[0]:.2f} s after it, {best[2]:,} kept, "
        f"{best[3]:,} bytes, {best[1]:.0f} MiB. Ratio {seconds / max(ours[0], after[0]):.0f}."
    )


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_ten_million(tmp_path: Path, data: Path, random_table: Callable[..., pl.DataFrame]) -> None:
    for count in (976_050, 10_000_000):
        run = write_run(tmp_path / str(count), random_table(count))
        seconds, memory, kept, size = submit(run, data)
        print(f"\n{count:,} detections: {seconds:.2f} s, {memory:.0f} MiB, {kept:,} kept, {size:,} bytes")


CLASS_SHARES = np.array([55, 20, 8, 3, 0.4, 4, 1, 5, 0.6, 1.2, 0.3, 0.8, 0.2, 0.5]) / 100


def drawn(images: int, seed: int) -> Validation:
    """Detections of a model that knows its classes unequally well, and their truth: 5.5 boxes an image, most of them
    of the first class, as in the contest."""
    rng = np.random.default_rng(seed)
    skill = np.random.default_rng(7).uniform(0.3, 0.95, 14)
    owner = np.repeat(np.arange(images), rng.poisson(5.5, images))
    category = rng.choice(14, len(owner), p=CLASS_SHARES / CLASS_SHARES.sum())
    wh = rng.gamma(2, (60, 40), (len(owner), 2)).clip(8, 600)
    xy = rng.random((len(owner), 2)) * (np.array([1920, 1080]) - wh)
    score = rng.beta(6 * skill[category], 6 * (1 - skill[category]))
    blur = (0.02 + 0.12 * (1 - score) * rng.random(len(owner)))[:, None]
    parts = []
    for guess in range(4):
        # The right class first, then others with lower scores and worse boxes.
        named = category if not guess else rng.choice(14, len(owner), p=CLASS_SHARES**0.5 / (CLASS_SHARES**0.5).sum())
        sure = score if not guess else score * rng.beta(0.6, 5, len(owner))
        noise = rng.normal(0, 1, (len(owner), 4)) * blur * (1.5 if guess else 1)
        parts.append((owner, named, xy + noise[:, :2] * wh, wh * np.exp(noise[:, 2:]), sure))
    count = images * 28
    loose = rng.gamma(2, (60, 40), (count, 2)).clip(8, 600)
    named = rng.choice(14, count, p=CLASS_SHARES**0.7 / (CLASS_SHARES**0.7).sum())
    places = rng.random((count, 2)) * (np.array([1920, 1080]) - loose)
    parts.append((rng.integers(0, images, count), named, places, loose, rng.beta(0.25, 6, count)))
    image_id, category_id, corner, size, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    table = pl.DataFrame(
        {
            "image_id": image_id,
            "category_id": category_id + 1,
            **{name: values.astype(np.float32) for name, values in zip("xywh", (*corner.T, *size.T), strict=True)},
            "score": scores.astype(np.float32),
        }
    ).filter(pl.col("score") > 0.01)
    boxes = [
        {"id": number, "image_id": int(image), "category_id": int(named) + 1, "bbox": [*map(float, (*a, *b))]}
        for number, (image, named, a, b) in enumerate(zip(owner, category, xy, wh, strict=True))
    ]
    truth = {
        "images": [{"id": number} for number in range(images)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, 15)],
        "annotations": boxes,
    }
    weights = {"map50": 0.1, "map75": 0.9}
    return Validation(table=table, truth=truth, weights=weights, max_det=50, form=SubmissionFormat())


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_thresholds_by_class_on_images_held_back() -> None:
    test = drawn(8000, 1)
    print(
        "\nimages to tune on, limit for 8,000 test images: test metric with one threshold, with one a class (held out)"
    )
    for images in (100, 500, 3000):
        validation = drawn(images, images)
        for limit in (2_000_000, 4_000_000, 8_000_000):
            tuning = tune(validation, limit, 8000)
            single, by_class = (test.metric_of(test.cut(limit, prices).kept) for prices in (None, tuning.prices))
            used = "used" if tuning.wins else "not used"
            promised = f"{tuning.single:.4f}, {tuning.held_out[tuning.estimate]:.4f} promised, {used}"
            print(f"{images:>6,} {limit:>10,}: {single:.4f} {by_class:.4f}  ({promised}: {tuning.estimate})")

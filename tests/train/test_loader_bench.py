"""Images a second from one loader process, beside YOLOv5's own loader where there is a checkout of it.

    PARKDET_YOLOV5=DIR PARKDET_YOLOV5_PYTHON=python ./dev benchmarks tests/train/test_loader_bench.py

The images are drawn: smooth colours with the grain of a camera, so that a PNG of them is as long as a photograph's.
Each file has several names, which makes a set too large for either loader to keep.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from parkdet.runtime.images import read_image
from parkdet.train.data.augment import AugmentSettings, to_long_side
from parkdet.train.data.image_store import CacheMode
from parkdet.train.data.loader import TrainingLoader, TrainingSet
from parkdet.train.data.samples import Sample

IMGSZ, BATCH, SECONDS, ROUNDS = 640, 16, 12.0, 3
WARM_UP = 320
"""Images before the clock starts: the first of an epoch are dearer for us, of a contest's 21,650 it is no matter."""
KINDS = {
    "1080p PNG": (".png", (1080, 1920), 60),
    "1080p JPEG": (".jpg", (1080, 1920), 120),
    "640 x 480 JPEG": (".jpg", (480, 640), 300),
}
NAMES = 2400
"""Images of a set, each file counted by its names."""

YOLOV5 = """
import logging, random, sys, time
folder, imgsz, batch, seconds = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
sys.path.insert(0, ".")
import numpy as np, torch, yaml
from utils.dataloaders import create_dataloader
logging.disable(logging.INFO)
random.seed(0), np.random.seed(0), torch.manual_seed(0)
hyp = yaml.safe_load(open("data/hyps/hyp.scratch-low.yaml", encoding="utf-8"))
loader, dataset = create_dataloader(folder, imgsz, batch, 32, hyp=hyp, augment=True, workers=1, shuffle=True)
batches = iter(loader)
next(batches)
count, start = 0, time.perf_counter()
while (spent := time.perf_counter() - start) < seconds:
    count += len(next(batches)[0])
print("images/s", count / spent)
"""


def draw(path: Path, hw: tuple[int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (hw[0] // 40, hw[1] // 40, 3)).astype(np.float32)
    image = cv2.resize(colours, hw[::-1], interpolation=cv2.INTER_CUBIC) + random.normal(0, 3, (*hw, 3))
    encoded = cv2.imencode(path.suffix, np.clip(image, 0, 255).astype(np.uint8))[1]
    path.write_bytes(encoded.tobytes())


def draw_set(folder: Path, kind: str) -> list[Sample]:
    """The samples of a set, with boxes in YOLOv5's text files beside."""
    suffix, hw, files = KINDS[kind]
    images, labels = folder / "images", folder / "labels"
    images.mkdir()
    labels.mkdir()
    samples = []
    for number in range(NAMES):
        path = images / f"{number:05}{suffix}"
        if number < files:
            draw(path, hw, number)
        else:
            path.hardlink_to(images / f"{number % files:05}{suffix}")
        corners = np.sort(np.random.default_rng(number).uniform(0, 1, (6, 2, 2)), axis=1).reshape(6, 4)
        shares = np.concatenate(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), axis=1)
        text = "".join(f"0 {' '.join(f'{share:.6f}' for share in row)}\n" for row in shares)
        (labels / f"{number:05}.txt").write_text(text, encoding="utf-8")
        xyxy = (corners * np.tile(hw[::-1], 2)).astype(np.float32)
        samples.append(Sample(number, path, hw, np.zeros(6, np.int32), xyxy))
    return samples


def ours(samples: list[Sample], cache: CacheMode = "none", seconds: float = SECONDS) -> float:
    """Images a second in the middle of an epoch: mosaic, affine, HSV and flip, one worker."""
    source = TrainingLoader(TrainingSet(samples, IMGSZ, AugmentSettings(), 0, cache), batch_size=BATCH, workers=1)
    made = (batch for epoch in range(1000) for batch in source.epoch(epoch))
    count = -WARM_UP
    start = time.perf_counter()
    for batch in made:
        if count <= 0:
            start = time.perf_counter()
        count += len(batch.images)
        if (spent := time.perf_counter() - start) > seconds and count > 0:
            break
    source.close()
    return count / spent


def yolov5s(folder: Path) -> float:
    """Images a second of the reference, of any part of an epoch: none is dearer than another."""
    done = subprocess.run(
        [os.environ["PARKDET_YOLOV5_PYTHON"], "-c", YOLOV5, folder / "images", str(IMGSZ), str(BATCH), str(SECONDS)],
        check=False, cwd=os.environ["PARKDET_YOLOV5"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("images/s")[1])


@pytest.mark.bench
@pytest.mark.parametrize("kind", KINDS)
def test_images_a_second(tmp_path: Path, kind: str) -> None:
    samples = draw_set(tmp_path, kind)
    if "PARKDET_YOLOV5" not in os.environ:
        print(f"\n{kind}: {ours(samples):.1f} images/s (no PARKDET_YOLOV5 to compare with)")
        return
    pairs = np.array([(ours(samples), yolov5s(tmp_path)) for _ in range(ROUNDS)])
    ratios = pairs[:, 0] / pairs[:, 1]
    print(
        f"\n{kind}: {np.median(pairs[:, 0]):.1f} images/s, YOLOv5 {np.median(pairs[:, 1]):.1f}: "
        f"{np.median(ratios):.2f} times (in turn: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )


@pytest.mark.bench
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_images_a_second_from_a_cache(tmp_path: Path, cache: CacheMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kind = "640 x 480 JPEG"
    print(f"\n{kind}, cache={cache}: {ours(draw_set(tmp_path, kind)[:600], cache):.1f} images/s")


@pytest.mark.bench
def test_how_near_scaled_jpegs_come_to_the_average(tmp_path: Path) -> None:
    """Mean difference from decoding all pixels and averaging over areas, as validation and inference do."""
    nearness = []
    for number in range(8):
        path = tmp_path / f"{number}.jpg"
        draw(path, (1080, 1920), number)
        whole = read_image(path)
        area = cv2.resize(whole, (640, 360), interpolation=cv2.INTER_AREA).astype(float)
        reduced = to_long_side(read_image(path, least_hw=(360, 640)), (360, 640))
        nearness.append([np.abs(area - image).mean() for image in (reduced, to_long_side(whole, (360, 640)))])
    reduced_error, linear = np.mean(nearness, axis=0)
    print(f"\n1080p JPEG to 640 px: {reduced_error:.2f} grey levels from the average; all pixels, linear: {linear:.2f}")

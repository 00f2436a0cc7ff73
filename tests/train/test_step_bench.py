"""Seconds of a training step, beside YOLOv5's where there is a checkout of it: same model, batch, images and boxes.

    PARKDET_YOLOV5=DIR PARKDET_YOLOV5_PYTHON=python ./dev benchmarks tests/train/test_step_bench.py

A step is forward, loss, backward, clipping, SGD and the average, in float32. Each side runs in processes of its own, in
turn; the loader is not part of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROUNDS, SECONDS = 3, 8.0

DATA = """
import sys, time
model, imgsz, batch, seconds = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
import numpy as np, torch
random = np.random.default_rng(0)
images = torch.from_numpy(random.integers(0, 256, (batch, 3, imgsz, imgsz), dtype=np.uint8))
boxes = np.concatenate((random.uniform(0.2, 0.8, (8 * batch, 2)), random.uniform(0.02, 0.3, (8 * batch, 2))), axis=1)
rows = np.column_stack((np.repeat(np.arange(batch), 8), random.integers(0, 14, 8 * batch), boxes))
targets = torch.from_numpy(rows.astype(np.float32))
"""
TIMED = """
step(), step()
count, start = 0, time.perf_counter()
while (spent := time.perf_counter() - start) < seconds:
    step()
    count += 1
print("seconds", spent / count)
"""
OURS = f"""
from parkdet.train.cli import let_waiting_threads_sleep
let_waiting_threads_sleep()
{DATA}
from parkdet.train.config import TrainSettings
from parkdet.train.learner import Learner
from parkdet.train.model.network import build_network
from parkdet.train.schedule import StepPlan
settings = TrainSettings(imgsz=imgsz, batch_size=batch, nominal_batch=batch, precision=sys.argv[5])
network = build_network(model, [str(number) for number in range(14)], imgsz)
learner = Learner(network, settings, settings.weight_decay, torch.device("cpu"))
learner.network.train()
plan, number = StepPlan(bias_lr=0.01, lr=0.01, momentum=0.937, accumulate=1), iter(range(10**9))
def step():
    at = next(number)
    learner.take_in(images, targets, plan, at).tolist()
    learner.step_if_due(plan, at)
{TIMED}"""
YOLOV5 = f"""
import pathlib, sys
sys.path.insert(0, ".")
{DATA}
import logging, yaml
from models.yolo import Model
from utils.loss import ComputeLoss
from utils.torch_utils import ModelEMA, smart_optimizer
logging.disable(logging.INFO)
network = Model(next(pathlib.Path("models").rglob(model + ".yaml")), ch=3, nc=14)
network.hyp = yaml.safe_load(open("data/hyps/hyp.scratch-low.yaml", encoding="utf-8"))
network.nc = 14
optimizer, average = smart_optimizer(network, "SGD", 0.01, 0.937, 0.0005), ModelEMA(network)
loss_of = ComputeLoss(network)
network.train()
def step():
    loss, parts = loss_of(network(images.float() / 255), targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm=10.0)
    optimizer.step()
    optimizer.zero_grad()
    average.update(network)
    parts.tolist()
{TIMED}"""


def seconds(python: str, program: str, model: str, imgsz: int, batch: int, precision: str, folder: Path) -> float:
    done = subprocess.run(
        [python, "-c", program, model, str(imgsz), str(batch), str(SECONDS), precision],
        check=False, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("seconds")[1])


@pytest.mark.bench
@pytest.mark.parametrize(("model", "imgsz", "batch"), [("yolov5n", 320, 16), ("yolov5s", 640, 4), ("yolov5n6", 640, 4)])
def test_seconds_a_step(tmp_path: Path, model: str, imgsz: int, batch: int) -> None:
    about = (model, imgsz, batch)
    if "PARKDET_YOLOV5" not in os.environ:
        measured = seconds(sys.executable, OURS, *about, "fp32", tmp_path)
        print(f"\n{model}, {imgsz} px, batch {batch}: {measured:.3f} s (no PARKDET_YOLOV5 to compare with)")
        return
    other, folder = os.environ["PARKDET_YOLOV5_PYTHON"], Path(os.environ["PARKDET_YOLOV5"])
    rounds = [
        (
            seconds(sys.executable, OURS, *about, "fp32", tmp_path),
            seconds(other, YOLOV5, *about, "fp32", folder),
            seconds(sys.executable, OURS, *about, "fast", tmp_path),
        )
        for _ in range(ROUNDS)
    ]
    ours, theirs, fast = np.median(rounds, axis=0)
    ratios = ", ".join(f"{reference / own:.2f}" for own, reference, _ in rounds)
    print(
        f"\n{model}, {imgsz} px, batch {batch}: {ours:.3f} s (precision=fast: {fast:.3f}), YOLOv5 {theirs:.3f} s: "
        f"{theirs / ours:.2f} times as fast (in turn: {ratios})"
    )

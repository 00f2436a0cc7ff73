"""Runs killed with SIGKILL at random moments, resumed, and compared to the bit with runs that were left alone."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from parkdet.runtime.errors import UsageError
from parkdet.runtime.settings import dump_settings, settings_from_yaml
from parkdet.train.config import load_recipe
from parkdet.train.run import ARGS_FILE, RunSettings, resume_run, start_run

RECIPE = """
base: small.yaml
model: yolov5n
train:
  imgsz: 64
  batch_size: 4
  nominal_batch: 12
  epochs: 4
  cache: none
  precision: fp32
  patience: 0
  save_minutes: 0.001
  mosaic_window: 8
  image_weights: true
stages:
- {name: baseline}
- {name: finetune, epochs: 2, lr0: 0.003, image_weights: false, mixup: 0.5, multi_scale: true, optimizer: AdamW}
"""


def write_data(root: Path) -> Path:
    """30 images of 48 x 64 with two boxes each."""
    (root / "train" / "images").mkdir(parents=True)
    (root / "train" / "label").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(30):
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        pixels = cv2.resize(small, (64, 48))
        (root / "train" / "images" / f"{number}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        images.append({"id": number, "file_name": f"{number}.png"})
        for which in range(2):
            x, y = rng.uniform(0, 30, 2).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": which + 1, "bbox": [x, y, 20, 15]}
            )
    content = {"images": images, "annotations": annotations}
    (root / "train" / "label" / "Train.json").write_text(json.dumps(content))
    return root


def go_on(folder: Path, settings: str) -> None:
    """What the killed process does: begin, or resume what is there."""
    torch.set_num_threads(1)
    if (folder / ARGS_FILE).exists():
        # It may have been killed between its last write and its end.
        with contextlib.suppress(UsageError):
            resume_run(folder, print)
    else:
        folder.mkdir(exist_ok=True)
        start_run(folder, settings_from_yaml(RunSettings, settings, "settings"), print)


def started(folder: Path, settings: str) -> BaseProcess:
    # A server that has torch in memory already: what is killed is a training, not an import.
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=go_on, args=(folder, settings))
    process.start()
    return process


def start_server() -> None:
    """Let the server import what it needs, so that no run's time has that in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.tensorboard", "parkdet.train.run", __name__])
    process = context.Process(target=time.monotonic)
    process.start()
    process.join()


def saved_place(folder: Path) -> tuple[str, int, int]:
    """Stage, epoch and batch from which a run would go on."""
    for stage in ("finetune", "baseline"):
        last = folder / stage / "weights" / "last.pt"
        if last.exists():
            training = torch.load(last, weights_only=True)["training"]
            return stage, int(training["epoch"]), int(training.get("state", {}).get("batch", -1))
    return "", 0, 0


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint, by its place."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {place: tensor for key, inner in items for place, tensor in tensors(inner, f"{path}/{key}").items()}


@pytest.mark.slow
@pytest.mark.timeout(900)  # some forty seconds on two cores, minutes where they are shared
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    # Other moments every time: what they were is printed where the test fails.
    seed = random.randrange(2**32)
    print(f"kills of seed {seed}")
    killed_and_compared(tmp_path, kills=20, seed=seed)


def wait_until(true: Callable[[], bool], process: BaseProcess, seconds: float) -> None:
    """Return when something is true, the process has ended, or so many seconds are over."""
    give_up = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < give_up and not true():
        time.sleep(0.0005)


def saves(folder: Path) -> list[int]:
    """When the checkpoints of a run were written, which changes with every save."""
    return [path.stat().st_mtime_ns for path in sorted(folder.glob("*/weights/last.pt"))]


def half_written(process: BaseProcess, folder: Path) -> bool:
    return any(folder.glob(f"*/weights/.*.pt.{process.pid}.tmp"))


def killed_and_compared(folder: Path, kills: int, seed: int) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    run_settings = RunSettings(
        data=str(write_data(folder / "data")), device="cpu", workers=1, recipe=load_recipe(str(recipe))
    )
    settings = dump_settings(run_settings)
    alone, killed = folder / "alone", folder / "killed"
    start_server()
    begun = time.monotonic()
    process = started(alone, settings)
    process.join()
    assert process.exitcode == 0
    whole = time.monotonic() - begun

    moments = random.Random(seed)
    places: list[tuple[str, int, int]] = []
    writes = 0
    while True:
        process = started(killed, settings)
        if len(places) < kills:
            if len(places) % 4 == 0:
                # Any time, its start among them.
                process.join(moments.uniform(0, 0.3) * whole)
            else:
                # It has come further than the one before: by a batch at least, by few.
                at_start = saves(killed)
                wait_until(lambda: saves(killed) != at_start, process, 60)  # noqa: B023 - called at once
                process.join(moments.uniform(0, 0.15))
            if len(places) % 2:
                wait_until(lambda: half_written(process, killed), process, 1)  # noqa: B023 - called at once
        else:
            process.join()
        if not process.is_alive():
            break
        process.kill()
        process.join()
        writes += half_written(process, killed)
        places.append(saved_place(killed))
    assert process.exitcode == 0
    assert len(places) >= 10, places
    assert len(set(places)) >= 5, places
    print(f"{len(places)} kills, {writes} of them within a write, at {places}")
    assert writes >= 1
    for stage in ("baseline", "finetune"):
        for name in ("last.pt", "best.pt"):
            first, second = (
                tensors(torch.load(run / stage / "weights" / name, weights_only=True)) for run in (alone, killed)
            )
            assert first.keys() == second.keys()
            for place, tensor in first.items():
                assert torch.equal(tensor, second[place]), f"{stage}/{name}{place}"
        texts = [(run / stage / "results.csv").read_text() for run in (alone, killed)]
        assert texts[0] == texts[1]
        assert len(list(csv.reader(texts[0].splitlines()))) >= 3
        assert (alone / stage / "labels.jpg").is_file() and list((alone / stage).glob("events.out.*"))
        assert [path.name for path in (killed / stage / "weights").glob(".*")] == []

"""Drawn scenes as a data set in the contest's layout, written by several processes, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from parkdet.runtime.backends.base import available_cpus
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.terminal import interrupts_held_back
from parkdet.train.data.scene_render import draw_scene

CLASS_NAMES = (
    "sedan",
    "SUV",
    "van",
    "bus",
    "school bus",
    "truck",
    "taxi",
    "adult",
    "child",
    "motorcycle",
    "kickboard",
    "bicycle",
    "stroller",
    "cart",
)
"""The contest's classes in category order; category ids count from 1."""

EMPTY_EVERY = 40
"""One scene in so many is a lot without any object: background."""
FIRST_TEST_ID = 100_001
_BATCH = 4
_PLACES = ("경기도", "서울특별시", "인천광역시", "부산광역시", "대전광역시", "강원도")
_WEATHER = {"clear": "맑음", "cloudy": "흐림", "rain": "비"}
_TIMES = {"day": "주간", "dusk": "일몰", "night": "야간"}
_SIDES = ("left", "right", "front")


@dataclass(frozen=True, slots=True)
class _Order:
    """One picture to draw: enough for any process to draw the same."""

    seed: int
    split: int
    """0 train, 1 test."""
    index: int
    empty: bool


@dataclass(frozen=True, slots=True)
class _Drawn:
    file_name: str
    xyxy: tuple[tuple[float, float, float, float], ...]
    class_ids: tuple[int, ...]


def write_demo_data(
    folder: Path,
    train: int = 600,
    test: int = 100,
    *,
    seed: int = 0,
    size_hw: tuple[int, int] = (540, 960),
    workers: int | None = None,
    on_drawn: Callable[[int, int], None] | None = None,
) -> None:
    """Draw `train` and `test` scenes into `folder`, in the contest's layout.

    `test_ground_truth.json` beside the contest's own files is the truth of the test pictures, COCO format. The
    bytes depend on the counts, the seed and the size only, not on `workers` (default: one a CPU). The work goes on
    in a folder beside and is renamed at the end: an interruption leaves nothing. `on_drawn(done, total)` is called
    in this process after each picture.

    Raises UsageError when `folder` is there and not empty, or a number is out of range, DataError when a file
    cannot be written.
    """
    if train < 1 or test < 1 or min(size_hw) < 64:
        raise UsageError(
            f"{folder}: cannot draw {train} training and {test} test pictures of {size_hw[1]} x {size_hw[0]}; "
            "give at least one of each, of at least 64 pixels a side"
        )
    if workers is not None and workers < 1:
        raise UsageError(f"{folder}: {workers} processes cannot draw; give at least 1")
    folder = Path(folder)
    try:
        with _written_beside(folder) as unfinished:
            drawn = _draw_all(
                _orders(train, test, seed), unfinished, size_hw, workers or available_cpus(), on_drawn or _ignore
            )
            _write_lists(unfinished, drawn[:train], drawn[train:], size_hw)
    except BrokenProcessPool as error:
        raise DataError(
            f"{folder}: a drawing process died, perhaps for want of memory; try again with fewer workers"
        ) from error
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}; free space or choose another folder") from error


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the work inside succeeds and vanishes when not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not an empty folder; remove it or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's folders are for their owner only
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _ignore(_done: int, _total: int) -> None:
    """Nobody asked for progress."""


def _orders(train: int, test: int, seed: int) -> list[_Order]:
    return [
        _Order(seed, split, index, index % EMPTY_EVERY == EMPTY_EVERY - 1)
        for split, count in enumerate((train, test))
        for index in range(count)
    ]


def _write_lists(folder: Path, train: list[_Drawn], test: list[_Drawn], size_hw: tuple[int, int]) -> None:
    truth = _coco(test, FIRST_TEST_ID, size_hw)
    _write_json(folder / "train" / "label" / "Train.json", _coco(train, 1, size_hw))
    _write_json(folder / "Test_Images_Information.json", {"images": truth["images"]})
    example = {
        "image_id": FIRST_TEST_ID,
        "category_id": 1,
        "bbox": [100.0, 100.0, 50.0, 50.0],
        "score": 0.5,
        "segmentation": [],
    }
    _write_json(folder / "sample_submission.json", [example])
    _write_json(folder / "test_ground_truth.json", truth)


def _draw_all(
    orders: list[_Order],
    folder: Path,
    size_hw: tuple[int, int],
    workers: int,
    on_drawn: Callable[[int, int], None],
) -> list[_Drawn]:
    """Draw every picture into its folder; the answers are in the order of the orders."""
    for part in ("train/images", "train/label", "test/images"):
        (folder / part).mkdir(parents=True)
    draw = partial(_draw_one, folder=folder, size_hw=size_hw)
    if workers == 1:
        return list(_counted(map(draw, orders), len(orders), on_drawn))
    pool = ProcessPoolExecutor(min(workers, len(orders)), get_context("spawn"), initializer=_start_worker)
    try:
        with interrupts_held_back():  # the processes start here
            pictures = pool.map(draw, orders, chunksize=_BATCH)
        return list(_counted(pictures, len(orders), on_drawn))
    finally:
        # The pictures still to be drawn are given up; those in progress end before their folder is removed.
        pool.shutdown(wait=True, cancel_futures=True)


def _counted(pictures: Iterable[_Drawn], total: int, on_drawn: Callable[[int, int], None]) -> Iterator[_Drawn]:
    for done, picture in enumerate(pictures, start=1):
        on_drawn(done, total)
        yield picture


def _start_worker() -> None:
    """Ctrl-C reaches every process of the terminal; only the parent answers it."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)


def _draw_one(order: _Order, *, folder: Path, size_hw: tuple[int, int]) -> _Drawn:
    import cv2

    key = np.random.SeedSequence(order.seed, spawn_key=(order.split, order.index))
    rng = np.random.Generator(np.random.PCG64(key))
    if order.split:
        name, part = f"{uuid.UUID(bytes=rng.bytes(16), version=4)}.png", "test"
    else:
        name, part = "", "train"
    scene = draw_scene(rng, size_hw, empty=order.empty)
    if not name:
        name = _train_name(rng, order.index, scene.time, scene.weather)
    # Level 1 with one filter for all rows: a third of the time of the default and 5 % more bytes.
    settings = [
        cv2.IMWRITE_PNG_COMPRESSION,
        1,
        cv2.IMWRITE_PNG_STRATEGY,
        cv2.IMWRITE_PNG_STRATEGY_RLE,
        cv2.IMWRITE_PNG_FILTER,
        cv2.IMWRITE_PNG_FILTER_SUB,
    ]
    done, coded = cv2.imencode(".png", scene.image, settings)
    assert done, "a picture of three bytes a pixel can be coded"
    (folder / part / "images" / name).write_bytes(coded.tobytes())
    boxes = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in scene.xyxy)
    return _Drawn(name, boxes, tuple(int(class_id) for class_id in scene.class_ids))


def _train_name(rng: np.random.Generator, index: int, time: str, weather: str) -> str:
    """As the contest names its pictures: date, place, weather, time of day, camera, numbers."""
    day = f"2020{rng.integers(9, 13):02d}{rng.integers(1, 29):02d}"
    place = _PLACES[int(rng.integers(len(_PLACES)))]
    side = _SIDES[int(rng.integers(len(_SIDES)))]
    lot = int(rng.integers(1, 400))
    name = f"{day}_{place}_-_-_{_WEATHER[weather]}_{_TIMES[time]}_실외_{side}_{lot:06d}_{index + 1:07d}.png"
    return unicodedata.normalize("NFC", name)


def _coco(drawn: list[_Drawn], first_id: int, size_hw: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(drawn, start=first_id):
        images.append({"id": image_id, "file_name": picture.file_name, "width": size_hw[1], "height": size_hw[0]})
        for (left, top, right, bottom), class_id in zip(picture.xyxy, picture.class_ids, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": class_id + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_json(path: Path, content: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())

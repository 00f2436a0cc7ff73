"""Tables of detections, and a naive writer that shares no code with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import numpy as np
import polars as pl
import pytest

KEYS = ("image_id", "category_id", "bbox", "score", "segmentation")
SCHEMA = {
    "image_id": pl.Int64,
    "category_id": pl.Int32,
    **dict.fromkeys(("x", "y", "w", "h", "score"), pl.Float32),
}


def _make_table(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=SCHEMA, orient="row")


def _random_table(count: int, seed: int = 0, images: int = 19_521) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    w, h = rng.gamma(2, 60, count).clip(1, 1900), rng.gamma(2, 40, count).clip(1, 1070)
    x, y = rng.random(count) * (1920 - w), rng.random(count) * (1080 - h)
    columns = {
        "image_id": np.sort(rng.integers(0, images, count)) + 10_000,
        "category_id": rng.integers(1, 15, count),
        **{"x": x, "y": y, "w": w, "h": h, "score": rng.beta(0.4, 2, count).clip(0.01, 1)},
    }
    return pl.DataFrame(columns).cast(SCHEMA)  # type: ignore[arg-type]


def _naive_number(value: float, decimals: int) -> str:
    exact = Decimal(value).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN)
    text = format(exact, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _naive_line(row: dict[str, Any], keys: Sequence[str], bbox_decimals: int, score_decimals: int) -> str:
    texts = {
        "image_id": str(row["image_id"]),
        "category_id": str(row["category_id"]),
        "bbox": "[" + ",".join(_naive_number(row[side], bbox_decimals) for side in "xywh") + "]",
        "score": _naive_number(row["score"], score_decimals),
        "segmentation": "[]",
    }
    return "{" + ",".join(f'"{key}":{texts[key]}' for key in keys) + "}"


def _naive_file(
    table: pl.DataFrame, keys: Sequence[str] = KEYS, bbox_decimals: int = 1, score_decimals: int = 4
) -> bytes:
    lines = [_naive_line(row, keys, bbox_decimals, score_decimals) for row in table.to_dicts()]
    return ("[" + ",".join(lines) + "]").encode()


@pytest.fixture(scope="session")
def make_table() -> Callable[[Sequence[tuple[Any, ...]]], pl.DataFrame]:
    """Rows (image_id, category_id, x, y, w, h, score) as a table of predictions."""
    return _make_table


@pytest.fixture(scope="session")
def random_table() -> Callable[..., pl.DataFrame]:
    """(count, seed, images) -> detections in images of 1920 x 1080 with ids from 10,000."""
    return _random_table


@pytest.fixture(scope="session")
def naive_number() -> Callable[[float, int], str]:
    """(value, decimals) -> its text, by exact decimal arithmetic."""
    return _naive_number


@pytest.fixture(scope="session")
def naive_file() -> Callable[..., bytes]:
    """(table, keys, bbox_decimals, score_decimals) -> the submission, line by line."""
    return _naive_file


def _small_world(
    seed: int, images: int = 6, classes: int = 3, frequencies: Sequence[float] | None = None
) -> tuple[pl.DataFrame, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    classes = len(frequencies) if frequencies else classes
    boxes: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    for image_id in range(1, images + 1):
        for _ in range(int(rng.integers(0, 7))):
            box = np.concatenate((rng.random(2) * 300, rng.random(2) * 40 + 10))
            category_id = int(rng.choice(classes, p=frequencies)) + 1
            boxes.append(
                {"id": len(boxes) + 1, "image_id": image_id, "category_id": category_id, "bbox": box.tolist(),
                 "area": float(box[2] * box[3]), "iscrowd": int(rng.random() < 0.1 and frequencies is None)}
            )  # fmt: skip
            for _ in range(int(rng.integers(0, 3))):
                found = box + rng.normal(0, 1.5, 4)
                guess = category_id if rng.random() < 0.8 else int(rng.integers(1, classes + 1))
                # One decimal, so that some are tied.
                score = round(float(rng.beta(5, 2)) if guess == category_id else float(rng.beta(2, 4)), 2)
                rows.append((image_id, guess, *found[:2], *np.maximum(found[2:], 1), max(score, 0.01)))
        for _ in range(int(rng.integers(0, 4))):
            noise = (*(rng.random(2) * 300), *(rng.random(2) * 40 + 10))
            rows.append(
                (image_id, int(rng.integers(1, classes + 1)), *noise, max(round(float(rng.beta(1, 4)), 2), 0.01))
            )
    truth = {
        "images": [{"id": image_id} for image_id in range(1, images + 1)],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, classes + 1)],
        "annotations": boxes,
    }
    return pl.DataFrame(rows, schema=SCHEMA, orient="row"), truth


@pytest.fixture(scope="session")
def small_world() -> Callable[..., tuple[pl.DataFrame, dict[str, Any]]]:
    """(seed, images, classes, frequencies) -> detections and their COCO truth, with crowds, ties and misses."""
    return _small_world

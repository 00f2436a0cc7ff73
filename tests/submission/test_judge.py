"""Whole files of random entries, sound and wrong in every way: the check counts what a naive judge counts."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.contest import SUBMISSION_KEYS
from parkdet.submission import check_submission, spill
from parkdet.submission.findings import Kind

SIZES = {1: (640, 480), 2: (100, 50), 3: (1920, 1080)}
CATEGORIES = (1, 2, 5)
IMAGE_IDS: list[Any] = [1, 2, 3, 7, -1, 2**70, "1", 1.0, True, None]
CATEGORY_IDS: list[Any] = [1, 2, 5, 3, 0, "2", 2.5, False]
BOXES: list[Any] = [
    [1, 2, 3, 4], [0, 0, 100, 50], [-0.1, -0.1, 5, 5], [-0.3, 0, 5, 5], [95, 45, 5.1, 5.1], [95, 45, 5.3, 5],
    [1, 1, 0, 3], [1, 1, -2, 3], [1, 1, math.nan, 3], [1, 1, math.inf, 3], [1, 2, 3], "x", None, [1, 2, 3, "4"],
    [1, 2, 3, True], [639, 479, 1, 1], [1e308, 0, 1e308, 1], [10**400, 1, 1, 1],
]  # fmt: skip
SCORES: list[Any] = [0, 1, 0.5, 1.0001, -0.0001, math.nan, -math.inf, "0.5", None, True, 10**400, 1e-9, -0.0]


def random_entry(rng: random.Random) -> Any:
    entry = {
        "image_id": rng.choice(IMAGE_IDS), "category_id": rng.choice(CATEGORY_IDS), "bbox": rng.choice(BOXES),
        "score": rng.choice(SCORES), "segmentation": rng.choice([[], [], {}, None, [1]]),
    }  # fmt: skip
    if rng.random() < 0.7:  # most are sound, so that some stand there twice
        box = [rng.randint(0, 40), rng.randint(0, 20), rng.randint(1, 3), rng.randint(1, 20)]
        entry |= {"bbox": box, "image_id": rng.choice([1, 2, 3]), "category_id": rng.choice(CATEGORIES),
                  "score": rng.choice([0.1, 0.2]), "segmentation": []}  # fmt: skip
    fate = rng.random()
    if fate < 0.04:
        del entry[rng.choice(SUBMISSION_KEYS)]
    elif fate < 0.08:
        entry["extra"] = 1
    elif fate < 0.1:
        return rng.choice([5, None, [1], "s", [entry]])
    return entry


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_huge(value: Any) -> bool:
    """An integer that no float holds."""
    try:
        float(value)
    except OverflowError:
        return True
    return False


def faults_of_form(entry: dict[str, Any]) -> list[Kind]:
    faults = [Kind.KEY_MISSING for key in SUBMISSION_KEYS if key not in entry]
    for key, value in entry.items():
        match key:
            case "image_id" | "category_id" if type(value) is not int:
                faults.append(Kind.WRONG_TYPE)
            case "image_id" if not -(2**63) <= value < 2**63:
                faults.append(Kind.UNKNOWN_IMAGE)
            case "category_id" if not -(2**63) <= value < 2**63:
                faults.append(Kind.UNKNOWN_CATEGORY)
            case "bbox" if not (isinstance(value, list) and len(value) == 4 and all(map(is_number, value))):
                faults.append(Kind.WRONG_TYPE)
            case "bbox" if any(map(is_huge, value)):
                faults.append(Kind.NOT_FINITE)
            case "score" if not is_number(value):
                faults.append(Kind.WRONG_TYPE)
            case "score" if is_huge(value):
                faults.append(Kind.NOT_FINITE)
            case "segmentation" if not isinstance(value, list):
                faults.append(Kind.WRONG_TYPE)
            case "extra":
                faults.append(Kind.KEY_UNKNOWN)
    return faults


def faults_of_values(entry: dict[str, Any]) -> list[Kind]:
    score, (x, y, w, h) = entry["score"], entry["bbox"]
    width, height = SIZES.get(entry["image_id"], (math.inf, math.inf))
    finite = all(map(math.isfinite, (x, y, w, h)))
    outside = min(x, y) < -0.1 - 1e-6 or x + w > width + 0.1002 or y + h > height + 0.1002
    wrong = {
        Kind.UNKNOWN_IMAGE: entry["image_id"] not in SIZES,
        Kind.UNKNOWN_CATEGORY: entry["category_id"] not in CATEGORIES,
        Kind.SCORE_RANGE: math.isfinite(score) and not 0 <= score <= 1,
        Kind.NO_AREA: finite and (w <= 0 or h <= 0),
        Kind.OUT_OF_IMAGE: finite and outside,
    }
    not_finite = [Kind.NOT_FINITE] * (not finite) + [Kind.NOT_FINITE] * (not math.isfinite(score))
    return [kind for kind, is_wrong in wrong.items() if is_wrong] + not_finite


def judged(entries: list[Any]) -> Counter[Kind]:
    faults: Counter[Kind] = Counter()
    seen: Counter[str] = Counter()
    for entry in entries:
        if not isinstance(entry, dict):
            faults[Kind.NOT_AN_OBJECT] += 1
        elif of_form := faults_of_form(entry):
            faults.update(of_form)
        else:
            faults.update(faults_of_values(entry))
            numbers = [float(number) + 0.0 for number in (*entry["bbox"], entry["score"])]
            seen[repr((entry["image_id"], entry["category_id"], numbers))] += 1
    if repeats := seen.total() - len(seen):
        faults[Kind.REPEATED] = repeats
    return faults


@pytest.mark.parametrize("in_memory", [50, 10**6])
def test_the_check_counts_what_a_judge_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY", in_memory)
    path = tmp_path / "theirs.json"
    for seed in range(60):
        rng = random.Random(seed)
        entries = [random_entry(rng) for _ in range(rng.choice([0, 1, 5, 60, 300]))]
        path.write_text(json.dumps(entries, indent=rng.choice([None, 1])))
        report = check_submission(path, SIZES, CATEGORIES, SIZES, 10**9)
        assert {finding.kind: finding.count for finding in report.findings} == judged(json.loads(path.read_text()))
        assert report.entry_count == len(entries)

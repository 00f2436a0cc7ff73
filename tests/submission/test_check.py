from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.errors import UsageError
from parkdet.submission import check_submission, spill
from parkdet.submission.findings import CheckReport, Kind

IMAGES = {10_001: (640, 480), 10_002: (1920, 1080)}
GOOD = {"image_id": 10_001, "category_id": 1, "bbox": [100.0, 100.5, 50, 50.0], "score": 0.5, "segmentation": []}
OTHER = {**GOOD, "image_id": 10_002}

Check = Callable[..., CheckReport]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Writes text or entries to a file and checks it."""

    def run(content: str | bytes | list[Any], limit: int = 10**9, **options: Any) -> CheckReport:
        path = tmp_path / "some file.json"
        if isinstance(content, list):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return check_submission(path, IMAGES, (1, 2, 5), IMAGES, limit, **options)

    return run


def kinds(report: CheckReport) -> dict[Kind, int]:
    return {finding.kind: finding.count for finding in report.findings}


def test_the_empty_list_is_accepted(check: Check) -> None:
    report = check("[]")
    assert (report.entry_count, report.size_bytes, report.findings) == (0, 2, ())
    assert str(report) == ""


def test_a_sound_file_is_accepted_however_it_is_laid_out(check: Check) -> None:
    for indent in (None, 2):
        for order in (list(GOOD), list(reversed(GOOD))):
            entries = [{key: entry[key] for key in order} for entry in (GOOD, OTHER)]
            report = check(json.dumps(entries, indent=indent))
            assert report.findings == ()
            assert report.entry_count == 2


def test_a_file_that_is_not_there_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        check_submission(tmp_path / "none.json", IMAGES, (1,), IMAGES, 100)
    with pytest.raises(UsageError, match="is not a file"):
        check_submission(tmp_path, IMAGES, (1,), IMAGES, 100)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (17, Kind.NOT_AN_OBJECT),
        (None, Kind.NOT_AN_OBJECT),
        ([GOOD], Kind.NOT_AN_OBJECT),
        *[(without(key), Kind.KEY_MISSING) for key in GOOD],
        ({**GOOD, "id": 3}, Kind.KEY_UNKNOWN),
        ({**without("score"), "scores": 0.5}, Kind.KEY_MISSING),
        ({**without("score"), "scores": 0.5}, Kind.KEY_UNKNOWN),
        ({**GOOD, "image_id": "10001"}, Kind.WRONG_TYPE),
        ({**GOOD, "image_id": 10_001.0}, Kind.WRONG_TYPE),
        ({**GOOD, "category_id": True}, Kind.WRONG_TYPE),
        ({**GOOD, "category_id": None}, Kind.WRONG_TYPE),
        ({**GOOD, "score": "0.5"}, Kind.WRONG_TYPE),
        ({**GOOD, "score": True}, Kind.WRONG_TYPE),
        ({**GOOD, "score": None}, Kind.WRONG_TYPE),
        ({**GOOD, "segmentation": {}}, Kind.WRONG_TYPE),
        ({**GOOD, "segmentation": None}, Kind.WRONG_TYPE),
        ({**GOOD, "bbox": {"x": 1, "y": 1, "w": 1, "h": 1}}, Kind.WRONG_TYPE),
        ({**GOOD, "bbox": [1, 2, 3]}, Kind.WRONG_TYPE),
        ({**GOOD, "bbox": [1, 2, 3, 4, 5]}, Kind.WRONG_TYPE),
        ({**GOOD, "bbox": [1, 2, 3, "4"]}, Kind.WRONG_TYPE),
        ({**GOOD, "bbox": [1, 2, 3, None]}, Kind.WRONG_TYPE),
        ({**GOOD, "bbox": [1, 2, 3, False]}, Kind.WRONG_TYPE),
        ({**GOOD, "bbox": [[1, 2, 3, 4]]}, Kind.WRONG_TYPE),
        ({**GOOD, "image_id": 10_003}, Kind.UNKNOWN_IMAGE),
        ({**GOOD, "image_id": -1}, Kind.UNKNOWN_IMAGE),
        ({**GOOD, "image_id": 0}, Kind.UNKNOWN_IMAGE),
        ({**GOOD, "image_id": 10**30}, Kind.UNKNOWN_IMAGE),
        ({**GOOD, "category_id": 0}, Kind.UNKNOWN_CATEGORY),
        ({**GOOD, "category_id": 3}, Kind.UNKNOWN_CATEGORY),
        ({**GOOD, "category_id": 2**63}, Kind.UNKNOWN_CATEGORY),
        ({**GOOD, "score": 1.0001}, Kind.SCORE_RANGE),
        ({**GOOD, "score": -0.0001}, Kind.SCORE_RANGE),
        ({**GOOD, "score": 50}, Kind.SCORE_RANGE),
        ({**GOOD, "score": float("nan")}, Kind.NOT_FINITE),
        ({**GOOD, "score": float("inf")}, Kind.NOT_FINITE),
        ({**GOOD, "score": 10**400}, Kind.NOT_FINITE),
        ({**GOOD, "bbox": [float("nan"), 1, 2, 3]}, Kind.NOT_FINITE),
        ({**GOOD, "bbox": [1, 1, 2, float("-inf")]}, Kind.NOT_FINITE),
        ({**GOOD, "bbox": [1, 1, 2, 10**400]}, Kind.NOT_FINITE),
        ({**GOOD, "segmentation": [float("nan")]}, Kind.NOT_FINITE),
        ({**GOOD, "segmentation": [[1, {"a": [float("inf")]}]]}, Kind.NOT_FINITE),
        ({**GOOD, "bbox": [1, 1, 0, 3]}, Kind.NO_AREA),
        ({**GOOD, "bbox": [1, 1, 1e-200, 1e-200]}, Kind.NO_AREA),
        ({**GOOD, "bbox": [1, 1, 3, 0.0]}, Kind.NO_AREA),
        ({**GOOD, "bbox": [10, 1, -3, 5]}, Kind.NO_AREA),
        ({**GOOD, "bbox": [-0.2, 1, 3, 5]}, Kind.OUT_OF_IMAGE),
        ({**GOOD, "bbox": [1, -0.2, 3, 5]}, Kind.OUT_OF_IMAGE),
        ({**GOOD, "bbox": [600, 1, 40.2, 5]}, Kind.OUT_OF_IMAGE),
        ({**GOOD, "bbox": [1, 400.1, 3, 80.1]}, Kind.OUT_OF_IMAGE),
        ({**GOOD, "bbox": [700, 1, 3, 5]}, Kind.OUT_OF_IMAGE),
        ({**GOOD, "bbox": [1e308, 1, 1e308, 5]}, Kind.OUT_OF_IMAGE),
        (GOOD, Kind.REPEATED),
        ({**GOOD, "bbox": [100, 100.5, 50.0, 50]}, Kind.REPEATED),
    ],
)
def test_every_fault_is_found_and_only_it(check: Check, bad: Any, kind: Kind) -> None:
    report = check([GOOD, bad, OTHER])
    assert report.entry_count == 3
    assert kinds(report)[kind] == 1
    others = set(kinds(report)) - {kind}
    assert others <= ({Kind.KEY_MISSING, Kind.KEY_UNKNOWN} if isinstance(bad, dict) and "scores" in bad else set())
    assert "[1]" in next(finding for finding in report.findings if finding.kind == kind).examples[0]


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 640, 480],
        [-0.1, -0.1, 640, 480],
        [600, 400, 40.1, 80.1],
        [639.9, 479.9, 0.2, 0.2],
        [0.1, 0.1, 0.1, 0.1],
    ],
)
def test_a_rounding_step_over_the_edge_is_allowed(check: Check, box: list[float]) -> None:
    assert check([{**GOOD, "bbox": box}]).findings == ()


def test_the_step_is_that_of_the_decimals(check: Check) -> None:
    entries = [{**GOOD, "bbox": [600, 0, 40.1, 80]}]
    assert kinds(check(entries, bbox_decimals=2)) == {Kind.OUT_OF_IMAGE: 1}
    assert kinds(check([{**GOOD, "bbox": [600, 0, 41, 80]}], bbox_decimals=0)) == {}


def test_an_image_of_unknown_size_has_no_far_edge(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps([{**GOOD, "bbox": [5000, 1, 3, 3]}, {**GOOD, "bbox": [-1, 1, 3, 3]}]))
    report = check_submission(path, IMAGES, (1,), {}, 10**6)
    assert kinds(report) == {Kind.OUT_OF_IMAGE: 1}


def test_the_size_must_be_below_the_limit(check: Check) -> None:
    size = check([GOOD]).size_bytes
    assert kinds(check([GOOD], limit=size)) == {Kind.TOO_LARGE: 1}
    assert kinds(check([GOOD], limit=size + 1)) == {}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", Kind.NOT_JSON),
        ("image_id,score", Kind.NOT_JSON),
        (json.dumps([GOOD])[:-1], Kind.NOT_JSON),
        (json.dumps([GOOD])[:-20], Kind.NOT_JSON),
        (json.dumps([GOOD])[:-1] + ",]", Kind.NOT_JSON),
        (json.dumps([GOOD]) + "\n" + json.dumps([GOOD]), Kind.NOT_JSON),
        (json.dumps(GOOD) + "\n" + json.dumps(OTHER), Kind.NOT_A_LIST),
        (json.dumps({"annotations": [GOOD]}), Kind.NOT_A_LIST),
        (json.dumps(str([GOOD])), Kind.NOT_A_LIST),
    ],
)
def test_what_is_no_json_list_is_found(check: Check, text: str, kind: Kind) -> None:
    assert kinds(check(text)) == {kind: 1}


def test_an_integer_without_end_is_one_fault_among_others(check: Check) -> None:
    text = json.dumps([GOOD, OTHER, {**GOOD, "score": 7}]).replace(": 0.5", ": -" + "1" * 10_000, 1)
    report = check(text)
    assert (report.entry_count, kinds(report)) == (3, {Kind.NOT_FINITE: 1, Kind.SCORE_RANGE: 1})


def test_a_key_twice_in_an_entry_is_found(check: Check) -> None:
    text = json.dumps([GOOD, OTHER]).replace('"score": 0.5', '"score": 0.5, "score": 0.6', 1)
    assert kinds(check(text)) == {Kind.KEY_REPEATED: 1}


def test_the_keys_are_the_samples(check: Check) -> None:
    entries = [without("segmentation")]
    keys = ("score", "image_id", "bbox", "category_id")
    assert kinds(check(entries, keys=keys)) == {}
    assert kinds(check([GOOD], keys=keys)) == {Kind.KEY_UNKNOWN: 1}
    # Values that the sample has no place for are not asked for.
    assert kinds(check([{"image_id": 10_001}, {"image_id": 3}], keys=("image_id",))) == {Kind.UNKNOWN_IMAGE: 1}
    assert kinds(check([{"bbox": [1, 1, 9999, 2]}], keys=("bbox",))) == {}


def test_faults_are_counted_with_three_examples(check: Check) -> None:
    entries = [{**GOOD, "bbox": [1, 1, 1 + n / 10, 2]} for n in range(200)]
    for n in range(0, 200, 4):
        entries[n]["image_id"] = n
    entries[7]["score"] = "high"
    entries += [entries[3], entries[5], entries[3]]
    report = check(entries)
    assert kinds(report) == {Kind.WRONG_TYPE: 1, Kind.UNKNOWN_IMAGE: 50, Kind.REPEATED: 3}
    lines = str(report).splitlines()
    assert lines[0] == "value of the wrong type: 1 ([7] score is 'high')"
    assert lines[1] == ("image not in the test set: 50 ([0] image_id 0; [4] image_id 4; [8] image_id 8; ...)")
    assert "[200] is [3] again" in lines[2]


def test_repeats_are_found_across_a_long_file(check: Check) -> None:
    entries = [{**OTHER, "bbox": [n % 1000, n // 1000, 2, 2]} for n in range(50_000)]
    entries[49_999] = entries[12]
    report = check(entries)
    assert kinds(report) == {Kind.REPEATED: 1}
    assert report.findings[0].examples == ("[49999] is [12] again",)


def test_repeats_are_found_in_a_file_that_is_too_long_for_memory(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY", 1000)
    entries = [{**OTHER, "bbox": [n % 1000, n // 1000, 2, 2]} for n in range(30_000)]
    entries[29_999], entries[20], entries[15_000] = entries[12], entries[12], entries[500]
    report = check(entries)
    assert kinds(report) == {Kind.REPEATED: 3}
    assert report.findings[0].examples == ("[20] is [12] again", "[15000] is [500] again", "[29999] is [12] again")


@pytest.mark.parametrize("distinct", [10**9, 1])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distinct: int) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY", 20_000)

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.json"
        numbers = (n % distinct for n in range(count))
        lines = (json.dumps({**OTHER, "bbox": [n % 1900, n // 1900, 2, 2]}) for n in numbers)
        path.write_text("[" + ",".join(lines) + "]")
        tracemalloc.start()
        report = check_submission(path, IMAGES, (1,), IMAGES, 10**9)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        repeats = max(0, count - distinct)
        assert kinds(report) == ({Kind.REPEATED: repeats} if repeats else {})
        return memory

    # 110 bytes an entry in the file, some 300 as objects, 64 as what is remembered of it, on the disk.
    least, most = 100_000, 180_000 if distinct > 1 else 300_000
    assert peak(most) - peak(least) < (most - least) * 40

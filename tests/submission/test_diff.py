"""How two files differ, held to Counter arithmetic on what json.loads reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parkdet.runtime.errors import DataError, UsageError
from parkdet.submission import spill
from parkdet.submission.diff import DiffReport, diff_submissions

GOOD = {"image_id": 10_001, "category_id": 1, "bbox": [100.0, 100.5, 50, 50.0], "score": 0.5, "segmentation": []}

entries = st.lists(
    st.builds(
        lambda image, category, x, score: {
            "image_id": image, "category_id": category, "bbox": [x, 1, 5, 5.5], "score": score, "segmentation": [],
        },
        st.integers(1, 2), st.integers(1, 2), st.sampled_from([0, 1.5, -0.0]), st.sampled_from([0.1, 0.2, 0.9]),
    )
    | st.sampled_from([17, None, {**GOOD, "score": "high"}, {"score": 0.5}, float("nan")]),
    max_size=14,
)  # fmt: skip


def diff(folder: Path, first: Any, second: Any) -> DiffReport:
    paths = folder / "a.json", folder / "b.json"
    for path, content in zip(paths, (first, second), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return diff_submissions(*paths)


def canonical(entry: Any) -> str:
    """Equal where two entries hold the same numbers."""
    text = json.loads(json.dumps(entry), parse_int=float, parse_float=lambda value: float(value) + 0.0)
    return json.dumps(text, sort_keys=True)


def box_of(text: str) -> str | None:
    entry = json.loads(text)
    if not isinstance(entry, dict) or "bbox" not in entry or not isinstance(entry["score"], float):
        return None
    return json.dumps([entry["image_id"], entry["category_id"], entry["bbox"]])


@pytest.mark.parametrize("in_memory", [3, 10**6])
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=entries, second=entries)
def test_the_difference_is_that_of_multisets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int, first: list[Any], second: list[Any]
) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY", in_memory)
    monkeypatch.setattr(spill, "PARTS", 5)
    first, second = [GOOD, *first], [GOOD, *second]
    one, other = Counter(map(canonical, first)), Counter(map(canonical, second))
    report = diff(tmp_path, first, second)
    assert [side.entry_count for side in report.sides] == [len(first), len(second)]
    assert report.both == (one & other).total()
    assert [side.only for side in report.sides] == [(one - other).total(), (other - one).total()]
    assert report.is_same == (one == other)
    boxes = [Counter(box for text in (mine - theirs).elements() if (box := box_of(text)))
             for mine, theirs in ((one, other), (other, one))]  # fmt: skip
    assert report.rescored == (boxes[0] & boxes[1]).total()
    assert report.same_order == ([*map(canonical, first)] == [*map(canonical, second)])


def test_order_counts_among_detections_and_others(tmp_path: Path) -> None:
    assert not diff(tmp_path, [GOOD, 17, 17], [17, 17, GOOD]).same_order
    assert not diff(tmp_path, [GOOD, 17, 18], [GOOD, 18, 17]).same_order
    assert diff(tmp_path, [GOOD, 17, GOOD], json.dumps([GOOD, 17, GOOD], indent=4)).same_order


def test_empty_lists_are_equal(tmp_path: Path) -> None:
    report = diff(tmp_path, "[]", "[]")
    assert report.is_same and report.same_bytes and report.both == 0
    assert str(report).endswith("equal to the byte")
    assert diff(tmp_path, "[]", " [ ] ").is_same


def test_layout_key_order_and_digits_are_no_difference(tmp_path: Path) -> None:
    rewritten = {key: GOOD[key] for key in reversed(GOOD)} | {"bbox": [100, 100.50, 50.0, 5e1]}
    report = diff(tmp_path, [GOOD], json.dumps([rewritten], indent=3))
    assert report.is_same and report.same_order and not report.same_bytes
    assert "the same detections, in the same order, written differently" in str(report)
    assert "in another order" in str(diff(tmp_path, [GOOD, {**GOOD, "image_id": 3}], [{**GOOD, "image_id": 3}, GOOD]))


def test_what_differs_is_shown_with_its_place(tmp_path: Path) -> None:
    report = diff(tmp_path, [GOOD, {**GOOD, "image_id": 2}], [{**GOOD, "score": 0.75}, {**GOOD, "image_id": 2}, GOOD])
    assert not report.is_same
    assert (
        f"only in {tmp_path / 'b.json'}: 1 ([0] image 10001 category 1 [100.0, 100.5, 50.0, 50.0] score 0.75)"
        in str(report)
    )
    report = diff(tmp_path, [GOOD], [{**GOOD, "score": 0.75}])
    assert (report.rescored, report.largest_score_change) == (1, 0.25)
    assert "another score: 1, by up to 0.25" in str(report)


def test_keys_of_one_file_only_are_a_difference(tmp_path: Path) -> None:
    short = {key: value for key, value in GOOD.items() if key != "segmentation"}
    report = diff(tmp_path, [GOOD], [short])
    assert report.both == 1
    assert not report.is_same
    assert f"keys only in {tmp_path / 'a.json'}: segmentation" in str(report)


def test_what_is_no_list_is_told_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.json: is no JSON list"):
        diff(tmp_path, [GOOD], json.dumps([GOOD])[:-3])
    with pytest.raises(UsageError, match="no such file"):
        diff_submissions(tmp_path / "a.json", tmp_path / "none.json")

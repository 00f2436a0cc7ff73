from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parkdet.runtime.errors import GateError
from parkdet.submission import SubmissionFormat, fit, fit_distinct
from parkdet.submission.cut import _fit_once, fit_batches, without_repeats
from parkdet.submission.prices import Prices, PriceSteps

Table = Callable[..., pl.DataFrame]
Naive = Callable[..., Any]

COLUMNS = ["image_id", "category_id", "x", "y", "w", "h", "score"]

rows = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.integers(1, 14),
        *[st.floats(0, 2000, width=32)] * 2,
        *[st.sampled_from([0.0, 0.04, 0.25, 7.0, 33.3, 1204.56])] * 2,
        # Few scores, so that most are tied; some differ only in what is not written.
        st.sampled_from([0.0, 0.01, 0.5, 0.50001, 0.50002, 0.9, 1.0]),
    ),
    max_size=25,
)


def taken_in_order(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Detections with an area as written, in the order in which they are to be taken."""
    found = [row for row in table.with_row_index("row").to_dicts() if round(row["w"], 1) > 0 and round(row["h"], 1) > 0]
    return sorted(found, key=lambda row: (-row["score"], row["image_id"], row["category_id"], row["row"]))


def test_nothing_is_an_empty_list(make_table: Table) -> None:
    outcome = fit(make_table([]), 3)
    assert (outcome.threshold, outcome.size_bytes, outcome.kept_count, outcome.cut_count) == (0.0, 2, 0, 0)
    assert outcome.kept.columns == COLUMNS
    assert b"".join(outcome.format.file_chunks(outcome.kept)) == b"[]"


def test_a_table_without_types_may_be_empty() -> None:
    assert fit(pl.DataFrame({name: [] for name in COLUMNS}), 3).size_bytes == 2


@pytest.mark.parametrize("limit", [2, 1, 0, -5])
def test_a_limit_below_the_empty_list_is_refused(make_table: Table, limit: int) -> None:
    with pytest.raises(GateError, match="at least 3"):
        fit(make_table([(1, 1, 0, 0, 1, 1, 0.5)]), limit)


@settings(deadline=None, max_examples=300)
@given(rows=rows, limit=st.integers(3, 2600))
def test_kept_is_the_longest_prefix_that_fits(
    make_table: Table, naive_file: Naive, rows: list[tuple[Any, ...]], limit: int
) -> None:
    table = make_table(rows)
    order = taken_in_order(table)
    # Every number of detections is tried, not a binary search.
    fitting = [
        count for count in range(len(order) + 1)
        if len(naive_file(make_table([[row[c] for c in COLUMNS] for row in order[:count]]))) < limit
    ]  # fmt: skip
    outcome = fit(table, limit)

    best = order[: max(fitting)]
    in_file_order = sorted(best, key=lambda r: (r["image_id"], -r["score"], r["category_id"], r["row"]))
    assert outcome.kept.to_dicts() == [{c: row[c] for c in COLUMNS} for row in in_file_order]
    assert outcome.size_bytes == len(naive_file(outcome.kept)) < limit
    assert outcome.without_area_count == len(rows) - len(order)
    assert outcome.cut_count == len(order) - len(best)


@settings(deadline=None, max_examples=200)
@given(rows=rows, limit=st.integers(3, 2600))
def test_the_threshold_is_the_lowest_above_which_everything_fits(
    make_table: Table, naive_file: Naive, rows: list[tuple[Any, ...]], limit: int
) -> None:
    table = make_table(rows)
    order = taken_in_order(table)
    outcome = fit(table, limit)

    def fits(threshold: float) -> bool:
        above = [[row[c] for c in COLUMNS] for row in order if row["score"] > threshold]
        return len(naive_file(make_table(above))) < limit

    if not outcome.cut_count:
        assert outcome.threshold == 0
        return
    assert outcome.threshold == min(t for t in {row["score"] for row in order} if fits(t))
    assert fits(outcome.threshold)
    assert not fits(np.nextafter(outcome.threshold, -1))
    tied = [row for row in order if row["score"] == outcome.threshold]
    above = [row for row in order if row["score"] > outcome.threshold]
    assert outcome.tied_count == len(tied)
    assert outcome.tied_kept_count == outcome.kept_count - len(above) < len(tied)


def test_one_byte_either_side_of_the_limit(random_table: Table) -> None:
    table = random_table(50)
    whole = fit(table, 10**9)
    assert whole.kept_count == 50
    assert fit(table, whole.size_bytes + 1).kept_count == 50
    assert fit(table, whole.size_bytes).kept_count == 49


def test_not_even_one_fits(random_table: Table) -> None:
    outcome = fit(random_table(10), 60)
    assert (outcome.kept_count, outcome.size_bytes, outcome.cut_count) == (0, 2, 10)
    assert outcome.tied_kept_count == 0


def test_ties_go_by_image_category_and_row(make_table: Table) -> None:
    table = make_table(
        [
            (2, 1, 0, 0, 1, 1, 0.5),
            (1, 2, 0, 0, 1, 1, 0.5),
            (1, 1, 7, 0, 1, 1, 0.5),
            (1, 1, 3, 0, 1, 1, 0.5),
            (9, 9, 0, 0, 1, 1, 0.6),
        ]
    )
    line = len('{"image_id":1,"category_id":1,"bbox":[0,0,1,1],"score":0.5,"segmentation":[]}')
    kept = [fit(table, 2 + count * (line + 1)).kept.rows() for count in range(1, 6)]
    assert [row[:3] for row in kept[0]] == [(9, 9, 0)]
    assert [row[:3] for row in kept[1]] == [(1, 1, 7), (9, 9, 0)]
    assert [row[:3] for row in kept[2]] == [(1, 1, 7), (1, 1, 3), (9, 9, 0)]
    assert [row[:3] for row in kept[3]] == [(1, 1, 7), (1, 1, 3), (1, 2, 0), (9, 9, 0)]
    assert len(kept[4]) == 5


def test_of_scores_written_alike_the_better_stays(make_table: Table) -> None:
    table = make_table([(1, 1, 0, 0, 1, 1, 0.50001), (2, 1, 0, 0, 1, 1, 0.50002)])
    outcome = fit(table, 90)
    assert outcome.kept["image_id"].to_list() == [2]
    assert outcome.threshold == np.float32(0.50001)


def test_the_order_of_the_rows_does_not_matter(random_table: Table) -> None:
    table = random_table(3000, images=200)
    outcome = fit(table, 60_000)
    shuffled = fit(table.sample(fraction=1, shuffle=True, seed=3), 60_000)
    assert shuffled.kept.equals(outcome.kept)
    assert 0 < outcome.kept_count < 3000


def test_a_large_table_agrees_with_python(random_table: Table, naive_file: Naive) -> None:
    # More than a chunk of texts, and fewer candidates than rows: the short cuts of the large case.
    table = random_table(150_000)
    outcome = fit(table, 12_000_000)
    order = sorted(
        range(table.height),
        key=lambda row: (-table["score"][row], table["image_id"][row], table["category_id"][row], row),
    )
    kept = table[order[: outcome.kept_count]]
    assert outcome.size_bytes == len(naive_file(kept)) < 12_000_000
    assert len(naive_file(table[order[: outcome.kept_count + 1]])) >= 12_000_000
    assert outcome.kept.sort(COLUMNS).equals(kept.sort(COLUMNS))


def test_the_file_parses_to_the_rounded_values(random_table: Table) -> None:
    outcome = fit(random_table(500), 40_000)
    entries = json.loads(b"".join(outcome.format.file_chunks(outcome.kept)))
    assert entries == [
        {
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "bbox": [round(row[side], 1) for side in "xywh"],
            "score": round(row["score"], 4),
            "segmentation": [],
        }
        for row in outcome.kept.to_dicts()
    ]


def test_boxes_without_area_once_rounded_are_left_out(make_table: Table) -> None:
    table = make_table(
        [(1, 1, 5, 5, w, h, 0.9) for w, h in ((0, 3), (3, 0), (-2, 3), (0.04, 3), (3, 0.05), (0.06, 0.1))]
    )
    outcome = fit(table, 1000)
    # 0.05 as float32 lies above the half and is written 0.1.
    assert outcome.kept["h"].to_list() == pytest.approx([0.05, 0.1])
    assert outcome.without_area_count == 4
    assert fit(table, 1000, bbox_decimals=2).without_area_count == 3
    assert fit(table, 1000, keys=("image_id", "score")).without_area_count == 0


@pytest.mark.parametrize("column", ["x", "w", "score"])
@pytest.mark.parametrize("value", [np.nan, np.inf, None])
def test_predictions_with_numbers_that_are_none_are_refused(
    random_table: Table, column: str, value: float | None
) -> None:
    table = random_table(5)
    table[3, column] = value
    with pytest.raises(GateError, match=f"1 detections have (a|no) {column}"):
        fit(table, 1000)


@pytest.mark.parametrize("score", [-0.0001, 1.0001])
def test_scores_out_of_range_are_refused(random_table: Table, score: float) -> None:
    table = random_table(5)
    table[3, "score"] = score
    with pytest.raises(GateError, match="within 0 to 1"):
        fit(table, 1000)


def test_a_score_that_is_written_as_1_is_in_range(random_table: Table) -> None:
    table = random_table(5)
    table[3, "score"] = np.nextafter(np.float32(1), np.float32(2))
    assert fit(table, 1000).kept_count == 5


def test_a_table_of_other_columns_is_a_mistake_of_the_caller(random_table: Table) -> None:
    with pytest.raises(ValueError, match="lacks the columns"):
        fit(random_table(3).drop("w"), 1000)
    with pytest.raises(ValueError, match="image_id is Float64"):
        fit(random_table(3).cast({"image_id": pl.Float64}), 1000)


def test_integers_and_float64_are_numbers_too(random_table: Table, naive_file: Naive) -> None:
    table = random_table(40).with_columns(pl.col("x").cast(pl.Int32), pl.col("w", "score").cast(pl.Float64))
    outcome = fit(table, 2000)
    assert outcome.size_bytes == len(naive_file(outcome.kept)) < 2000


def test_detections_written_alike_go_in_once(make_table: Table) -> None:
    alike = [(1, 1, 10.01, 5, 0.3, 0.3, 0.50001), (1, 1, 9.99, 5, 0.3, 0.3, 0.50002)]
    other = [(1, 2, 10.01, 5, 0.3, 0.3, 0.5), (2, 1, 10.01, 5, 0.3, 0.3, 0.5)]
    table = make_table([*alike, *other])
    assert fit(table, 1000).kept_count == 4
    outcome = fit_distinct(table, 1000)
    assert outcome.kept_count == 3
    assert np.float32(0.50002) in outcome.kept["score"].to_list()
    assert (outcome.read_count, outcome.repeated_count, outcome.cut_count) == (4, 1, 0)
    assert fit_distinct(make_table(other), 1000).repeated_count == 0


def test_a_repeat_that_no_longer_fits_is_not_where_the_cut_ends(make_table: Table, naive_file: Naive) -> None:
    long, short = (1000, 14, 100.1, 100.1, 20.5, 20.5, 0.91234), (1, 1, 1, 1, 2, 2, 0.5)
    table = make_table([long, long, short, short])
    size = len(naive_file(make_table([long, short])))
    outcome = fit_distinct(table, size + 1)
    assert sorted(outcome.kept["score"].to_list()) == sorted(make_table([long, short])["score"].to_list())
    assert (outcome.size_bytes, outcome.repeated_count, outcome.cut_count, outcome.threshold) == (size, 2, 0, 0)


def test_the_room_of_repeated_detections_goes_to_others(random_table: Table) -> None:
    table = random_table(200, images=20)
    twice = pl.concat([table, table])
    outcome = fit_distinct(twice, 9000)
    assert outcome.kept.equals(fit(table, 9000).kept)
    assert outcome.repeated_count == 200


def in_parts(table: pl.DataFrame, rows: int) -> Callable[[], list[pl.DataFrame]]:
    return lambda: [table[start : start + rows] for start in range(0, table.height, rows)]


@settings(deadline=None, max_examples=60)
@given(rows=rows, limit=st.integers(3, 900), part=st.integers(1, 9))
def test_a_table_in_parts_is_cut_like_the_whole(
    make_table: Table, rows: list[tuple[Any, ...]], limit: int, part: int
) -> None:
    # So many more rows than can fit that most pass by without being kept.
    table = make_table(rows * 6)
    whole, parts = fit_distinct(table, limit), fit_batches(in_parts(table, part), limit, SubmissionFormat())
    assert parts.kept.equals(whole.kept)
    facts = ("threshold", "size_bytes", "read_count", "without_area_count", "tied_count", "tied_kept_count")
    assert [getattr(parts, name) for name in facts] == [getattr(whole, name) for name in facts]
    assert parts.read_by_category == whole.read_by_category
    # The naive way: repeats go first, then the cut.
    distinct = fit(without_repeats(table, SubmissionFormat()), limit)
    assert parts.kept.sort(COLUMNS).equals(distinct.kept.sort(COLUMNS))


def test_ten_thousand_ties_in_parts_go_by_image_category_and_row(make_table: Table) -> None:
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(1, 50)), int(rng.integers(1, 4)), n, 0, 1, 1, 0.5) for n in range(10_000)]
    table = make_table(rows)
    whole, parts = fit(table, 3000), fit_batches(in_parts(table, 70), 3000, SubmissionFormat())
    assert parts.kept.equals(whole.kept)
    assert parts.tied_count == whole.tied_count == 10_000
    assert parts.kept.rows() == sorted(rows, key=lambda row: row[:2])[: parts.kept_count]


def prices_of(**steps: list[tuple[float, float]]) -> Prices:
    """(lower score, price) by category, `a` being category 1; scores are float32, as those of predictions."""
    return Prices(
        {
            ord(name) - 96: PriceSteps(
                np.array([np.float32(score) for score, _ in pairs], np.float64), np.array([p for _, p in pairs], float)
            )
            for name, pairs in steps.items()
        }
    )


@settings(deadline=None, max_examples=60)
@given(rows=rows, limit=st.integers(3, 2600), part=st.integers(1, 30))
def test_prices_come_before_scores(
    make_table: Table, naive_file: Naive, rows: list[tuple[Any, ...]], limit: int, part: int
) -> None:
    table = make_table([(row[0], row[1] % 3 + 1, *row[2:]) for row in rows])
    prices = prices_of(a=[(0.9, 5.0), (0.5, 2.0)], b=[(0.01, 3.0)])

    def price(row: dict[str, Any]) -> float:
        category, score = row["category_id"], row["score"]
        if category == 1:
            return 5.0 if score >= np.float32(0.9) else 2.0 if score >= 0.5 else 0.0
        return 3.0 if category == 2 and score >= np.float32(0.01) else 0.0

    order = sorted(taken_in_order(table), key=lambda row: -price(row))  # stable: then as without prices
    table_of = [[row[c] for c in COLUMNS] for row in order]
    fitting = [n for n in range(len(order) + 1) if len(naive_file(make_table(table_of[:n]))) < limit]
    outcome, _ = _fit_once(in_parts(table, part), limit, SubmissionFormat(), prices, distinct=False)
    assert outcome.kept.sort(COLUMNS).equals(make_table(table_of[: max(fitting)]).sort(COLUMNS))
    assert outcome.size_bytes == len(naive_file(outcome.kept)) < limit
    for category_id, threshold in outcome.class_thresholds.items():
        mine = [row for row in order if row["category_id"] == category_id]
        kept = outcome.kept.filter(pl.col("category_id") == category_id).height
        above = sum(row["score"] > threshold for row in mine)
        assert above <= kept <= above + sum(row["score"] == threshold for row in mine)


def test_thresholds_lie_just_below_the_last_score_that_is_in() -> None:
    prices = prices_of(a=[(0.9, 5.0), (0.5, 2.0)], b=[(0.25, 3.0)], c=[])

    def below(score: float) -> float:
        return float(np.nextafter(np.float32(score), np.float32(0)))

    # Levels: 5.0 is 3, 3.0 is 2, 2.0 is 1, nothing is 0.
    assert prices.thresholds(3, 0.95) == {1: 0.95, 2: 1.0, 3: 1.0}
    assert prices.thresholds(2, 0.6) == {1: below(0.9), 2: 0.6, 3: 1.0}
    assert prices.thresholds(1, 0.7) == {1: 0.7, 2: below(0.25), 3: 1.0}
    assert prices.thresholds(0, 0.3) == {1: 0.3, 2: below(0.25), 3: 0.3}


@pytest.mark.parametrize("steps", [[(0.5, 1.0), (0.5, 0.5)], [(0.5, 1.0), (0.4, 2.0)], [(0.5, -1.0)]])
def test_prices_that_are_no_steps_down_are_refused(steps: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="descend"):
        prices_of(a=steps)

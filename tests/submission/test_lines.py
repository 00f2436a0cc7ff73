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
from parkdet.submission.lines import CHUNK_ROWS, SubmissionFormat, decimal_texts, quantised

Table = Callable[..., pl.DataFrame]
Naive = Callable[..., Any]


def texts(values: np.ndarray[Any, Any], decimals: int) -> list[str]:
    return decimal_texts(quantised(values, decimals), decimals).to_list()


def python_text(value: float, decimals: int) -> str:
    """What Python rounds to, without the exponent and the trailing `.0` of its repr."""
    text = format(round(float(value), decimals) + 0.0, f".{decimals}f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.0, 1, "0"),
        (-0.0, 1, "0"),
        (-0.04, 1, "0"),
        (-0.06, 1, "-0.1"),
        (12.0, 1, "12"),
        (10.0, 1, "10"),
        (100.0, 0, "100"),
        (0.25, 1, "0.2"),
        (0.75, 1, "0.8"),
        (0.35, 1, "0.3"),  # the float32 lies above, the float64 below: see the next test
        (1e-5, 5, "0.00001"),
        (0.5, 0, "0"),
        (1.5, 0, "2"),
        (1.0, 4, "1"),
        (0.01005, 4, "0.01"),
        (16_777_216.0, 1, "16777216"),
        (123_456_789.0, 6, "123456789"),
    ],
)
def test_a_number_is_its_shortest_exact_text(value: float, decimals: int, text: str) -> None:
    assert texts(np.array([value], np.float64), decimals) == [text]


def test_no_numbers_have_no_texts() -> None:
    assert texts(np.zeros(0, np.float32), 1) == []


def test_the_exact_binary_value_is_rounded() -> None:
    # 0.35 as float32 is 0.3499999940..., and 0.05 as float32 is 0.0500000007...: above the half.
    assert texts(np.array([0.35, 0.05, 0.15], np.float32), 1) == ["0.3", "0.1", "0.2"]
    # 1.005 as float64 lies below the half, but 1.005 * 100 rounds to 100.49999999999999 or 100.5.
    assert texts(np.array([1.005, 2.675, 0.285, 1.115]), 2) == [python_text(v, 2) for v in (1.005, 2.675, 0.285, 1.115)]


@pytest.mark.parametrize("decimals", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_hundred_thousand_values_round_as_in_python(decimals: int, dtype: type) -> None:
    rng = np.random.default_rng(decimals)
    values: np.ndarray[Any, Any] = np.concatenate(
        [
            rng.random(30_000) * 2000,
            rng.random(30_000),
            # Near and on the halves, where rounding errs.
            (rng.integers(-20_000, 20_000, 20_000) + 0.5) / 10**decimals,
            rng.integers(-(2**20), 2**20, 20_000) / 2**10,
        ]
    ).astype(dtype)
    assert texts(values, decimals) == [python_text(value, decimals) for value in values.tolist()]


@given(st.lists(st.floats(-1e6, 1e6), max_size=20), st.integers(0, 9))
def test_any_float_rounds_as_decimal_arithmetic_does(naive_number: Naive, values: list[float], decimals: int) -> None:
    assert texts(np.array(values, np.float64), decimals) == [naive_number(v, decimals) for v in values]


@pytest.mark.bench
def test_a_million_float32_round_as_in_python() -> None:
    values = (np.random.default_rng(0).random(1_000_000) * 2000).astype(np.float32)
    assert texts(values, 1) == [python_text(value, 1) for value in values.tolist()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_what_has_no_exact_text_is_refused(value: float) -> None:
    with pytest.raises(GateError, match="not finite or too large"):
        quantised(np.array([1.0, value]), 1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 30),
    keys=st.lists(
        st.sampled_from(["image_id", "category_id", "bbox", "score", "segmentation"]), min_size=1, unique=True
    ).filter(lambda keys: keys != ["segmentation"]),
    bbox_decimals=st.integers(0, 6),
    score_decimals=st.integers(1, 9),
)
def test_the_file_is_what_a_naive_writer_writes(
    random_table: Table,
    naive_file: Naive,
    seed: int,
    count: int,
    keys: list[str],
    bbox_decimals: int,
    score_decimals: int,
) -> None:
    table = random_table(count, seed)
    form = SubmissionFormat(keys=tuple(keys), bbox_decimals=bbox_decimals, score_decimals=score_decimals)
    written = b"".join(form.file_chunks(table))
    assert written == naive_file(table, keys, bbox_decimals, score_decimals)
    assert form.line_bytes(table).tolist() == [len(line) for line in form.lines(table)]
    assert (form.line_bytes(table) >= form.shortest_line_bytes).all()
    assert all(list(entry) == keys for entry in json.loads(written))


def test_a_table_longer_than_a_chunk_is_one_list(random_table: Table) -> None:
    table = random_table(CHUNK_ROWS + 3)
    form = SubmissionFormat()
    entries = json.loads(b"".join(form.file_chunks(table)))
    assert [entry["image_id"] for entry in entries] == table["image_id"].to_list()
    assert len(form.line_bytes(table)) == table.height


def test_the_shortest_line_is_the_shortest(make_table: Table) -> None:
    line = make_table([(1, 1, 0, 0, 1, 1, 1)])
    for keys in (("image_id", "category_id", "bbox", "score", "segmentation"), ("score",), ("bbox", "image_id")):
        form = SubmissionFormat(keys=keys)
        assert form.line_bytes(line).tolist() == [form.shortest_line_bytes]


@pytest.mark.parametrize("keys", [("image_id", "id", "mask"), (), ("segmentation",), ("bbox", "bbox")])
def test_keys_that_cannot_be_written_are_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(GateError, match="'id', 'mask'" if len(keys) == 3 else "cannot have"):
        SubmissionFormat(keys=keys)

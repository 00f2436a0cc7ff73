"""How long the cut takes, and how much memory. Run with `pytest -m bench -s tests/submission/test_bench.py`."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from parkdet.submission import check_submission, fit_distinct, write_submission

LIMIT = 20_000_000
IMAGES = dict.fromkeys(range(10_000, 29_521), (1920, 1080))


@pytest.mark.bench
@pytest.mark.parametrize("count", [976_050, 10_000_000])
def test_from_parquet_to_a_checked_file(tmp_path: Path, random_table: Callable[..., pl.DataFrame], count: int) -> None:
    random_table(count).write_parquet(tmp_path / "predictions.parquet")
    check = partial(
        check_submission, image_ids=IMAGES, category_ids=range(1, 15), image_sizes=IMAGES, limit_bytes=LIMIT
    )
    started = time.perf_counter()
    table = pl.read_parquet(tmp_path / "predictions.parquet")
    read = time.perf_counter()
    outcome = fit_distinct(table, LIMIT)
    fitted = time.perf_counter()
    report = write_submission(outcome, tmp_path / "submission.json", check)
    written = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\n{count:,} detections, {report.entry_count:,} kept, {report.size_bytes:,} bytes: "
        f"read {read - started:.2f} s, cut {fitted - read:.2f} s, written and checked {written - fitted:.2f} s; "
        f"the process's most memory {memory:.0f} MiB"
    )
    assert report.size_bytes < LIMIT

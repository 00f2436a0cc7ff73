"""The exact cut: the lowest threshold above which everything fits, then as many of those tied at it as fit.

Detections are ordered by the score as the model gave it, not as it is written: what lies above the
threshold is then in by either reading, and of detections whose written scores are equal the better
ones stay. Detections of exactly the same score go by image, category, then row of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.contest import SUBMISSION_KEYS
from parkdet.runtime.errors import GateError
from parkdet.submission.lines import BRACKETS_BYTES, CHUNK_ROWS, COLUMNS, SubmissionFormat, quantised

_ROW = "row of the table"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """What goes into the file, and how it came about."""

    threshold: float
    """Every detection of a higher score is in; 0 where nothing was cut."""
    kept: pl.DataFrame
    """The detections of the file in its order: by image, best score first."""
    size_bytes: int
    """Exact size of the file."""
    limit_bytes: int
    """The file must be smaller than this."""
    format: SubmissionFormat
    read_count: int
    """Detections of the table."""
    repeated_count: int = 0
    """Left out because they would be written exactly like a better one (`fit_distinct`)."""
    without_area_count: int
    """Left out because the box's width or height is 0 once rounded (or was 0 or less before)."""
    tied_count: int
    """Detections whose score is the threshold itself, where something was cut."""
    tied_kept_count: int
    """Those of them that still fitted."""

    @property
    def kept_count(self) -> int:
        """Detections in the file."""
        return self.kept.height

    @property
    def cut_count(self) -> int:
        """Detections left out for want of room."""
        return self.read_count - self.repeated_count - self.without_area_count - self.kept.height


def fit(
    table: pl.DataFrame,
    limit_bytes: int,
    *,
    keys: Sequence[str] = SUBMISSION_KEYS,
    bbox_decimals: int = 1,
    score_decimals: int = 4,
) -> Fit:
    """The best-scored detections whose file is strictly smaller than `limit_bytes`.

    `table` holds the columns image_id, category_id (integers), x, y, w, h (original pixels) and
    score (0 to 1), rows in any order. Raises GateError where no file is small enough, a score is
    out of range, or a number is not finite.
    """
    form = SubmissionFormat(keys=tuple(keys), bbox_decimals=bbox_decimals, score_decimals=score_decimals)
    table = _typed(table)
    if limit_bytes <= BRACKETS_BYTES:
        raise GateError(
            f"a limit of {limit_bytes} bytes is too small: an empty list takes {BRACKETS_BYTES} bytes and "
            f"the file must be smaller than the limit; allow at least {BRACKETS_BYTES + 1}"
        )
    _require_numbers(table, form)
    rows = table.with_row_index(_ROW).filter(pl.Series(has_area(table, form), dtype=pl.Boolean))
    ordered = _best(rows, limit_bytes, form)
    count, size = _prefix_that_fits(ordered, limit_bytes, form)

    threshold, tied_count, tied_kept_count = 0.0, 0, 0
    if count < rows.height:
        threshold = float(ordered["score"][count])
        tied_count = int((rows["score"] == threshold).sum())
        tied_kept_count = int((ordered["score"][:count] == threshold).sum())
    kept = ordered[:count].sort(["image_id", "score", "category_id", _ROW], descending=[False, True, False, False])
    return Fit(
        threshold=threshold,
        kept=kept.drop(_ROW),
        size_bytes=size,
        limit_bytes=limit_bytes,
        format=form,
        read_count=table.height,
        without_area_count=table.height - rows.height,
        tied_count=tied_count,
        tied_kept_count=tied_kept_count,
    )


def fit_distinct(
    table: pl.DataFrame,
    limit_bytes: int,
    *,
    keys: Sequence[str] = SUBMISSION_KEYS,
    bbox_decimals: int = 1,
    score_decimals: int = 4,
) -> Fit:
    """`fit` for a file that a judge reads: no detection in it twice, as small boxes can be once rounded."""
    fitted = fit(table, limit_bytes, keys=keys, bbox_decimals=bbox_decimals, score_decimals=score_decimals)
    if without_repeats(fitted.kept, fitted.format).height == fitted.kept_count:
        return fitted
    distinct = without_repeats(table, fitted.format)
    fitted = fit(distinct, limit_bytes, keys=keys, bbox_decimals=bbox_decimals, score_decimals=score_decimals)
    return replace(fitted, read_count=table.height, repeated_count=table.height - distinct.height)


def has_area(table: pl.DataFrame, form: SubmissionFormat) -> NDArray[np.bool_]:
    """Which boxes (N,) still have an area as they would be written."""
    with_area = np.ones(table.height, np.bool_)
    if "bbox" in form.keys:
        for side in ("w", "h"):
            values = table[side].to_numpy()
            with_area &= values > 0
            # A value of a whole step or more cannot round to 0.
            small = np.flatnonzero(with_area & (values < 10.0**-form.bbox_decimals))
            with_area[small] = quantised(values[small], form.bbox_decimals) > 0
    return with_area


def without_repeats(table: pl.DataFrame, form: SubmissionFormat) -> pl.DataFrame:
    """The table without detections that would be written exactly like one of an equal or better score."""
    written = {
        name: pl.Series(quantised(table[name].to_numpy(), form.decimals(name)))
        for name in form.columns
        if name in COLUMNS[2:]
    }
    best_first = (
        table.select(*COLUMNS[:2], exact="score")
        .with_columns(**written)
        .with_row_index(_ROW)
        .sort("exact", descending=True, maintain_order=True)
    )
    first = best_first.unique(list(form.columns), keep="first", maintain_order=True)
    return table[first[_ROW].sort()]


def _best(rows: pl.DataFrame, limit_bytes: int, form: SubmissionFormat) -> pl.DataFrame:
    """The rows in the order in which they are taken; of those that cannot fit, at least the first."""
    # As many lines as would fit were each the shortest, and one more: of ten million detections only
    # these few need sorting and measuring.
    most = (limit_bytes - BRACKETS_BYTES) // (form.shortest_line_bytes + 1) + 2
    if most < rows.height:
        scores = rows["score"].to_numpy()
        lowest = np.partition(scores, len(scores) - most)[len(scores) - most]
        rows = rows.filter(pl.Series(scores >= lowest))
    return rows.sort(["score", "image_id", "category_id", _ROW], descending=[True, False, False, False])


def _prefix_that_fits(ordered: pl.DataFrame, limit_bytes: int, form: SubmissionFormat) -> tuple[int, int]:
    """How many of the first rows fit, and the size of the file that holds them."""
    # The first line has no comma before it, so the empty file counts as one byte less.
    size = BRACKETS_BYTES - 1
    for start in range(0, ordered.height, CHUNK_ROWS):
        line_bytes = form.line_bytes(ordered[start : start + CHUNK_ROWS])
        sizes = size + np.cumsum(line_bytes + 1)
        fitting = int(np.searchsorted(sizes, limit_bytes, side="left"))
        size = int(sizes[fitting - 1]) if fitting else size
        if fitting < len(sizes):
            return start + fitting, max(size, BRACKETS_BYTES)
    return ordered.height, max(size, BRACKETS_BYTES)


def _typed(table: pl.DataFrame) -> pl.DataFrame:
    """The seven columns; boxes and scores as floats."""
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"the table lacks the columns {missing}; it has {table.columns}")
    for name in COLUMNS:
        dtype = table.schema[name]
        number = dtype.is_integer() or (name not in COLUMNS[:2] and dtype in (pl.Float32, pl.Float64))
        if not number and dtype != pl.Null:
            raise ValueError(f"column {name} is {dtype}; ids are integers, boxes and scores floats")
    ids, numbers = COLUMNS[:2], COLUMNS[2:]
    return table.select(
        *(pl.col(name).cast(pl.Int64) if table.schema[name] == pl.Null else name for name in ids),
        *(name if table.schema[name].is_float() else pl.col(name).cast(pl.Float64) for name in numbers),
    )


def _require_numbers(table: pl.DataFrame, form: SubmissionFormat) -> None:
    """No detection may be unwritable, kept or not: predictions that hold one are not to be trusted."""
    for name in COLUMNS:
        nulls = table[name].null_count()
        if nulls:
            raise GateError(f"{nulls} detections have no {name}")
    for name in COLUMNS[2:]:
        finite = table[name].is_finite()
        if not finite.all():
            example = table.row(int(finite.arg_min() or 0), named=True)
            raise GateError(
                f"{int((~finite).sum())} detections have a {name} that is not finite, "
                f"e.g. of image {example['image_id']}"
            )
    # Rounding keeps the order, so the extremes stand for all.
    extremes = pl.Series([table["score"].min(), table["score"].max()]) if table.height else table["score"]
    steps = quantised(extremes.to_numpy(), form.score_decimals)
    if ((steps < 0) | (steps > 10**form.score_decimals)).any():
        raise GateError(f"scores go from {extremes[0]} to {extremes[-1]}; a submission's lie within 0 to 1")

"""The exact cut: the lowest threshold above which everything fits, then as many of those tied at it as fit.

Detections are ordered by the score as the model gave it, not as it is written: what lies above the
threshold is then in by either reading, and of detections whose written scores are equal the better
ones stay. Detections of exactly the same score go by image, category, then row of the table.

With `Prices` what a detection's bytes buy comes first and its score second; within a class the order is
still that of the scores, so every class has one threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.contest import SUBMISSION_KEYS
from parkdet.runtime.errors import GateError
from parkdet.submission.lines import BRACKETS_BYTES, CHUNK_ROWS, COLUMNS, SubmissionFormat, quantised
from parkdet.submission.prices import Prices

HISTOGRAM_BINS = 50
"""Equal bins of scores from 0 to 1 in which what was read is counted."""

Batches = Callable[[], Iterable[pl.DataFrame]]
"""Called once or twice; each time it gives the same tables in the same order."""

_ROW = "row of the table"
_LEVEL = "level of its price"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """What goes into the file, and how it came about."""

    threshold: float
    """Every detection of a higher score is in (with prices: of those of the last price that still fitted); 0
    where nothing was cut."""
    class_thresholds: Mapping[int, float] = field(default_factory=dict)
    """With prices, by category: every detection of a higher score is in. Empty where one threshold is for all."""
    kept: pl.DataFrame
    """The detections of the file in its order: by image, best score first."""
    size_bytes: int
    """Exact size of the file."""
    limit_bytes: int
    """The file must be smaller than this."""
    format: SubmissionFormat
    read_count: int
    """Detections of the table."""
    read_by_category: Mapping[int, int]
    """Detections of the table, by category id."""
    score_counts: NDArray[np.int64]
    """(HISTOGRAM_BINS,) detections of the table by score."""
    repeated_count: int = 0
    """Of those that came into question, left out because they would be written exactly like a better one."""
    without_area_count: int
    """Left out because the box's width or height is 0 once rounded (or was 0 or less before)."""
    tied_count: int
    """Detections at the threshold itself, where something was cut."""
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
    prices: Prices | None = None,
) -> Fit:
    """The best-scored detections whose file is strictly smaller than `limit_bytes`.

    `table` holds the columns image_id, category_id (integers), x, y, w, h (original pixels) and
    score (0 to 1), rows in any order. Raises GateError where no file is small enough, a score is
    out of range, or a number is not finite.
    """
    form = SubmissionFormat(keys=tuple(keys), bbox_decimals=bbox_decimals, score_decimals=score_decimals)
    return _fit_once(lambda: [table], limit_bytes, form, prices, distinct=False)[0]


def fit_distinct(
    table: pl.DataFrame,
    limit_bytes: int,
    *,
    keys: Sequence[str] = SUBMISSION_KEYS,
    bbox_decimals: int = 1,
    score_decimals: int = 4,
    prices: Prices | None = None,
) -> Fit:
    """`fit` for a file that a judge reads: no detection in it twice, as small boxes can be once rounded."""
    form = SubmissionFormat(keys=tuple(keys), bbox_decimals=bbox_decimals, score_decimals=score_decimals)
    return fit_batches(lambda: [table], limit_bytes, form, prices)


def fit_batches(batches: Batches, limit_bytes: int, form: SubmissionFormat, prices: Prices | None = None) -> Fit:
    """`fit_distinct` of a table that comes in parts: in memory are a part, and what may still fit.

    Rows are numbered through all parts, so the outcome is that of the whole table.
    """
    fitted, tried = _fit_once(batches, limit_bytes, form, prices, distinct=False)
    # The first that no longer fits too: where it is a repeat, a shorter line behind it may fit.
    if without_repeats(tried, form).height == tried.height:
        return fitted
    return _fit_once(batches, limit_bytes, form, prices, distinct=True)[0]


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
        .with_row_index("place")
        .sort("exact", descending=True, maintain_order=True)
    )
    first = best_first.unique(list(form.columns), keep="first", maintain_order=True)
    return table[first["place"].sort()]


def _fit_once(
    batches: Batches, limit_bytes: int, form: SubmissionFormat, prices: Prices | None, distinct: bool
) -> tuple[Fit, pl.DataFrame]:
    """The cut; and what was tried for it: the detections kept and, where one is left out, the first of those."""
    if limit_bytes <= BRACKETS_BYTES:
        raise GateError(
            f"a limit of {limit_bytes} bytes is too small: an empty list takes {BRACKETS_BYTES} bytes and "
            f"the file must be smaller than the limit; allow at least {BRACKETS_BYTES + 1}"
        )
    best = _Best(limit_bytes, form, prices, distinct)
    for batch in batches():
        best.add(batch)
    ordered = best.ordered()
    count, size = _prefix_that_fits(ordered, limit_bytes, form)
    threshold, level, tied_count, tied_kept_count = 0.0, 0, 0, 0
    if count < best.usable_count:
        threshold, level = float(ordered["score"][count]), int(ordered[_LEVEL][count])
        at_it = ((ordered["score"] == threshold) & (ordered[_LEVEL] == level)).to_numpy()
        tied_count = int(at_it.sum()) + best.dropped_at(level, threshold)
        tied_kept_count = int(at_it[:count].sum())
    kept = ordered[:count].sort(["image_id", "score", "category_id", _ROW], descending=[False, True, False, False])
    cut_with_prices = prices is not None and count < best.usable_count
    fitted = Fit(
        threshold=threshold,
        class_thresholds=prices.thresholds(level, threshold) if prices is not None and cut_with_prices else {},
        kept=kept.drop(_ROW, _LEVEL),
        size_bytes=size,
        limit_bytes=limit_bytes,
        format=form,
        read_count=best.read_count,
        read_by_category=dict(sorted(best.by_category.items())),
        score_counts=best.score_counts,
        repeated_count=best.repeated_count,
        without_area_count=best.without_area_count,
        tied_count=tied_count,
        tied_kept_count=tied_kept_count,
    )
    return fitted, ordered[: count + 1]


class _Best:
    """The detections that may still fit, while the others pass by.

    As many lines as would fit were each the shortest, and one more: of ten million detections only these
    few need to be kept, sorted and measured.
    """

    def __init__(self, limit_bytes: int, form: SubmissionFormat, prices: Prices | None, distinct: bool) -> None:
        self._most = (limit_bytes - BRACKETS_BYTES) // (form.shortest_line_bytes + 1) + 2
        self._form = form
        self._prices = prices
        self._distinct = distinct
        self._parts: list[pl.DataFrame] = []
        self._part_rows = 0
        self._floor: tuple[int, float] | None = None
        self._floor_dropped = 0
        self.read_count = 0
        self.without_area_count = 0
        self.repeated_count = 0
        self.by_category: dict[int, int] = {}
        self.score_counts = np.zeros(HISTOGRAM_BINS, np.int64)

    @property
    def usable_count(self) -> int:
        """Detections read that could be in the file."""
        return self.read_count - self.without_area_count - self.repeated_count

    def add(self, batch: pl.DataFrame) -> None:
        """Takes in more rows of the table. Raises as `fit`."""
        table = _typed(batch)
        _require_numbers(table, self._form)
        for category_id, count in table["category_id"].value_counts().iter_rows():
            self.by_category[category_id] = self.by_category.get(category_id, 0) + count
        self.score_counts += np.histogram(table["score"].to_numpy(), bins=HISTOGRAM_BINS, range=(0.0, 1.0))[0]
        rows = table.with_row_index(_ROW, offset=self.read_count).with_columns(pl.col(_ROW).cast(pl.Int64))
        self.read_count += table.height
        with_area = has_area(table, self._form)
        self.without_area_count += int(table.height - with_area.sum())
        levels = np.zeros(table.height, np.int32) if self._prices is None else self._prices.levels(table)
        rows = rows.with_columns(pl.Series(_LEVEL, levels))
        if not with_area.all():
            rows = rows.filter(pl.Series(with_area))
        if self._floor is not None:
            level, score = self._floor
            rows = rows.filter((pl.col(_LEVEL) > level) | (pl.col(_LEVEL) == level) & (pl.col("score") >= score))
        self._parts.append(rows)
        self._part_rows += rows.height
        if self._part_rows > 4 * self._most:
            self._compact()

    def ordered(self) -> pl.DataFrame:
        """The rows in the order in which they are taken; of those that cannot fit, at least the first."""
        rows = self._compact()
        return rows.sort(
            [_LEVEL, "score", "image_id", "category_id", _ROW], descending=[True, True, False, False, False]
        )

    def dropped_at(self, level: int, score: float) -> int:
        """How many rows of exactly this price and score are not among `ordered`."""
        return self._floor_dropped if self._floor == (level, score) else 0

    def _compact(self) -> pl.DataFrame:
        rows = pl.concat(self._parts) if self._parts else _empty()
        if self._distinct:
            distinct = without_repeats(rows, self._form)
            self.repeated_count += rows.height - distinct.height
            rows = distinct
        if rows.height > self._most:
            # Ascending with (level, score); where a float64 cannot tell two apart both stay.
            keys = rows[_LEVEL].to_numpy() + rows["score"].to_numpy().astype(np.float64)
            lowest = np.partition(keys, len(keys) - self._most)[len(keys) - self._most]
            rows = rows.filter(pl.Series(keys >= lowest))
            if rows.height > 2 * self._most:  # most are tied
                rows = self._without_excess(rows)
        self._parts, self._part_rows = [rows], rows.height
        if rows.height >= self._most:
            self._raise_floor(rows)
        return rows

    def _without_excess(self, rows: pl.DataFrame) -> pl.DataFrame:
        ordered = rows.sort(
            [_LEVEL, "score", "image_id", "category_id", _ROW], descending=[True, True, False, False, False]
        )
        kept, dropped = ordered[: self._most], ordered[self._most :]
        floor = (int(kept[_LEVEL][-1]), float(kept["score"][-1]))
        tied = int(((dropped[_LEVEL] == floor[0]) & (dropped["score"] == floor[1])).sum())
        self._floor_dropped = tied + self.dropped_at(*floor)
        self._floor = floor
        return kept.sort(_ROW)

    def _raise_floor(self, rows: pl.DataFrame) -> None:
        level = int(rows[_LEVEL].min())  # type: ignore[arg-type]  # a column of integers
        floor = (level, float(rows.filter(pl.col(_LEVEL) == level)["score"].min()))  # type: ignore[arg-type]
        if floor != self._floor:
            self._floor, self._floor_dropped = floor, 0


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


def _empty() -> pl.DataFrame:
    ids, numbers = dict.fromkeys(COLUMNS[:2], pl.Int64), dict.fromkeys(COLUMNS[2:], pl.Float32)
    return pl.DataFrame(schema={_ROW: pl.Int64, **ids, **numbers, _LEVEL: pl.Int32})


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

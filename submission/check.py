"""Reads a submission, whoever wrote it, and finds everything for which a judge would refuse it."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from parkdet.runtime.contest import SUBMISSION_KEYS
from parkdet.runtime.errors import UsageError
from parkdet.submission.entries import EntryColumns, entry_columns
from parkdet.submission.findings import EXAMPLES, CheckReport, Kind, Tally
from parkdet.submission.json_stream import BadJson, NotAList, json_blocks
from parkdet.submission.spill import Spill, bits


def check_submission(
    path: Path,
    image_ids: Collection[int],
    category_ids: Collection[int],
    image_sizes: Mapping[int, tuple[int, int]],
    limit_bytes: int,
    *,
    keys: Sequence[str] = SUBMISSION_KEYS,
    bbox_decimals: int = 1,
) -> CheckReport:
    """Reads a JSON file of any size in bounded memory: beyond half a million entries what is remembered of them, to
    find those that are there twice, goes to temporary files (64 bytes an entry, in TMPDIR).

    `image_sizes` gives (width, height) in pixels; of an image that it lacks only the box's left and top
    are checked. A box may lie over the edge by one rounding step, 10^-`bbox_decimals` pixels.
    Raises UsageError where there is no such file.
    """
    path = Path(path)
    require_file(path)
    size_bytes = path.stat().st_size
    tally = Tally()
    rules = _ValueRules(image_ids, category_ids, image_sizes, 10.0**-bbox_decimals, tally)
    entry_count = 0
    with _Repeats() as repeats, no_garbage_collection():
        try:
            for entries in json_blocks(path, len(keys)):
                columns = entry_columns(entries, entry_count, keys, tally)
                entry_count += len(entries)
                if len(columns):
                    rules.apply(columns)
                    repeats.remember(columns)
        except NotAList as error:
            tally.add(Kind.NOT_A_LIST, [str(error)])
        except BadJson as error:
            tally.add(Kind.NOT_JSON, [str(error)])
        repeats.find(tally)
    if size_bytes >= limit_bytes:
        tally.add(Kind.TOO_LARGE, [f"{size_bytes:,} bytes, limit {limit_bytes:,}"])
    return CheckReport(path=path, entry_count=entry_count, size_bytes=size_bytes, findings=tally.findings())


def require_file(path: Path) -> None:
    """Raises UsageError where there is no file to read."""
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        raise UsageError(f"{path}: is not a file; name a submission's JSON file")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Decoded JSON holds no cycles; looking for them takes longer than decoding it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _ValueRules:
    """Ids, ranges and boxes of sound entries, a block of them at once."""

    def __init__(
        self,
        image_ids: Collection[int],
        category_ids: Collection[int],
        image_sizes: Mapping[int, tuple[int, int]],
        step: float,
        tally: Tally,
    ) -> None:
        self._image_ids = np.array(sorted(set(image_ids)), np.int64)
        sizes = [image_sizes.get(int(image_id), (np.inf, np.inf)) for image_id in self._image_ids]
        # The last row is for images that are not in the test set: they have no edge.
        self._image_wh = np.array([*sizes, (np.inf, np.inf)], np.float64)
        self._category_ids = np.array(sorted(set(category_ids)), np.int64)
        self._step = step
        self._tally = tally

    def apply(self, columns: EntryColumns) -> None:
        """Counts what is wrong with the entries' values."""
        image_wh = np.full((len(columns), 2), np.inf)
        if len(columns.image_ids):
            rows = np.searchsorted(self._image_ids, columns.image_ids)
            known = np.isin(columns.image_ids, self._image_ids)
            image_wh = self._image_wh[np.where(known, rows, -1)]
            self._mark(Kind.UNKNOWN_IMAGE, ~known, columns.indices, "image_id", columns.image_ids)
        if len(columns.category_ids):
            unknown = np.isin(columns.category_ids, self._category_ids, invert=True)
            self._mark(Kind.UNKNOWN_CATEGORY, unknown, columns.indices, "category_id", columns.category_ids)
        if len(columns.scores):
            finite = np.abs(columns.scores) < np.inf
            out_of_range = (columns.scores < 0) | (columns.scores > 1)
            self._mark(Kind.NOT_FINITE, ~finite, columns.indices, "score", columns.scores)
            self._mark(Kind.SCORE_RANGE, finite & out_of_range, columns.indices, "score", columns.scores)
        if len(columns.xywh):
            self._apply_to_boxes(columns.xywh, columns.indices, image_wh)

    def _apply_to_boxes(
        self, xywh: NDArray[np.float64], indices: NDArray[np.int64], image_wh: NDArray[np.float64]
    ) -> None:
        infinite = (~np.isfinite(xywh)).any(axis=1)
        self._mark(Kind.NOT_FINITE, infinite, indices, "bbox", xywh)
        xywh, indices, image_wh = xywh[~infinite], indices[~infinite], image_wh[~infinite]
        # The product too: that of two tiny sides is 0.
        with np.errstate(over="ignore", under="ignore"):
            no_area = (xywh[:, 2:] <= 0).any(axis=1) | (xywh[:, 2] * xywh[:, 3] == 0)
        self._mark(Kind.NO_AREA, no_area, indices, "bbox", xywh)
        # Besides the step of the text, the last place of a float32 as large as the image: writers take
        # w as the difference of two float32.
        finest = np.where(np.isfinite(image_wh), image_wh, 0) * 2.0**-22
        slack = self._step * (1 + 1e-6) + finest
        before = (xywh[:, :2] < -slack).any(axis=1)
        with np.errstate(over="ignore"):
            beyond = (xywh[:, :2] + xywh[:, 2:] > image_wh + slack).any(axis=1)
        self._mark(Kind.OUT_OF_IMAGE, before | beyond, indices, "bbox", xywh, image_wh)

    def _mark(
        self,
        kind: Kind,
        wrong: ArrayLike,
        indices: NDArray[np.int64],
        key: str,
        values: NDArray[Any],
        image_wh: NDArray[np.float64] | None = None,
    ) -> None:
        rows = np.flatnonzero(wrong)
        if not len(rows):
            return
        examples = [f"[{indices[row]}] {key} {values[row].tolist()}" for row in rows[:EXAMPLES]]
        if image_wh is not None:
            sizes = [f"{image_wh[row, 0]:g} x {image_wh[row, 1]:g}" for row in rows[:EXAMPLES]]
            examples = [f"{example} in {size}" for example, size in zip(examples, sizes, strict=True)]
        self._tally.add(kind, examples, len(rows))


class _Repeats(ExitStack):
    """Finds detections that were there before, by all their numbers."""

    def __init__(self) -> None:
        super().__init__()
        # Rows of an index and seven numbers, grouped by the latter.
        self._spill = self.enter_context(Spill(8, slice(1, 8), self._thinned))
        self._left_out = 0

    def _thinned(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each detection the first rows of a block: one that may be no repeat, and the examples that it may give."""
        table = pl.DataFrame({str(number): rows[:, number] for number in range(1, 8)})
        rank = table.select(rank=pl.int_range(pl.len()).over(table.columns)).to_series().to_numpy()
        kept = rows[rank <= EXAMPLES]
        self._left_out += len(rows) - len(kept)
        return kept

    def remember(self, columns: EntryColumns) -> None:
        rows = np.zeros((len(columns), 8), np.int64)
        rows[:, 0] = columns.indices
        if len(columns.image_ids):
            rows[:, 1] = columns.image_ids
        if len(columns.category_ids):
            rows[:, 2] = columns.category_ids
        if len(columns.xywh):
            rows[:, 3:7] = bits(columns.xywh)
        if len(columns.scores):
            rows[:, 7] = bits(columns.scores)
        self._spill.add(rows)

    def find(self, tally: Tally) -> None:
        """Counts them; the first of the file are the examples."""
        count = 0
        found: list[tuple[int, int]] = []
        for rows in self._spill.parts():
            # By one hash first: of a sound file hardly a row is then left to compare.
            table = pl.DataFrame({str(number): rows[:, number] for number in range(1, 8)})
            hashed = table.hash_rows(seed=2).to_numpy()
            ascending = np.sort(hashed)
            twice = ascending[1:][ascending[1:] == ascending[:-1]]
            if not len(twice):
                continue
            suspects = rows[np.isin(hashed, twice)]
            ordered = suspects[np.lexsort(suspects.T)]  # by the index last of all: the first column counts least
            again = np.concatenate(([False], (ordered[1:, 1:] == ordered[:-1, 1:]).all(axis=1)))
            first = np.maximum.accumulate(np.where(again, 0, np.arange(len(ordered))))
            pairs = np.column_stack((ordered[again, 0], ordered[first[again], 0]))
            count += len(pairs)
            found = sorted(found + [(int(one), int(other)) for one, other in pairs[np.argsort(pairs[:, 0])][:EXAMPLES]])
        count += self._left_out
        if count:
            tally.add(Kind.REPEATED, [f"[{one}] is [{other}] again" for one, other in found[:EXAMPLES]], count)

"""How two submissions differ, whoever wrote them and however large they are: detection by detection, exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.contest import SUBMISSION_KEYS
from parkdet.runtime.errors import DataError
from parkdet.submission.check import no_garbage_collection, require_file
from parkdet.submission.entries import EntryColumns, entry_columns
from parkdet.submission.findings import EXAMPLES, Tally
from parkdet.submission.json_stream import BadJson, json_blocks
from parkdet.submission.spill import Spill, bits, floats

_BOX = ("image", "category", "x", "y", "w", "h")
_COLUMNS = ("file", "index", *_BOX, "score")


@dataclass(slots=True)
class _Side:
    """One of the two files."""

    path: Path
    size_bytes: int
    keys: tuple[str, ...] = ()
    """Of its first entry."""
    entry_count: int = 0
    only: int = 0
    """Entries that the other lacks."""
    examples: list[tuple[int, str]] = field(default_factory=list)
    """(index in the list, what is there)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffReport:
    """What two files have in common, and what not."""

    sides: tuple[_Side, _Side]
    both: int
    """Entries that both hold: the same numbers, however they are written."""
    rescored: int
    """Pairs among the others of the same image, category and box, with another score."""
    largest_score_change: float
    same_order: bool
    same_bytes: bool

    @property
    def is_same(self) -> bool:
        """Whether both hold the same entries with the same keys, in whatever order and layout."""
        first, second = self.sides
        return not first.only and not second.only and set(first.keys) == set(second.keys)

    def __str__(self) -> str:
        lines = [f"{side.path}: {side.entry_count:,} entries, {side.size_bytes:,} bytes" for side in self.sides]
        if self.same_bytes:
            return "\n".join([*lines, "equal to the byte"])
        first, second = self.sides
        lines.append(f"in both: {self.both:,}")
        for side in self.sides:
            if side.only:
                more = "; ..." if side.only > len(side.examples) else ""
                shown = "; ".join(f"[{index}] {text}" for index, text in sorted(side.examples))
                lines.append(f"only in {side.path}: {side.only:,} ({shown}{more})")
        if self.rescored:
            lines.append(
                f"of these the same box with another score: {self.rescored:,}, by up to {self.largest_score_change:.6g}"
            )
        for side, other in ((first, second), (second, first)):
            if missing := [key for key in side.keys if key not in other.keys]:
                lines.append(f"keys only in {side.path}: {', '.join(missing)}")
        if self.is_same:
            order = "in the same order" if self.same_order else "in another order"
            lines.append(f"the same detections, {order}, written differently")
        return "\n".join(lines)


def diff_submissions(first: Path, second: Path) -> DiffReport:
    """Compares two JSON lists of any size as multisets of entries; in memory are, with a hundredth of them, all of
    the same image, category and box.

    Detections are compared by the numbers of the keys that both files have; other entries by their JSON, keys in
    any order. Raises UsageError where there is no such file, DataError where one is no JSON list.
    """
    for path in (first, second):
        require_file(path)
    sides = (_Side(first, first.stat().st_size), _Side(second, second.stat().st_size))
    for side in sides:
        side.keys = _first_keys(side.path)
    keys = [key for key in SUBMISSION_KEYS if all(key in side.keys for side in sides)]
    if _same_bytes(first, second):
        count = sum(map(len, _entries(first, len(sides[0].keys))))
        for side in sides:
            side.entry_count = count
        return DiffReport(
            sides=sides, both=count, rescored=0, largest_score_change=0.0, same_order=True, same_bytes=True
        )
    both, rescored, largest = 0, 0, 0.0
    with (
        Spill(len(_COLUMNS), slice(2, 8)) as detections,
        Spill(4, slice(2, 4)) as others,
        no_garbage_collection(),
    ):
        orders = [_read(side, number, keys, detections, others) for number, side in enumerate(sides)]
        for part in detections.parts():
            common, changed, change = _compare(part, sides)
            both, rescored, largest = both + common, rescored + changed, max(largest, change)
        for part in others.parts():
            both += _compare_others(part, sides)
    return DiffReport(
        sides=sides,
        both=both,
        rescored=rescored,
        largest_score_change=largest,
        same_order=orders[0] == orders[1],
        same_bytes=False,
    )


def _entries(path: Path, key_count: int) -> Iterator[list[Any]]:
    try:
        yield from json_blocks(path, key_count)
    except BadJson as error:
        raise DataError(f"{path}: is no JSON list ({error}); 'parkdet submit --check' says what is wrong") from error


def _first_keys(path: Path) -> tuple[str, ...]:
    for entries in _entries(path, len(SUBMISSION_KEYS)):
        for entry in entries:
            return tuple(entry) if isinstance(entry, dict) else ()
    return SUBMISSION_KEYS


def _read(side: _Side, number: int, keys: Sequence[str], detections: Spill, others: Spill) -> bytes:
    """All entries of a file into the spills; a checksum of them in their order."""
    # Two checksums, because files are read in blocks that end at different entries: of the detections in their
    # order, and of the others with their places among them.
    order, others_order = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for entries in _entries(side.path, len(side.keys)):
        columns = _columns(entries, side, keys)
        rows = np.zeros((len(columns), len(_COLUMNS)), np.int64)
        rows[:, 0], rows[:, 1] = number, columns.indices
        if "image_id" in keys:
            rows[:, 2] = columns.image_ids
        if "category_id" in keys:
            rows[:, 3] = columns.category_ids
        if "bbox" in keys:
            rows[:, 4:8] = bits(columns.xywh)
        if "score" in keys:
            rows[:, 8] = bits(columns.scores)
        detections.add(rows)
        order.update(np.ascontiguousarray(rows[:, 2:]).tobytes())
        sound = set((columns.indices - side.entry_count).tolist())
        if len(sound) < len(entries):
            unsound = [place for place in range(len(entries)) if place not in sound]
            digests = [_digest(entries[place]) for place in unsound]
            texts = np.frombuffer(b"".join(digests), np.int64).reshape(-1, 2)
            places = np.array(unsound, np.int64) + side.entry_count
            others.add(np.column_stack((np.full(len(texts), number), places, texts)))
            others_order.update(np.column_stack((places, texts)).tobytes())
        side.entry_count += len(entries)
    return order.digest() + others_order.digest()


def _columns(entries: list[Any], side: _Side, keys: Sequence[str]) -> EntryColumns:
    """The entries that are detections with the file's own keys; nothing is said of the others."""
    known = [key for key in side.keys if key in SUBMISSION_KEYS]
    if not keys or len(known) < len(side.keys):
        # Values under unknown keys count too: such entries are compared as they stand.
        return entry_columns([], side.entry_count, SUBMISSION_KEYS, Tally())
    return entry_columns(entries, side.entry_count, known, Tally())


def _digest(entry: Any) -> bytes:
    text = json.dumps(entry, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _compare(part: NDArray[np.int64], sides: tuple[_Side, _Side]) -> tuple[int, int, float]:
    """In both, the same box with another score, and the largest such change; what is left goes to the sides."""
    table = pl.DataFrame({name: part[:, number] for number, name in enumerate(_COLUMNS)})
    table = table.sort([*_BOX, "score", "file", "index"])
    of_file = [(pl.col("file") == number).sum() for number in range(2)]
    exact = [*_BOX, "score"]
    shared = pl.min_horizontal(*(count.over(exact) for count in of_file))
    left = table.filter(pl.int_range(pl.len()).over([*exact, "file"]) >= shared)
    for number, side in enumerate(sides):
        _leave(side, left.filter(pl.col("file") == number))
    pairable = left.with_columns(number=floats(left["score"].to_numpy())).sort([*_BOX, "file", "number"])
    pairable = pairable.with_columns(rank=pl.int_range(pl.len()).over([*_BOX, "file"]))
    halves = [pairable.filter(pl.col("file") == number).select(*_BOX, "rank", "number") for number in range(2)]
    pairs = halves[0].join(halves[1], on=[*_BOX, "rank"], how="inner")
    changes = (pairs["number"] - pairs["number_right"]).abs().to_numpy()
    return (table.height - left.height) // 2, pairs.height, float(np.nanmax(changes, initial=0.0))


def _leave(side: _Side, left: pl.DataFrame) -> None:
    side.only += left.height
    for row in left.sort("index").head(EXAMPLES).iter_rows(named=True):
        box = floats(np.array([row[name] for name in "xywh"], np.int64)).tolist()
        score = floats(np.array([row["score"]], np.int64))[0]
        side.examples.append((row["index"], f"image {row['image']} category {row['category']} {box} score {score:g}"))
    side.examples = sorted(side.examples)[:EXAMPLES]


def _compare_others(part: NDArray[np.int64], sides: tuple[_Side, _Side]) -> int:
    table = pl.DataFrame({name: part[:, number] for number, name in enumerate(("file", "index", "high", "low"))})
    table = table.sort(["high", "low", "file", "index"])
    of_file = [(pl.col("file") == number).sum().over(["high", "low"]) for number in range(2)]
    left = table.filter(pl.int_range(pl.len()).over(["high", "low", "file"]) >= pl.min_horizontal(*of_file))
    for number, side in enumerate(sides):
        mine = left.filter(pl.col("file") == number)
        side.only += mine.height
        side.examples += [(index, "is no detection") for index in mine["index"].sort().head(EXAMPLES).to_list()]
        side.examples = sorted(side.examples)[:EXAMPLES]
    return (table.height - left.height) // 2


def _same_bytes(first: Path, second: Path) -> bool:
    with first.open("rb") as one, second.open("rb") as other:
        while True:
            block = one.read(1 << 20)
            if block != other.read(1 << 20):
                return False
            if not block:
                return True

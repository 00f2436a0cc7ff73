"""A detection as one line of the submission: its exact text, and the bytes of that text.

Numbers are the shortest exact decimal text of the rounded value: `12`, not `12.0`; `0.0001`, not
`1e-04`; never `-0`. A JSON parser reads both forms as the same number, and each byte saved keeps
another detection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.contest import SUBMISSION_KEYS
from parkdet.runtime.errors import GateError

COLUMNS = ("image_id", "category_id", "x", "y", "w", "h", "score")
"""A table of predictions has these columns, boxes in pixels of the original image."""

BRACKETS_BYTES = 2
"""The `[` and `]` around the list: the size of a submission without detections."""

CHUNK_ROWS = 100_000
"""Texts exist for this many rows at a time, about 10 MB of them."""

_MAX_DECIMALS = 9
# Above this a float64 no longer holds every integer, so a rounded value would not be exact.
_MAX_STEPS = 2.0**53
_POWERS_OF_TEN = 10 ** np.arange(1, 19)
# Veltkamp's constant: splits a float64 in two halves whose products are exact.
_SPLITTER = 2.0**27 + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmissionFormat:
    """Which keys a line holds, in which order, and how its numbers are rounded."""

    keys: tuple[str, ...] = SUBMISSION_KEYS
    bbox_decimals: int = 1
    score_decimals: int = 4

    def __post_init__(self) -> None:
        unknown = [key for key in self.keys if key not in SUBMISSION_KEYS]
        if unknown:
            raise GateError(
                f"the sample submission asks for {', '.join(map(repr, unknown))}, which predictions do not "
                f"hold (known keys: {', '.join(SUBMISSION_KEYS)}); mend sample_submission.json"
            )
        if not set(self.keys) - {"segmentation"} or len(set(self.keys)) != len(self.keys):
            raise GateError(
                f"a submission's entry cannot have the keys {list(self.keys)}: something must be in it, and once; "
                "mend sample_submission.json"
            )
        for name in ("bbox_decimals", "score_decimals"):
            if not 0 <= getattr(self, name) <= _MAX_DECIMALS:
                raise ValueError(f"{name} must be 0 to {_MAX_DECIMALS}, not {getattr(self, name)}")

    @property
    def shortest_line_bytes(self) -> int:
        """No line can be shorter: every number one digit."""
        return sum(len(part) if isinstance(part, str) else 1 for part in self._parts())

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a table that a line shows."""
        return tuple(part[0] for part in self._parts() if not isinstance(part, str))

    def decimals(self, column: str) -> int:
        """Decimals to which a column of boxes or scores is rounded."""
        return self.score_decimals if column == "score" else self.bbox_decimals

    def line_bytes(self, table: pl.DataFrame) -> NDArray[np.int64]:
        """Bytes of each row's line (N,), without the comma that follows it."""
        sizes = np.zeros(table.height, np.int64)
        for start in range(0, table.height, CHUNK_ROWS):
            chunk = sizes[start : start + CHUNK_ROWS]
            rows = table[start : start + CHUNK_ROWS]
            # All texts are ASCII: a character is a byte.
            for part in self._parts():
                match part:
                    case str():
                        chunk += len(part)
                    case ("image_id" | "category_id" as name,):
                        chunk += decimal_lengths(rows[name].to_numpy().astype(np.int64), 0)
                    case (name,):
                        chunk += decimal_lengths(
                            quantised(rows[name].to_numpy(), self.decimals(name)), self.decimals(name)
                        )
        return sizes

    def lines(self, table: pl.DataFrame) -> pl.Series:
        """Each row as its JSON object (N,) String, compact. Meant for CHUNK_ROWS rows at a time."""
        parts = [pl.lit(part) if isinstance(part, str) else part for part in self._texts(table)]
        if table.is_empty():
            return pl.Series("line", [], pl.String)
        return pl.select(pl.concat_str(parts).alias("line")).to_series()

    def file_chunks(self, table: pl.DataFrame) -> Iterator[bytes]:
        """The whole submission, piece by piece, rows in the table's order."""
        yield b"["
        for start in range(0, table.height, CHUNK_ROWS):
            lines = self.lines(table[start : start + CHUNK_ROWS])
            yield (b"," if start else b"") + lines.str.join(",").item().encode("ascii")
        yield b"]"

    def _texts(self, table: pl.DataFrame) -> Iterator[str | pl.Series]:
        """The parts of every row's line: constant text, and columns of text (N,)."""
        for part in self._parts():
            match part:
                case str():
                    yield part
                case ("image_id" | "category_id" as name,):
                    yield table[name].cast(pl.String)
                case (name,):
                    decimals = self.decimals(name)
                    yield decimal_texts(quantised(table[name].to_numpy(), decimals), decimals)

    def _parts(self) -> Iterator[str | tuple[str]]:
        """One line as constant text and, each in a tuple, the columns between."""
        text = "{"
        for key in self.keys:
            text += f'"{key}":'
            match key:
                case "segmentation":
                    text += "[]"
                case "bbox":
                    for column, before in (("x", "["), ("y", ","), ("w", ","), ("h", ",")):
                        yield text + before
                        yield (column,)
                        text = ""
                    text = "]"
                case _:
                    yield text
                    yield (key,)
                    text = ""
            text += ","
        yield text[:-1] + "}"


def quantised(values: NDArray[np.floating[Any]], decimals: int) -> NDArray[np.int64]:
    """Values (N,) in whole steps of 10^-decimals, rounded as Python's `round` does: half to even on the
    exact binary value, so 0.25 gives 2 tenths and 0.35 (which lies below) gives 3.

    Raises GateError for a number that is not finite or has no exact step.
    """
    # The power is exact (10^9 < 2^53), so `scaled` is the exact product but for its last rounding.
    power = float(10**decimals)
    scaled = values.astype(np.float64) * power
    outside = ~(np.abs(scaled) < _MAX_STEPS)
    if outside.any():
        raise GateError(
            f"{int(outside.sum())} numbers are not finite or too large to write with {decimals} decimals, "
            f"e.g. {values[outside][0]}"
        )
    steps = np.rint(scaled)
    # Only where the product landed on a half can its rounding have hidden on which side the exact value is.
    ties = np.flatnonzero(np.abs(scaled - steps) == 0.5)
    if len(ties):
        error = _product_error(values[ties].astype(np.float64), power, scaled[ties])
        steps[ties] = np.where(
            error > 0, np.ceil(scaled[ties]), np.where(error < 0, np.floor(scaled[ties]), steps[ties])
        )
    return steps.astype(np.int64)


def decimal_texts(steps: NDArray[np.int64], decimals: int) -> pl.Series:
    """Whole steps of 10^-decimals (N,) as the shortest decimal text (N,) String."""
    # Scores and coordinates repeat: a text is made once for each value.
    distinct, which = np.unique(steps, return_inverse=True)
    size = pl.Series(np.abs(distinct))
    sign = pl.Series(np.where(distinct < 0, "-", ""), dtype=pl.String)
    if decimals == 0:
        texts = sign + size.cast(pl.String)
    else:
        whole, part = size // 10**decimals, size % 10**decimals
        fraction = part.cast(pl.String).str.zfill(decimals).str.strip_chars_end("0")
        texts = sign + whole.cast(pl.String) + ("." + fraction).str.strip_chars_end(".")
    return texts.gather(pl.Series(which.astype(np.uint32)))


def decimal_lengths(steps: NDArray[np.int64], decimals: int) -> NDArray[np.int64]:
    """Characters (N,) of `decimal_texts`, without the texts."""
    size = np.abs(steps)
    whole = size // 10**decimals
    lengths: NDArray[np.int64] = (steps < 0) + np.searchsorted(_POWERS_OF_TEN, whole, side="right") + 1
    if decimals:
        part = size - whole * 10**decimals
        # The point and every decimal, less the zeros at the end; no fraction, no point.
        lengths += np.where(part > 0, decimals + 1, 0)
        for place in range(1, decimals):
            lengths -= (part > 0) & (part % 10**place == 0)
    return lengths


def _product_error(values: NDArray[np.float64], factor: float, product: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values * factor - product`, exactly (Dekker's product)."""
    big = values * _SPLITTER
    values_high = big - (big - values)
    values_low = values - values_high
    factor_high = factor * _SPLITTER - (factor * _SPLITTER - factor)
    factor_low = factor - factor_high
    error: NDArray[np.float64] = (
        (values_high * factor_high - product) + values_high * factor_low + values_low * factor_high
    ) + values_low * factor_low
    return error

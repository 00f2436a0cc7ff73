"""Rows of numbers grouped by a key, however many: in memory while they are few, else in files that vanish."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

Rows = NDArray[np.int64]

IN_MEMORY = 500_000
"""Rows up to which nothing is written to the disk."""
PARTS = 128
"""Files beyond that: of each a part is in memory when they are read."""


class Spill:
    """Rows (N, C) of int64 that come in blocks and are given back in parts. Used with `with`.

    A part holds all rows of its keys. The files lie in the folder for temporary files (TMPDIR) and have no name
    there: whatever happens, nothing of them stays.
    """

    def __init__(self, columns: int, key: slice, thin: Callable[[Rows], Rows] | None = None) -> None:
        """`key`: the columns by which rows belong together. `thin` may leave out some of a block's rows before they go
        to the disk: a file of one entry over and over makes one part of all its rows.
        """
        self._columns = columns
        self._key = key
        self._thin = thin
        self._blocks: list[Rows] = []
        self._rows = 0
        self._files: list[IO[bytes]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(self, rows: Rows) -> None:
        """More rows. OSError where they do not fit on the disk."""
        self._blocks.append(rows)
        self._rows += len(rows)
        if self._rows > IN_MEMORY:
            self._write_out()

    def parts(self) -> Iterator[Rows]:
        """All rows, each once, in the order in which they came within a part."""
        if not self._files:
            yield np.concatenate([np.zeros((0, self._columns), np.int64), *self._blocks])
            return
        if self._blocks:
            self._write_out()
        for file in self._files:
            file.seek(0)
            yield np.frombuffer(file.read(), np.int64).reshape(-1, self._columns)

    def _write_out(self) -> None:
        rows = np.concatenate(self._blocks)
        if self._thin is not None:
            rows = self._thin(rows)
        self._blocks, self._rows = [], 0
        key = rows[:, self._key]
        table = pl.DataFrame({str(number): key[:, number] for number in range(key.shape[1])})
        part = (table.hash_rows(seed=1).to_numpy() % PARTS).astype(np.int64)
        order = np.argsort(part, kind="stable")
        ends = np.searchsorted(part[order], np.arange(PARTS + 1), side="left")
        try:
            if not self._files:
                self._files = [self._stack.enter_context(_nameless()) for _ in range(PARTS)]
            for number, file in enumerate(self._files):
                file.write(rows[order[ends[number] : ends[number + 1]]].tobytes())
                file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{tempfile.gettempdir()} (TMPDIR)") from error


def _nameless() -> IO[bytes]:
    return tempfile.TemporaryFile()


def bits(values: NDArray[np.float64]) -> Rows:
    """Floats as integers that are equal where the numbers are: -0 is 0, and NaN is NaN."""
    return np.where(np.isnan(values), np.nan, values + 0.0).view(np.int64)


def floats(values: Rows) -> NDArray[np.float64]:
    """The numbers of `bits`."""
    return np.ascontiguousarray(values).view(np.float64)

"""Entries of a submission, as any program may have written them, turned into columns.

A list of sound entries becomes columns without a loop in Python; only where that fails each entry is
looked at, to say what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.submission.findings import Kind, Tally
from parkdet.submission.json_stream import RepeatedKeys

# By exact type: a bool is an int to Python's isinstance, and no id or number.
_TYPES: Mapping[str, frozenset[type]] = {
    "image_id": frozenset((int,)),
    "category_id": frozenset((int,)),
    "bbox": frozenset((list,)),
    "score": frozenset((int, float)),
    "segmentation": frozenset((list,)),
}
_NUMBER = _TYPES["score"]
_UNKNOWN_ID = {"image_id": Kind.UNKNOWN_IMAGE, "category_id": Kind.UNKNOWN_CATEGORY}


@dataclass(frozen=True, slots=True, eq=False)
class EntryColumns:
    """Entries of the right keys and types; columns that the submission does not hold are empty."""

    indices: NDArray[np.int64]
    """Index of each entry in the file's list (N,)."""
    image_ids: NDArray[np.int64]
    """(N,)"""
    category_ids: NDArray[np.int64]
    """(N,)"""
    xywh: NDArray[np.float64]
    """(N, 4) pixels of the original image."""
    scores: NDArray[np.float64]
    """(N,)"""

    def __len__(self) -> int:
        return len(self.indices)


def entry_columns(entries: Sequence[Any], first_index: int, keys: Sequence[str], tally: Tally) -> EntryColumns:
    """The sound ones of the entries; what is wrong with the others goes to the tally."""
    values = _values(entries, keys)
    if values is not None:
        return _columns(np.arange(first_index, first_index + len(entries)), values)
    sound: list[int] = []
    for index, entry in enumerate(entries):
        faults = list(_faults(entry, keys))
        for kind, text in faults:
            tally.add(kind, [f"[{first_index + index}] {text}"])
        if not faults:
            sound.append(index)
    values = _values([entries[index] for index in sound], keys)
    assert values is not None, "entries that are sound one by one are sound together"
    return _columns(np.array(sound, np.int64) + first_index, values)


def _values(entries: Sequence[Any], keys: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """Ids, boxes and scores of the entries; None where any entry is not what it should be."""
    # An object with a repeated key is of a type of its own.
    if not {dict}.issuperset(map(type, entries)) or not {len(keys)}.issuperset(map(len, entries)):
        return None
    try:
        values = {key: [*map(itemgetter(key), entries)] for key in keys}
        typed = all(_TYPES[key].issuperset(map(type, column)) for key, column in values.items())
        if not typed or not {4}.issuperset(map(len, values.get("bbox", ()))):
            return None
        values["bbox"] = [*chain.from_iterable(values.get("bbox", ()))]
        if not _NUMBER.issuperset(map(type, values["bbox"])):
            return None
        if not all(map(_holds_finite, filter(None, values.get("segmentation", ())))):
            return None
        return {
            key: np.array(values[key], np.int64 if key in _UNKNOWN_ID else np.float64)
            for key in ("image_id", "category_id", "bbox", "score")
            if key in values
        }
    except (KeyError, OverflowError):
        return None


def _columns(indices: NDArray[np.int64], values: Mapping[str, NDArray[Any]]) -> EntryColumns:
    none = np.zeros(0)
    return EntryColumns(
        indices,
        values.get("image_id", none.astype(np.int64)),
        values.get("category_id", none.astype(np.int64)),
        values.get("bbox", none).reshape(-1, 4),
        values.get("score", none),
    )


def _faults(entry: Any, keys: Sequence[str]) -> Iterator[tuple[Kind, str]]:
    """What is wrong with one entry's keys and types."""
    if not isinstance(entry, dict):
        yield Kind.NOT_AN_OBJECT, f"is {_short(entry)}"
        return
    if isinstance(entry, RepeatedKeys):
        yield Kind.KEY_REPEATED, f"has a key twice: {_short(dict(entry))}"
    for key in keys:
        if key not in entry:
            yield Kind.KEY_MISSING, f"has no {key}"
    for key, value in entry.items():
        if key in keys:
            yield from _value_faults(key, value)
        else:
            yield Kind.KEY_UNKNOWN, f"has {_short(key)}"


def _value_faults(key: str, value: Any) -> Iterator[tuple[Kind, str]]:
    if key in _UNKNOWN_ID and type(value) in _NUMBER and 2**63 <= abs(value) < math.inf:
        # Beyond 64 bits integers come as floats where a block is read fast; no image has such an id in either form.
        yield _UNKNOWN_ID[key], f"{key} {_short(value)}"
    elif type(value) not in _TYPES[key]:
        yield Kind.WRONG_TYPE, f"{key} is {_short(value)}"
    elif key in _UNKNOWN_ID:
        return
    elif key == "bbox" and (len(value) != 4 or not _NUMBER.issuperset(map(type, value))):
        yield Kind.WRONG_TYPE, f"bbox is {_short(value)}, not four numbers"
    elif key == "segmentation":
        if not _holds_finite(value):
            yield Kind.NOT_FINITE, f"{key} is {_short(value)}"
    elif not all(map(_is_float64, value if key == "bbox" else [value])):
        yield Kind.NOT_FINITE, f"{key} is {_short(value)}"


def _holds_finite(value: Any) -> bool:
    """Whether no number in a JSON value, however nested, is NaN or infinite: no JSON parser need read these."""
    inside = [value]
    for part in inside:
        if isinstance(part, list):
            inside.extend(part)
        elif isinstance(part, dict):
            inside.extend(part.values())
    return all(map(math.isfinite, (part for part in inside if isinstance(part, float))))


def _is_float64(number: float) -> bool:
    """Whether a float64 holds it: JSON's integers have no end."""
    try:
        float(number)
    except OverflowError:
        return False
    return True


def _short(value: Any) -> str:
    """A value as a user recognises it, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""The contest's JSON files (COCO), read strictly: what is of the wrong type is named by entry, never guessed.

Annotations become columns. The usual case is checked column by column; only a file that fails is searched for
the entry to name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.errors import DataError

_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One entry of `images`."""

    image_id: int
    file_name: str
    width: int | None
    height: int | None


@dataclass(frozen=True, slots=True, eq=False)
class AnnotationColumns:
    """The entries of `annotations`, in file order."""

    image_id: NDArray[np.int64]
    """(A,)"""
    category_id: NDArray[np.int64]
    """(A,)"""
    xywh: NDArray[np.float64]
    """(A, 4) in image pixels, as written: NaN, infinite and empty boxes too."""
    crowd: NDArray[np.bool_]
    """(A,) true where `iscrowd` is 1: a region of many objects, not the box of one."""


def read_json(path: Path) -> Any:
    """The document of a UTF-8 file, with or without a byte order mark.

    Raises DataError with line and column where the file is missing, empty or not JSON.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the contest's layout needs it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty; download or export it again")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"{where}: not JSON ({error.msg}); download or export it again") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets without end
        raise DataError(f"{path}: not usable as JSON ({error}); download or export it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The document of a file whose top level must be an object."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: the top level is {_kind(document)}; it must be an object with the key 'images' (COCO)"
        )
    return document


def parse_images(document: dict[str, Any], path: Path) -> list[ImageEntry]:
    """`images[] {id, file_name, width?, height?}`."""
    entries = _entries(document, "images", path)
    result = []
    for index, entry in enumerate(entries):
        image_id, name = entry.get("id"), entry.get("file_name")
        width, height = entry.get("width"), entry.get("height")
        if type(image_id) is not int or image_id not in _INT64:
            _refuse(path, "images", index, entry, "id", "an integer")
        if type(name) is not str or not name:
            _refuse(path, "images", index, entry, "file_name", "a file name in quotes")
        if (width is not None and type(width) is not int) or (width or 0) not in _INT64:
            _refuse(path, "images", index, entry, "width", "a whole number of pixels")
        if (height is not None and type(height) is not int) or (height or 0) not in _INT64:
            _refuse(path, "images", index, entry, "height", "a whole number of pixels")
        result.append(ImageEntry(image_id, name, width, height))
    return result


def parse_annotations(document: dict[str, Any], path: Path) -> AnnotationColumns:
    """`annotations[] {image_id, category_id, bbox [x, y, w, h], iscrowd?}`."""
    entries = _entries(document, "annotations", path)
    boxes = [entry.get("bbox") for entry in entries]
    if not all(map(_is_box, boxes)):
        index = next(i for i, box in enumerate(boxes) if not _is_box(box))
        _refuse(path, "annotations", index, entries[index], "bbox", "four numbers [x, y, width, height]")
    numbers = list(chain.from_iterable(boxes))  # type: ignore[arg-type]
    try:
        xywh = np.array(numbers, np.float64).reshape(-1, 4)
    except OverflowError:  # an integer beyond float64
        xywh = np.array([_float(number) for number in numbers], np.float64).reshape(-1, 4)
    crowds = [entry.get("iscrowd", 0) for entry in entries]
    if not all(crowd in {0, 1} if isinstance(crowd, int) else False for crowd in crowds):
        index = next(i for i, c in enumerate(crowds) if not isinstance(c, int) or c not in {0, 1})
        _refuse(path, "annotations", index, entries[index], "iscrowd", "0 or 1")
    return AnnotationColumns(
        _id_column(entries, "image_id", path),
        _id_column(entries, "category_id", path),
        xywh,
        np.array(crowds, np.bool_),
    )


def parse_categories(document: dict[str, Any], path: Path) -> dict[int, str]:
    """`categories[] {id, name}` as names by id, ids ascending; empty where there are none."""
    if document.get("categories") is None:
        return {}
    names: dict[int, str] = {}
    for index, entry in enumerate(_entries(document, "categories", path)):
        category_id, name = entry.get("id"), entry.get("name")
        if type(category_id) is not int or category_id not in _INT64:
            _refuse(path, "categories", index, entry, "id", "an integer")
        if type(name) is not str or not name:
            _refuse(path, "categories", index, entry, "name", "a name in quotes")
        if category_id in names:
            raise DataError(
                f"{path}: categories[{index}].id is {category_id}, as an earlier category's; "
                "give every category its own id"
            )
        names[category_id] = name
    return dict(sorted(names.items()))


def _entries(document: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    entries = document.get(key)
    if type(entries) is not list:
        found = _kind(entries) if key in document else "missing"
        raise DataError(f"{path}: the key '{key}' is {found}; it must be a list of objects (COCO)")
    if set(map(type, entries)) - {dict}:
        index = next(i for i, entry in enumerate(entries) if type(entry) is not dict)
        raise DataError(f"{path}: {key}[{index}] is {_kind(entries[index])}; it must be an object (COCO)")
    return entries


def _id_column(entries: list[dict[str, Any]], key: str, path: Path) -> NDArray[np.int64]:
    column = [entry.get(key) for entry in entries]
    sound: Callable[[Any], bool] = lambda value: type(value) is int and value in _INT64  # noqa: E731
    if not all(map(sound, column)):
        index = next(i for i, value in enumerate(column) if not sound(value))
        _refuse(path, "annotations", index, entries[index], key, "an integer")
    return np.array(column, np.int64)


def _is_box(box: object) -> bool:
    # By exact type: True is an int for isinstance, and no coordinate.
    return type(box) is list and len(box) == 4 and _NUMBERS.issuperset(map(type, box))


_NUMBERS = frozenset((int, float))


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


def _refuse(path: Path, array: str, index: int, entry: dict[str, Any], key: str, wanted: str) -> NoReturn:
    found = f"is {_kind(entry[key])}" if key in entry else "is missing"
    raise DataError(f"{path}: {array}[{index}].{key} {found}; it must be {wanted}. Correct that entry")


def _kind(value: object) -> str:
    """A JSON value in few words."""
    if isinstance(value, list):
        return f"a list of {len(value)}" if len(value) > 6 else f"the list {_short(value)}"
    if isinstance(value, dict):
        return "an object"
    return _short(value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Detections and truth as checked columns, whatever they came from: files, COCO's dicts, a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.errors import DataError, UsageError

if TYPE_CHECKING:
    import polars as pl

TABLE_COLUMNS = ("image_id", "category_id", "x", "y", "w", "h", "score")
_KINDS = {"i": "whole numbers", "u": "whole numbers", "U": "text"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TruthColumns:
    """The boxes that count, N of them: those of no size are gone."""

    image_ids: NDArray[Any]
    """Whole numbers or text, ascending; `image` counts in it."""
    category_ids: tuple[int, ...]
    """Ascending; `category` counts in it."""
    class_names: tuple[str, ...]
    image: NDArray[np.int64]
    category: NDArray[np.int64]
    xywh: NDArray[np.float64]
    area: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DetectionColumns:
    """Detections, in the order given."""

    image: NDArray[np.int64]
    """Index in the truth's `image_ids`."""
    category: NDArray[np.int64]
    """Index in the truth's `category_ids`."""
    xywh: NDArray[np.float64]
    score: NDArray[np.float64]


def evaluation_columns(
    detections: Path | str | Sequence[Mapping[str, Any]] | pl.DataFrame, truth: Path | str | Mapping[str, Any]
) -> tuple[DetectionColumns, TruthColumns]:
    """Both sides of an evaluation, their ids resolved against one another.

    UsageError for a file that does not exist, DataError for content that is wrong.
    """
    document, where = _loaded(truth, "the truth")
    if not isinstance(document, Mapping) or not all(
        isinstance(document.get(key), list | tuple) for key in ("images", "annotations")
    ):
        raise DataError(f"{where}: not a COCO truth; it must hold the lists 'images' and 'annotations'")
    boxes = _annotations(document["annotations"], where)
    found = _detections(detections)
    image_ids = _unique_ids(document["images"], "image", where)
    categories = document.get("categories") or []
    if categories:
        category_ids = _unique_ids(categories, "category", where)
        names = {int(entry["id"]): str(entry.get("name", entry["id"])) for entry in categories}
    else:
        # A truth without a list of categories does not say which ones cannot be.
        category_ids = np.union1d(boxes.category_id, found.category_id).astype(np.int64)
        names = {}
    ours = "list them in the truth, or leave the boxes out"
    image = _positions(boxes.image_id, image_ids, f"{where}: {{}} boxes of images", f"'images' lacks; {ours}")
    category = _positions(
        boxes.category_id, category_ids, f"{where}: {{}} boxes of categories", f"'categories' lacks; {ours}"
    )
    truths = TruthColumns(
        image_ids=image_ids,
        category_ids=tuple(category_ids.tolist()),
        class_names=tuple(names.get(number, str(number)) for number in category_ids.tolist()),
        image=image,
        category=category,
        xywh=boxes.xywh,
        area=boxes.area,
        is_crowd=boxes.is_crowd,
    )
    same = f"the truth ({where}) lacks; both must be of the same data set"
    return (
        DetectionColumns(
            image=_positions(found.image_id, image_ids, f"{found.where}: {{}} detections of images", same),
            category=_positions(found.category_id, category_ids, f"{found.where}: {{}} detections of categories", same),
            xywh=found.xywh,
            score=found.score,
        ),
        truths,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Annotations:
    image_id: NDArray[Any]
    category_id: NDArray[np.int64]
    xywh: NDArray[np.float64]
    area: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Found:
    where: str
    image_id: NDArray[Any]
    category_id: NDArray[np.int64]
    xywh: NDArray[np.float64]
    score: NDArray[np.float64]


def _loaded(source: Any, name: str) -> tuple[Any, str]:
    """A JSON file's content and its path; what is no path, as it is, and its name."""
    if not isinstance(source, Path | str):
        return source, name
    path = Path(source)
    try:
        return json.loads(path.read_bytes()), str(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name the JSON of {name}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: a folder; name the JSON of {name} in it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); write the file again") from error


def _annotations(rows: Sequence[Any], where: str) -> _Annotations:
    what = f"{where}: annotation"
    xywh = _boxes(rows, what)
    not_finite = np.flatnonzero(~np.isfinite(xywh).all(axis=1))
    if len(not_finite):
        raise DataError(
            f"{where}: {len(not_finite)} boxes are not finite, such as annotation number {not_finite[0] + 1}; "
            "leave them out ('parkdet prepare' lists them)"
        )
    has_size = (xywh[:, 2:] > 0).all(axis=1)
    areas = [
        {"area": box[2] * box[3] if row.get("area") is None else row["area"]}
        for row, box in zip(rows, xywh, strict=True)
    ]
    return _Annotations(
        image_id=_ids(rows, "image_id", what)[has_size],
        category_id=_whole_numbers(rows, "category_id", what)[has_size],
        xywh=xywh[has_size],
        area=_numbers(areas, "area", what)[has_size],
        is_crowd=np.array([bool(row.get("iscrowd", False)) for row in rows], bool)[has_size],
    )


def _detections(detections: Any) -> _Found:
    rows, where = _loaded(detections, "the detections")
    if not isinstance(rows, list | tuple):
        if type(rows).__name__ == "DataFrame":
            return _table(rows)
        raise DataError(f"{where}: expected a list of detections, found {type(rows).__name__}")
    what = f"{where}: detection"
    xywh = _boxes(rows, what)
    score = _numbers(rows, "score", what)
    return _checked(
        _Found(
            where=where,
            image_id=_ids(rows, "image_id", what),
            category_id=_whole_numbers(rows, "category_id", what),
            xywh=xywh,
            score=score,
        )
    )


def _table(table: pl.DataFrame) -> _Found:
    import polars as pl

    where = "the table of detections"
    missing = [name for name in TABLE_COLUMNS if name not in table.columns]
    if missing:
        raise DataError(f"{where}: no column {', '.join(missing)}; needed are {', '.join(TABLE_COLUMNS)}")
    table = table.select(TABLE_COLUMNS)
    kinds = table.schema
    wrong = [name for name in TABLE_COLUMNS[2:] if not kinds[name].is_numeric()]
    wrong += [] if kinds["category_id"].is_integer() else ["category_id"]
    wrong += [] if kinds["image_id"].is_integer() or kinds["image_id"] == pl.String else ["image_id"]
    # An empty table's columns may have no type at all.
    if wrong and len(table):
        raise DataError(f"{where}: column {wrong[0]} cannot be of type {kinds[wrong[0]]}")
    nulls = {name: count for name, count in table.null_count().row(0, named=True).items() if count}
    if nulls:
        name, count = next(iter(nulls.items()))
        raise DataError(f"{where}: {count} rows have no {name}")
    if not len(table):
        return _detections([])
    numbers = table.select(pl.col(TABLE_COLUMNS[2:]).cast(pl.Float64)).to_numpy()
    ids = table["image_id"]
    return _checked(
        _Found(
            where=where,
            image_id=np.array(ids.to_list()) if ids.dtype == pl.String else ids.to_numpy().astype(np.int64),
            category_id=table["category_id"].to_numpy().astype(np.int64),
            xywh=numbers[:, :4],
            score=numbers[:, 4],
        )
    )


def _checked(found: _Found) -> _Found:
    """Refuses what no IoU and no order can be computed of."""
    negative = np.flatnonzero((found.xywh[:, 2:] < 0).any(axis=1))
    not_finite = np.flatnonzero(~(np.isfinite(found.xywh).all(axis=1) & np.isfinite(found.score)))
    for wrong, problem in ((not_finite, "not finite"), (negative, "of negative width or height")):
        if len(wrong):
            first = wrong[0]
            example = f"{found.xywh[first].tolist()} with score {found.score[first]:g}"
            raise DataError(
                f"{found.where}: {len(wrong)} detections are {problem}, such as number {first + 1}: {example}; "
                "bbox is x, y, width, height"
            )
    return found


def _unique_ids(rows: Sequence[Any], what: str, where: str) -> NDArray[Any]:
    column = _ids if what == "image" else _whole_numbers
    ids, counts = np.unique(column(rows, "id", f"{where}: {what}"), return_counts=True)
    twice = ids[counts > 1]
    if len(twice):
        raise DataError(f"{where}: {len(twice)} {what} ids stand there more than once, such as {twice[0]}")
    return ids


def _positions(values: NDArray[Any], known: NDArray[Any], who: str, lacks: str) -> NDArray[np.int64]:
    """Index of every value in `known`, which ascends. DataError for values that are not there."""
    at = np.zeros(len(values), np.int64)
    if len(known) and _KINDS[values.dtype.kind] == _KINDS[known.dtype.kind]:
        at = np.minimum(np.searchsorted(known, values), len(known) - 1)
        is_known = known[at] == values
    else:
        is_known = np.zeros(len(values), bool)
    if not is_known.all():
        unknown = values[~is_known]
        raise DataError(f"{who.format(len(unknown))} that {lacks}; such as {unknown[0]}")
    return at.astype(np.int64)


def _values(rows: Sequence[Any], key: str, what: str) -> list[Any]:
    try:
        return [row[key] for row in rows]
    except (KeyError, TypeError, IndexError):
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping) or key not in row:
                raise DataError(f"{what} number {index + 1} has no '{key}': {_shown(row)}") from None
        raise


def _ids(rows: Sequence[Any], key: str, what: str) -> NDArray[Any]:
    """A column of whole numbers, or one of text."""
    values = _values(rows, key, what)
    if values and all(isinstance(value, str) for value in values):
        return np.array(values)
    return _whole_numbers(rows, key, what)


def _whole_numbers(rows: Sequence[Any], key: str, what: str) -> NDArray[np.int64]:
    values = _values(rows, key, what)
    try:
        column = np.array(values)
    except ValueError:
        column = np.array(values, object)
    if values and (column.dtype.kind not in "iu" or column.ndim != 1):
        index = next((i for i, v in enumerate(values) if not isinstance(v, int) or isinstance(v, bool)), 0)
        raise DataError(f"{what} number {index + 1}: '{key}' must be a whole number, not {_shown(values[index])}")
    return column.astype(np.int64)


def _numbers(rows: Sequence[Any], key: str, what: str) -> NDArray[np.float64]:
    values = _values(rows, key, what)
    try:
        column = np.array(values)
    except ValueError:
        column = np.array(values, object)
    if values and (column.dtype.kind not in "iuf" or column.ndim != 1):
        index = next((i for i, v in enumerate(values) if not isinstance(v, int | float)), 0)
        raise DataError(f"{what} number {index + 1}: '{key}' must be a number, not {_shown(values[index])}")
    return column.astype(np.float64)


def _boxes(rows: Sequence[Any], what: str) -> NDArray[np.float64]:
    """(N, 4) xywh."""
    values = _values(rows, "bbox", what)
    try:
        boxes = np.array(values) if values else np.zeros((0, 4))
    except ValueError:
        boxes = np.array([])
    if boxes.shape != (len(values), 4) or boxes.dtype.kind not in "iuf":
        index = next((i for i, value in enumerate(values) if not _is_box(value)), 0)
        raise DataError(f"{what} number {index + 1}: 'bbox' must be four numbers, not {_shown(values[index])}")
    return boxes.astype(np.float64)


def _is_box(value: Any) -> bool:
    try:
        return len(value) == 4 and all(isinstance(number, int | float) for number in value)
    except TypeError:
        return False


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."

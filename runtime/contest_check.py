"""Check a data folder in the contest's layout: findings by kind, each with its count and some examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.check_report import (
    EXAMPLES,
    CheckReport,
    ClassCount,
    Collector,
    Kind,
    PartCounts,
    printable,
)
from parkdet.runtime.contest import BoxFault, CleanBoxes, ContestData, ImageList, LabelledImages, Part
from parkdet.runtime.decode_check import DecodeTask, decode_all
from parkdet.runtime.errors import DataError
from parkdet.runtime.image_headers import ImageHeader, Problem, read_header
from parkdet.runtime.image_names import Match
from parkdet.runtime.images import MAX_PIXELS

Progress = Callable[[str, int, int], None]
"""Called now and then with what is done (`headers`, `decoding`), how many images of it, and of how many."""


_BOX_KINDS = {
    BoxFault.UNKNOWN_IMAGE: Kind.BOX_UNKNOWN_IMAGE,
    BoxFault.UNKNOWN_CATEGORY: Kind.BOX_UNKNOWN_CATEGORY,
    BoxFault.NOT_FINITE: Kind.BOX_NOT_FINITE,
    BoxFault.CROWD: Kind.BOX_CROWD,
    BoxFault.NO_SIZE: Kind.BOX_NO_SIZE,
    BoxFault.OUTSIDE: Kind.BOX_OUTSIDE,
    BoxFault.CLIPPED: Kind.BOX_CLIPPED,
}
_HEADER_KINDS: dict[Problem | None, Kind] = {
    Problem.MISSING: Kind.MISSING,
    Problem.TRUNCATED_HEAD: Kind.TRUNCATED,
    Problem.TRUNCATED_TAIL: Kind.TRUNCATED,
}
_NAME_KINDS = {
    Match.MISSING: Kind.MISSING,
    Match.AMBIGUOUS: Kind.NAME_AMBIGUOUS,
    Match.OUTSIDE: Kind.NAME_OUTSIDE,
    Match.UNICODE: Kind.NAME_UNICODE,
    Match.LETTER_CASE: Kind.NAME_LETTER_CASE,
}


def check_data(data: ContestData, decode: bool = False, progress: Progress | None = None) -> CheckReport:
    """Read both JSON files and the ends of every image, or with `decode` every pixel; change nothing."""
    found = Collector()
    parts: dict[str, PartCounts] = {}
    listed = usable = 0
    classes: tuple[ClassCount, ...] = ()
    train_ids: tuple[int, ...] = ()
    try:
        labels = data.train_labels()
    except DataError as error:
        found.add("train", Kind.JSON_UNUSABLE, [str(error)])
    else:
        headers, parts["train"] = _check_images("train", labels.images, decode, progress, found)
        sizes = np.array([(h.width, h.height) if h else (0, 0) for h in headers], np.int64).reshape(-1, 2)
        boxes = labels.clean(sizes)
        _check_boxes(labels, boxes, sizes, found)
        listed, usable = len(labels.columns.xywh), len(boxes)
        classes = _class_counts(labels, boxes)
        train_ids = tuple(record.image_id for record in labels.records)
    if not data.test_json.exists() and not data.images_folder("test").exists():
        found.add("test", Kind.NO_TEST_SET, [str(data.test_json)])
    else:
        try:
            images = data.test_list()
        except DataError as error:
            found.add("test", Kind.JSON_UNUSABLE, [str(error)])
        else:
            _, parts["test"] = _check_images("test", images, decode, progress, found)
    try:
        data.submission_keys()
    except DataError as error:
        found.add("sample", Kind.JSON_UNUSABLE, [str(error)])
    return CheckReport(printable(str(data.root)), decode, parts, listed, usable, classes, found.findings(), train_ids)


def _check_images(
    part: Part, images: ImageList, decode: bool, progress: Progress | None, found: Collector
) -> tuple[list[ImageHeader | None], PartCounts]:
    """Names, files and sizes of one part; returns the headers, None where there is no file."""
    records = images.records
    if not records:
        found.add(part, Kind.NO_IMAGES, [str(images.json_path)])
    for match, kind in _NAME_KINDS.items():
        hits = [r for r, how in zip(records, images.matches, strict=True) if how is match]
        found.add(
            part,
            kind,
            [r.file_name + (f" is {r.path.name}" if r.path else "") for r in hits[:EXAMPLES]],
            len(hits),
        )
    found.add(part, Kind.UNLISTED, images.unlisted)
    again = _repeated([r.image_id for r in records])
    found.add(part, Kind.ID_TWICE, [f"id {records[i].image_id}: {records[i].file_name}" for i in again])
    again = _repeated([r.file_name for r in records])
    found.add(part, Kind.NAME_TWICE, [f"{records[i].file_name}: id {records[i].image_id}" for i in again])

    headers: list[ImageHeader | None] = []
    sound: list[int] = []
    for index, record in enumerate(records):
        header = read_header(record.path) if record.path is not None else None
        headers.append(header)
        if header is not None:
            problem = header.problem or _too_large(header)
            if problem is None:
                sound.append(index)
            else:
                kind = _HEADER_KINDS.get(header.kind, Kind.UNREADABLE)
                found.add(part, kind, [f"{record.file_name} {problem}"])
        done = index + 1
        if progress is not None and (done % 256 == 0 or done == len(records)):
            progress(f"{part} headers", done, len(records))
    _check_sizes(part, images, headers, found)

    bad = 0
    if decode:
        tasks = [_decode_task(images, headers, index) for index in sound]
        report = None if progress is None else (lambda n, total: progress(f"{part} decoding", n, total))
        for index, trouble in sorted(decode_all(tasks, report).items()):
            bad += trouble.fatal
            kind = Kind.UNREADABLE if trouble.fatal else Kind.LOSSY
            found.add(part, kind, [f"{records[sound[index]].file_name} {trouble.text}"])
    seen = [header for header in headers if header is not None and header.width]
    formats = Counter(header.format or "" for header in seen)
    sizes = Counter((header.width, header.height) for header in seen)
    return headers, PartCounts(len(records), len(sound) - bad, dict(formats.most_common()), dict(sizes.most_common()))


def _check_sizes(part: Part, images: ImageList, headers: Sequence[ImageHeader | None], found: Collector) -> None:
    for record, header in zip(images.records, headers, strict=True):
        if header is None or not header.width:
            continue
        size = f"{header.width} x {header.height}"
        turned = "" if header.orientation == 1 else f", turned by EXIF orientation {header.orientation}"
        if turned:
            found.add(part, Kind.TURNED, [f"{record.file_name}: {size} as displayed{turned}"])
        if record.width not in (None, header.width) or record.height not in (None, header.height):
            said = f"JSON {record.width or '?'} x {record.height or '?'}, file {size}{turned}"
            found.add(part, Kind.SIZE_DIFFERS, [f"{record.file_name}: {said}"])


def _check_boxes(labels: LabelledImages, boxes: CleanBoxes, sizes: NDArray[np.int64], found: Collector) -> None:
    columns, records = labels.columns, labels.records

    def entry(row: int) -> str:
        index = int(labels.image_index[row])
        name = records[index].file_name if index >= 0 else f"image id {columns.image_id[row]}"
        box = ", ".join(f"{number:.10g}" for number in columns.xywh[row])
        return f"annotations[{row}], {name}: category {columns.category_id[row]}, bbox [{box}]"

    def with_size(row: int) -> str:
        width, height = sizes[labels.image_index[row]]
        return entry(row) + (f" in {width} x {height}" if width else "")

    for fault, rows in boxes.faults.items():
        describe = with_size if fault in (BoxFault.OUTSIDE, BoxFault.CLIPPED) else entry
        examples = [describe(int(row)) for row in rows[:EXAMPLES]]
        found.add("train", _BOX_KINDS[fault], examples, len(rows))

    keys = np.column_stack((boxes.xyxy, boxes.category_ids, np.repeat(np.arange(len(records)), boxes.counts)))
    order = np.lexsort(keys.T)
    same = (keys[order[1:]] == keys[order[:-1]]).all(1)
    rows = np.sort(boxes.annotation[order[1:][same]])
    found.add("train", Kind.BOX_TWICE, [entry(int(row)) for row in rows[:EXAMPLES]], len(rows))

    empty = np.flatnonzero(boxes.counts == 0)
    had = np.bincount(labels.image_index[labels.image_index >= 0], minlength=len(records))
    found.add(
        "train",
        Kind.BACKGROUND,
        [records[i].file_name + (f": all {had[i]} left out" if had[i] else "") for i in empty[:EXAMPLES]],
        len(empty),
    )


def _class_counts(labels: LabelledImages, boxes: CleanBoxes) -> tuple[ClassCount, ...]:
    number = np.bincount(boxes.class_ids, minlength=len(labels.categories))
    images = np.repeat(np.arange(len(labels.records)), boxes.counts)
    pairs = np.unique(np.column_stack((boxes.class_ids, images)), axis=0)
    with_class = np.bincount(pairs[:, 0], minlength=len(labels.categories))
    return tuple(
        ClassCount(category_id, printable(name), int(number[i]), int(with_class[i]))
        for i, (category_id, name) in enumerate(labels.categories.items())
    )


def _decode_task(images: ImageList, headers: Sequence[ImageHeader | None], index: int) -> DecodeTask:
    path, header = images.records[index].path, headers[index]
    assert path is not None
    assert header is not None
    return DecodeTask(str(path), header.width, header.height)


def _too_large(header: ImageHeader) -> str | None:
    if header.width * header.height <= MAX_PIXELS:
        return None
    return f"has {header.width} x {header.height} pixels, more than {MAX_PIXELS // 10**6} million; scale it down"


def _repeated(values: Sequence[object]) -> list[int]:
    """Indices of the values that were there before."""
    first: dict[object, int] = {}
    return [i for i, value in enumerate(values) if first.setdefault(value, i) != i]

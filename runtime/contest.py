"""The contest's data folder, read where it lies: images, labels, and the boxes that can be used.

    <data>/train/images/*           <data>/train/label/Train.json
    <data>/test/images/*            <data>/Test_Images_Information.json
    <data>/sample_submission.json   (optional)

Training, evaluation and `parkdet prepare` take their boxes from `LabelledImages.clean`: what the check
reports is what is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parkdet.runtime.contest_json import (
    AnnotationColumns,
    parse_annotations,
    parse_categories,
    parse_images,
    read_json,
    read_object,
)
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.image_headers import read_header
from parkdet.runtime.image_names import Match, list_files, match_names

CONTEST_CLASSES = (
    "sedan", "SUV", "van", "bus", "school bus", "truck", "taxi",
    "adult", "child", "motorcycle", "kickboard", "bicycle", "stroller", "cart",
)  # fmt: skip
"""Names of the contest's categories 1 to 14."""

SUBMISSION_KEYS = ("image_id", "category_id", "bbox", "score", "segmentation")

Part = Literal["train", "test"]

EDGE_TOLERANCE = 1e-6
"""Pixels by which x + width may pass the image's edge uncounted: what computing width from corners rounds off."""


class BoxFault(StrEnum):
    """Why a box is changed or left out; a box counts under the first that applies, in this order."""

    UNKNOWN_IMAGE = "unknown image"
    UNKNOWN_CATEGORY = "unknown category"
    NOT_FINITE = "not finite"
    CROWD = "crowd"
    NO_SIZE = "no size"
    OUTSIDE = "outside"
    CLIPPED = "clipped"


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image as its JSON file lists it."""

    image_id: int
    file_name: str
    """As written in the JSON file."""
    path: Path | None
    """The file; None when it is missing."""
    width: int | None
    """Pixels as the JSON file says."""
    height: int | None


@dataclass(frozen=True, slots=True)
class ImageList:
    """The images of one part of the data set, and how their names met the files."""

    json_path: Path
    folder: Path
    records: tuple[ImageRecord, ...]
    matches: tuple[Match, ...]
    """For every record how its file was found, or why not."""
    unlisted: tuple[str, ...]
    """Image files in the folder that the JSON file does not list, relative to it."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanBoxes:
    """The usable boxes, grouped by image: image i has the rows `starts[i]` to `starts[i + 1]`."""

    starts: NDArray[np.int64]
    """(images + 1,)"""
    xyxy: NDArray[np.float64]
    """(B, 4) image pixels, inside the image, every side positive."""
    class_ids: NDArray[np.int32]
    """(B,) counted from 0 in the order of `LabelledImages.categories`."""
    category_ids: NDArray[np.int64]
    """(B,) the data set's own."""
    annotation: NDArray[np.int64]
    """(B,) row of the annotation as read."""
    faults: Mapping[BoxFault, NDArray[np.int64]]
    """Rows of the annotations left out, and of those clipped, by reason."""

    def __len__(self) -> int:
        return len(self.xyxy)

    def of(self, image: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Boxes (n, 4) xyxy in image pixels and class ids (n,) of the image at that index of the records."""
        rows = slice(int(self.starts[image]), int(self.starts[image + 1]))
        return self.xyxy[rows], self.class_ids[rows]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(images,) boxes of each image; 0 for one that trains as background."""
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Images with annotations in columns, as read: nothing is dropped or repaired yet."""

    images: ImageList
    categories: dict[int, str]
    """Names by category id, ids ascending: class id i is the i-th."""
    image_index: NDArray[np.int64]
    """(A,) row of the records; -1 for an image id that is not listed; the first of several with one id."""
    columns: AnnotationColumns
    """Image id, category id, xywh in image pixels, crowd flag, each (A, ...)."""

    @property
    def records(self) -> tuple[ImageRecord, ...]:
        """The images in file order."""
        return self.images.records

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the class ids."""
        return tuple(self.categories.values())

    def sizes(self) -> NDArray[np.int64]:
        """(images, 2) width and height as the JSON file says, 0 where it does not."""
        return np.array([(r.width or 0, r.height or 0) for r in self.records], np.int64).reshape(-1, 2)

    def clean(self, image_wh: ArrayLike | None = None) -> CleanBoxes:
        """The boxes that can be used, clipped to their images.

        `image_wh` (images, 2) holds the displayed sizes of the files' headers, 0 where not read. Without it
        the JSON file's size counts, and where that has none the header is read now. A box of an image whose
        size nobody knows is clipped at the left and upper edges only.
        """
        known = self.sizes()
        if image_wh is not None:
            headers = np.asarray(image_wh, np.int64).reshape(-1, 2)
            known = np.where((headers > 0).all(1, keepdims=True), headers, known)
        for index in np.flatnonzero((known <= 0).any(1)):
            path = self.records[index].path
            header = read_header(path) if path is not None else None
            known[index] = (header.width, header.height) if header is not None else 0
        limits = np.where((known > 0).all(1, keepdims=True), known, np.inf)

        known_ids = np.fromiter(self.categories, np.int64, len(self.categories))
        class_ids = np.searchsorted(known_ids, self.columns.category_id)
        xywh = self.columns.xywh
        with np.errstate(over="ignore", invalid="ignore"):
            corners = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
        # A row of no image borrows infinite limits; it is dropped for that reason.
        edges = np.concatenate((limits, [[np.inf, np.inf]]))[self.image_index]
        edges = np.concatenate((edges, edges), axis=1)
        inside = np.clip(corners, 0, edges)

        faults: dict[BoxFault, NDArray[np.int64]] = {}
        usable = np.ones(len(xywh), np.bool_)
        with np.errstate(invalid="ignore"):
            tests = (
                (BoxFault.UNKNOWN_IMAGE, self.image_index < 0),
                (BoxFault.UNKNOWN_CATEGORY, ~np.isin(self.columns.category_id, known_ids)),
                (BoxFault.NOT_FINITE, ~np.isfinite(xywh).all(1)),
                (BoxFault.CROWD, self.columns.crowd),
                (BoxFault.NO_SIZE, (xywh[:, 2:] <= 0).any(1)),
                (BoxFault.OUTSIDE, (inside[:, 2:] <= inside[:, :2]).any(1)),
            )
            clipped = (np.abs(inside - corners) > EDGE_TOLERANCE).any(1)
        for fault, found in tests:
            faults[fault] = np.flatnonzero(usable & found)
            usable &= ~found
        faults[BoxFault.CLIPPED] = np.flatnonzero(usable & clipped)

        rows = np.flatnonzero(usable)
        rows = rows[np.argsort(self.image_index[rows], kind="stable")]
        per_image = np.bincount(self.image_index[rows], minlength=len(self.records))
        return CleanBoxes(
            np.concatenate(([0], np.cumsum(per_image))).astype(np.int64),
            inside[rows],
            class_ids[rows].astype(np.int32),
            self.columns.category_id[rows],
            rows,
            faults,
        )


@dataclass(frozen=True, slots=True)
class ContestData:
    """A data folder in the contest's layout. Nothing is read before it is asked for, nothing is written."""

    root: Path

    def __post_init__(self) -> None:
        if not self.root.exists():
            raise UsageError(f"{self.root}: no such folder; name the data set's folder with --data")
        if not self.root.is_dir():
            raise UsageError(f"{self.root}: is not a folder; name the data set's folder with --data")

    @property
    def train_json(self) -> Path:
        """The labels."""
        return self.root / "train" / "label" / "Train.json"

    @property
    def test_json(self) -> Path:
        """The list of test images."""
        return self.root / "Test_Images_Information.json"

    @property
    def sample_submission(self) -> Path:
        """An example of a submission; it may be absent."""
        return self.root / "sample_submission.json"

    def images_folder(self, part: Part) -> Path:
        """The folder of a part's images."""
        return self.root / part / "images"

    def train_labels(self) -> LabelledImages:
        """The training images with their annotations as read. Raises DataError where the JSON is unusable."""
        path = self.train_json
        document = read_object(path)
        images = self._image_list("train", document, path)
        columns = parse_annotations(document, path)
        categories = parse_categories(document, path) or _assumed_categories(columns.category_id)
        ids = np.array([record.image_id for record in images.records], np.int64)
        return LabelledImages(images, categories, _index_of(ids, columns.image_id), columns)

    def test_images(self) -> tuple[ImageRecord, ...]:
        """The test images in file order. Raises DataError where the JSON is unusable."""
        return self.test_list().records

    def test_list(self) -> ImageList:
        """The test images, and how their names met the files."""
        return self._image_list("test", read_object(self.test_json), self.test_json)

    def submission_keys(self) -> tuple[str, ...]:
        """The keys of a submission's entries, in the sample's order; the contest's five without a sample."""
        path = self.sample_submission
        if not path.exists():
            return SUBMISSION_KEYS
        sample = read_json(path)
        if not isinstance(sample, list) or not all(isinstance(entry, dict) for entry in sample):
            raise DataError(
                f"{path}: a submission is a list of objects; correct the sample, or remove it to write "
                + ", ".join(SUBMISSION_KEYS)
            )
        return tuple(sample[0]) if sample else SUBMISSION_KEYS

    def _image_list(self, part: Part, document: dict[str, object], path: Path) -> ImageList:
        entries = parse_images(document, path)
        folder = self.images_folder(part)
        found = match_names([entry.file_name for entry in entries], list_files(folder))
        records = tuple(
            ImageRecord(e.image_id, e.file_name, None if file is None else folder / file, e.width, e.height)
            for e, file in zip(entries, found.files, strict=True)
        )
        return ImageList(path, folder, records, tuple(found.matches), tuple(found.unlisted))


def _assumed_categories(category_ids: NDArray[np.int64]) -> dict[int, str]:
    """Names for a file without `categories`: the contest's where the ids fit, else made from the ids."""
    if len(category_ids) == 0 or (category_ids.min() >= 1 and category_ids.max() <= len(CONTEST_CLASSES)):
        return dict(enumerate(CONTEST_CLASSES, start=1))
    return {int(category_id): f"category {category_id}" for category_id in np.unique(category_ids)}


def _index_of(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of `wanted` the index of its first occurrence in `ids`, -1 where there is none."""
    if len(ids) == 0:
        return np.full(len(wanted), -1, np.int64)
    unique, first = np.unique(ids, return_index=True)
    place = np.minimum(np.searchsorted(unique, wanted), len(unique) - 1)
    return np.where(unique[place] == wanted, first[place], -1).astype(np.int64)

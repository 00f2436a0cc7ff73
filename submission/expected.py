"""What a submission for a data set may hold: read from the data folder, as a judge would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from parkdet.runtime.contest import ContestData, ImageRecord
from parkdet.runtime.contest_json import parse_categories, read_object
from parkdet.runtime.image_headers import read_header
from parkdet.submission.check import check_submission
from parkdet.submission.findings import CheckReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Images, categories and keys of a data set's submissions."""

    file_names: dict[int, str]
    """Of the test images, by image id."""
    image_sizes: dict[int, tuple[int, int]]
    """Width and height in pixels, by image id; without the images whose size nobody knows."""
    category_names: dict[int, str]
    """By category id."""
    keys: tuple[str, ...]
    """Of every entry, in the sample submission's order."""

    @classmethod
    def of(cls, data: ContestData) -> Expected:
        """Raises DataError where the data set's files are missing or wrong."""
        records = data.test_images()
        return cls(
            file_names={record.image_id: record.file_name for record in records},
            image_sizes=image_sizes(records),
            category_names=category_names(data),
            keys=data.submission_keys(),
        )

    def check(self, path: Path, limit_bytes: int, bbox_decimals: int) -> CheckReport:
        """`check_submission` with this data set's images and categories."""
        return check_submission(
            path,
            self.file_names,
            self.category_names,
            self.image_sizes,
            limit_bytes,
            keys=self.keys,
            bbox_decimals=bbox_decimals,
        )


def category_names(data: ContestData) -> dict[int, str]:
    """Names by category id, as the labels have them."""
    # The labels' `categories` alone, where there are any: a hundred thousand boxes need not be looked at.
    listed = parse_categories(read_object(data.train_json), data.train_json)
    return listed or data.train_labels().categories


def image_sizes(records: Iterable[ImageRecord]) -> dict[int, tuple[int, int]]:
    """Width and height by image id: as the JSON file says, else as the image's header does."""
    sizes = {}
    for record in records:
        if record.width and record.height:
            sizes[record.image_id] = (record.width, record.height)
        elif record.path is not None and (header := read_header(record.path)) is not None:
            sizes[record.image_id] = (header.width, header.height)
    return sizes

"""What a submission for a data set may hold: read from the data folder, as a judge would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from parkdet.runtime.contest import ContestData, ImageRecord
from parkdet.runtime.contest_json import parse_categories, read_object
from parkdet.runtime.image_headers import read_header
from parkdet.submission.check import check_submission
from parkdet.submission.findings import EXAMPLES, CheckReport, Finding, Kind


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
    named_twice: tuple[str, ...]
    """Ids and file names that the list of test images has more than once: what is said of such an image would count
    twice, or not at all."""

    @classmethod
    def of(cls, data: ContestData) -> Expected:
        """Raises DataError where the data set's files are missing or wrong."""
        records = data.test_images()
        return cls(
            file_names={record.image_id: record.file_name for record in records},
            image_sizes=image_sizes(records),
            category_names=category_names(data),
            keys=data.submission_keys(),
            named_twice=_named_twice(records),
        )

    def check(self, path: Path, limit_bytes: int, bbox_decimals: int) -> CheckReport:
        """`check_submission` with this data set's images and categories; and whether these are sound themselves."""
        report = check_submission(
            path,
            self.file_names,
            self.category_names,
            self.image_sizes,
            limit_bytes,
            keys=self.keys,
            bbox_decimals=bbox_decimals,
        )
        if not self.named_twice:
            return report
        twice = Finding(Kind.IMAGE_TWICE, len(self.named_twice), self.named_twice[:EXAMPLES])
        order = list(Kind)
        findings = sorted((*report.findings, twice), key=lambda finding: order.index(finding.kind))
        return replace(report, findings=tuple(findings))


def _named_twice(records: Iterable[ImageRecord]) -> tuple[str, ...]:
    records = list(records)
    ids = Counter(record.image_id for record in records)
    names = Counter(record.file_name for record in records)
    return (
        *(f"id {image_id}, {times} times" for image_id, times in ids.items() if times > 1),
        *(f"{name}, {times} times" for name, times in names.items() if times > 1),
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

"""What a check of the data set can find, and the report that it gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

EXAMPLES = 5
"""Examples kept of each kind of finding."""


class Severity(StrEnum):
    """How much a finding matters: an error makes an image or a whole file unusable."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class Kind(StrEnum):
    """What can be found; the value is the word in report.json."""

    JSON_UNUSABLE = "json_unusable"
    NO_IMAGES = "no_images"
    NO_TEST_SET = "no_test_set"
    MISSING = "image_missing"
    NAME_AMBIGUOUS = "name_ambiguous"
    NAME_OUTSIDE = "name_outside_folder"
    UNREADABLE = "image_unreadable"
    TRUNCATED = "image_truncated"
    LOSSY = "image_decodes_with_losses"
    SIZE_DIFFERS = "size_differs_from_json"
    ID_TWICE = "image_id_twice"
    NAME_TWICE = "file_name_twice"
    UNLISTED = "file_not_listed"
    BOX_UNKNOWN_IMAGE = "box_of_unknown_image"
    BOX_UNKNOWN_CATEGORY = "box_of_unknown_category"
    BOX_NOT_FINITE = "box_not_finite"
    BOX_CROWD = "box_of_crowd"
    BOX_NO_SIZE = "box_without_size"
    BOX_OUTSIDE = "box_outside_image"
    BOX_CLIPPED = "box_clipped"
    BOX_TWICE = "box_twice"
    BACKGROUND = "image_without_boxes"
    NAME_UNICODE = "name_in_other_unicode_form"
    NAME_LETTER_CASE = "name_in_other_letter_case"
    TURNED = "image_turned_by_exif"


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
MEANING: dict[Kind, tuple[Severity, str]] = {
    Kind.JSON_UNUSABLE: (_E, "file unusable"),
    Kind.NO_IMAGES: (_E, "no images listed"),
    Kind.NO_TEST_SET: (_W, "no test set: there is nothing to infer and submit"),
    Kind.MISSING: (_E, "image missing"),
    Kind.NAME_AMBIGUOUS: (_E, "several files or entries fit one name but for letter case or Unicode form"),
    Kind.NAME_OUTSIDE: (_E, "file name leads out of the image folder: never opened"),
    Kind.UNREADABLE: (_E, "image unreadable"),
    Kind.TRUNCATED: (_E, "image truncated"),
    Kind.LOSSY: (_W, "image damaged inside: it decodes with losses"),
    Kind.SIZE_DIFFERS: (_W, "image of another size than the JSON file says: the file's size is used"),
    Kind.ID_TWICE: (_E, "image id twice: boxes and predictions cannot be told apart"),
    Kind.NAME_TWICE: (_W, "file name twice: the image counts several times"),
    Kind.UNLISTED: (_W, "image file that the JSON file does not list: not used"),
    Kind.BOX_UNKNOWN_IMAGE: (_W, "box of an unknown image: left out"),
    Kind.BOX_UNKNOWN_CATEGORY: (_W, "box of an unknown category: left out"),
    Kind.BOX_NOT_FINITE: (_W, "box that is not finite: left out"),
    Kind.BOX_CROWD: (_W, "box of a crowd (iscrowd 1), not of one object: left out"),
    Kind.BOX_NO_SIZE: (_W, "box of zero or negative size: left out"),
    Kind.BOX_OUTSIDE: (_W, "box wholly outside its image: left out"),
    Kind.BOX_CLIPPED: (_W, "box partly outside its image: clipped"),
    Kind.BOX_TWICE: (_W, "box twice, same image and category: both kept"),
    Kind.BACKGROUND: (_N, "image without boxes: trains as background"),
    Kind.NAME_UNICODE: (_N, "file found under another Unicode form of its name (NFC, NFD)"),
    Kind.NAME_LETTER_CASE: (_N, "file found under other letter case of its name"),
    Kind.TURNED: (_N, "image turned by its EXIF orientation"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of finding in one part of the data set."""

    part: str
    """`train`, `test` or `sample`."""
    kind: Kind
    count: int
    examples: tuple[str, ...]
    """At most five, printable, each naming a file or an entry."""

    @property
    def severity(self) -> Severity:
        """Note, warning or error."""
        return MEANING[self.kind][0]

    @property
    def text(self) -> str:
        """The kind in words."""
        return MEANING[self.kind][1]


@dataclass(frozen=True, slots=True)
class PartCounts:
    """What one part holds."""

    images: int
    """Entries of the JSON file."""
    usable: int
    """Of these, images whose file is there and whole, as far as it was looked at."""
    formats: dict[str, int]
    sizes: dict[tuple[int, int], int]
    """Images by displayed (width, height), most frequent first."""


@dataclass(frozen=True, slots=True)
class ClassCount:
    """The usable boxes of one category."""

    category_id: int
    name: str
    boxes: int
    images: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Everything that a check found."""

    root: str
    decoded: bool
    """True when every image was decoded, not only its ends read."""
    parts: dict[str, PartCounts]
    boxes_listed: int
    boxes_usable: int
    classes: tuple[ClassCount, ...]
    findings: tuple[Finding, ...]
    train_ids: tuple[int, ...]
    """Image ids in file order; empty when the labels are unusable."""

    @property
    def has_errors(self) -> bool:
        """True when an image or a file cannot be used."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as plain types, for report.json; without the ids, which split.json holds."""
        return {
            "data": self.root,
            "decoded": self.decoded,
            "has_errors": self.has_errors,
            "parts": {
                part: {
                    "images": counts.images,
                    "usable": counts.usable,
                    "formats": counts.formats,
                    "sizes": [{"width": w, "height": h, "images": n} for (w, h), n in counts.sizes.items()],
                }
                for part, counts in self.parts.items()
            },
            "boxes": {"listed": self.boxes_listed, "usable": self.boxes_usable},
            "classes": [
                {"category_id": c.category_id, "name": c.name, "boxes": c.boxes, "images": c.images}
                for c in self.classes
            ],
            "findings": [
                {
                    "part": f.part,
                    "kind": f.kind.value,
                    "severity": f.severity.value,
                    "count": f.count,
                    "text": f.text,
                    "examples": list(f.examples),
                }
                for f in self.findings
            ],
        }


def printable(text: str) -> str:
    """The text with what would disturb a terminal or cannot be encoded written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Collector:
    """Findings by part and kind, in the order of `Kind`."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, Kind]] = Counter()
        self._examples: dict[tuple[str, Kind], list[str]] = {}

    def add(self, part: str, kind: Kind, examples: Sequence[str], count: int | None = None) -> None:
        """`count` cases of which `examples` are some; the examples are all of them without a count."""
        count = len(examples) if count is None else count
        if count:
            self._counts[part, kind] += count
            kept = self._examples.setdefault((part, kind), [])
            kept.extend(printable(text) for text in examples[: EXAMPLES - len(kept)])

    def findings(self) -> tuple[Finding, ...]:
        """What was added: errors first, then warnings, then notes."""
        order = {severity: rank for rank, severity in enumerate((_E, _W, _N))}
        kinds = list(Kind)
        found = [Finding(p, k, n, tuple(self._examples[p, k])) for (p, k), n in self._counts.items()]
        return tuple(sorted(found, key=lambda f: (order[f.severity], f.part != "train", kinds.index(f.kind))))

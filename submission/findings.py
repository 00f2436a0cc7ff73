"""What can be wrong with a submission, counted by kind with examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

EXAMPLES = 3
"""So many examples of each kind are kept."""


class Kind(StrEnum):
    """The faults for which a judge would refuse a submission, in the order of a report."""

    NOT_JSON = "not JSON"
    NOT_A_LIST = "not a JSON list"
    NOT_AN_OBJECT = "entry is not an object"
    KEY_MISSING = "key missing"
    KEY_UNKNOWN = "key not in the sample submission"
    KEY_REPEATED = "key twice in one entry"
    WRONG_TYPE = "value of the wrong type"
    NOT_FINITE = "number not finite"
    UNKNOWN_IMAGE = "image not in the test set"
    UNKNOWN_CATEGORY = "category unknown"
    SCORE_RANGE = "score out of 0 to 1"
    OUT_OF_IMAGE = "box out of its image"
    NO_AREA = "box of no area"
    REPEATED = "detection repeated"
    IMAGE_TWICE = "image named twice in the list of test images"
    TOO_LARGE = "file not smaller than the limit"


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault: how often, and where for example."""

    kind: Kind
    count: int
    examples: tuple[str, ...]
    """`[17] ...` is the entry of that index in the file's list, the first being [0]."""

    def __str__(self) -> str:
        more = "; ..." if self.count > len(self.examples) else ""
        return f"{self.kind}: {self.count:,} ({'; '.join(self.examples)}{more})"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """What a submission holds, and what is wrong with it."""

    path: Path
    entry_count: int
    """Entries of the list, sound or not, up to where it stops being JSON."""
    size_bytes: int
    findings: tuple[Finding, ...]
    """Empty where a judge would accept the file."""

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings)


class Tally:
    """Findings while they are made."""

    def __init__(self) -> None:
        self._counts: dict[Kind, int] = {}
        self._examples: dict[Kind, list[str]] = {}

    def add(self, kind: Kind, examples: Sequence[str], count: int = 1) -> None:
        """Counts `count` more faults, with examples of some of them."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        kept = self._examples.setdefault(kind, [])
        kept.extend(examples[: EXAMPLES - len(kept)])

    def findings(self) -> tuple[Finding, ...]:
        """In the order of `Kind`."""
        return tuple(
            Finding(kind, self._counts[kind], tuple(self._examples[kind])) for kind in Kind if kind in self._counts
        )

"""Which file of a folder an image name of a JSON file means.

Exact, else the same name in another Unicode form (JSON in NFC, a disk in NFD, or the reverse), else the same
name in other letter case. A file answers to one such name only, and a name that two files fit means none.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from parkdet.runtime.errors import DataError

IMAGE_EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp"))
"""Endings, in lower case, of the formats that parkdet reads."""
OTHER_IMAGE_EXTENSIONS = frozenset((".tif", ".tiff", ".gif", ".mpo", ".jp2", ".heic", ".heif", ".avif", ".dng", ".pfm"))
"""Endings under which a user has images all the same: in a folder they are told as unreadable, not passed over."""


class Match(StrEnum):
    """How a name found its file."""

    EXACT = "exact"
    UNICODE = "unicode"
    LETTER_CASE = "letter case"
    AMBIGUOUS = "ambiguous"
    MISSING = "missing"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True)
class NameMatches:
    """The answer for a list of names."""

    files: list[str | None]
    """For every name the file's path below the folder, None where there is none."""
    matches: list[Match]
    """For every name how its file was found, or why not."""
    unlisted: list[str]
    """Image files that no name means, sorted."""


def list_files(folder: Path) -> list[str]:
    """All files below `folder` as paths relative to it, with `/`, unsorted. One listing a folder, no stat.

    DataError when `folder` cannot be listed; what is in a folder below it that cannot be, is not there.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        here = f"{folder}/{prefix}"
        try:
            status = os.stat(here)  # noqa: PTH116 - once a folder: a link may lead back up
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                for entry in entries:
                    with suppress(OSError):  # a link in a circle is neither
                        if entry.is_dir():
                            waiting.append(f"{prefix}{entry.name}/")
                        elif entry.is_file():
                            found.append(prefix + entry.name)
        except OSError as error:
            if prefix:  # such as the lost+found of a mounted disk
                continue
            raise DataError(
                f"{folder / prefix}: the folder of images cannot be listed ({error.strerror}); "
                "put the images there or correct --data"
            ) from None
    return found


def match_names(names: Sequence[str], files: Iterable[str]) -> NameMatches:
    """The file that each name means, out of paths relative to the folder."""
    files = list(files)
    on_disk = set(files)
    inside = [_relative(name) for name in names]
    matched: list[str | None] = [name if name in on_disk else None for name in inside]
    matches = [Match.OUTSIDE if name is None else Match.EXACT if name in on_disk else Match.MISSING for name in inside]
    for match, key in ((Match.UNICODE, _nfc), (Match.LETTER_CASE, _folded)):
        open_names = [i for i, how in enumerate(matches) if how is Match.MISSING]
        if not open_names:
            break
        by_key = _group(on_disk.difference(filter(None, matched)), key)
        takers: dict[str, list[int]] = defaultdict(list)
        for index in open_names:
            takers[key(inside[index] or "")].append(index)
        for name_key, indices in takers.items():
            fitting = by_key.get(name_key, ())
            if len(fitting) == 1 and len({inside[index] for index in indices}) == 1:
                for index in indices:  # several entries of one and the same name share the file
                    matched[index], matches[index] = fitting[0], match
            elif fitting:
                for index in indices:
                    matches[index] = Match.AMBIGUOUS
    unlisted = sorted(f for f in on_disk.difference(filter(None, matched)) if _is_image_name(f))
    return NameMatches(matched, matches, unlisted)


def _relative(name: str) -> str | None:
    """The name as a path below the folder; None where it leads out of it."""
    if "/" not in name:
        return None if name in (".", "..") else name
    path = os.path.normpath(name)
    return None if path.startswith(("/", "../")) or path in (".", "..") else path


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _group(files: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for file in files:
        groups[key(file)].append(file)
    return groups


def _is_image_name(file: str) -> bool:
    name = file.rpartition("/")[2]
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS  # noqa: PTH122

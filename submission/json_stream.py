"""A JSON list of objects, read block by block: a file of any size in a few megabytes.

A block is decoded whole where it is well formed, and entry by entry where it is not, so that one bad
entry is found without losing its neighbours.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

ENTRY_LIMIT = 1 << 20
"""Characters of the longest entry that is read; what is longer is no detection."""

_FOREIGN = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"\xef\xbb\xbf": "it begins with a byte order mark, at which JSON parsers stop; save it as UTF-8 without one",
    b"\xff\xfe": "it is UTF-16 or UTF-32; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
}
"""First bytes of what is handed in by mistake."""

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_SINGLE_ENTRIES = 10_000
_MOST_DIGITS = 4000


class BadJson(Exception):  # noqa: N818 - a finding about a file, not an error of this program
    """The file is not a JSON list, or stops being one; the message says where."""


class NotAList(BadJson):
    """The file may be JSON, but holds something else than a list."""


class RepeatedKeys(dict[str, Any]):
    """An object in which a key stands twice; parsers differ on which value they take."""


def json_blocks(path: Path, key_count: int) -> Iterator[list[Any]]:
    """The list's entries, some thousands at a time.

    Blocks whose objects all have `key_count` keys are read fast. NaN and Infinity, which JSON does not
    know but many writers emit, come as floats. Raises BadJson where the file is not a JSON list; the
    entries before that point have been given out by then.
    """
    with path.open("rb") as file:
        head = file.read(4)
        for signature, what in _FOREIGN.items():
            if head.startswith(signature):
                raise BadJson(what)
        file.seek(0)
        yield from _Reader(file, key_count).blocks()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    return decoded if len(decoded) == len(pairs) else RepeatedKeys(pairs)


def _integer(digits: str) -> int | float:
    """Python reads no integer of more than some thousand digits; beyond any float64 they all are."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


_EXACT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


class _Reader:
    """A window of text that moves over the file; it holds a whole entry or the rest of the file."""

    def __init__(self, file: BinaryIO, key_count: int) -> None:
        self._file = file
        self._key_count = key_count
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0
        self._dropped = 0
        self._at_end = False
        self._not_utf8 = ""
        self._entries_given = 0
        self._single_until = 0

    def blocks(self) -> Iterator[list[Any]]:
        """See `json_blocks`."""
        first = self._next_character()
        if first != "[":
            if not first:
                raise BadJson(self._not_utf8 or "the file is empty")
            kind = NotAList if first in '{"-0123456789tfn' else BadJson
            raise kind(f"the file begins with {first!r}, a list with '['")
        self._position += 1
        follows = self._next_character()
        if follows != "]":
            follows = ","
            while follows == ",":
                entries, bad = self._whole_block(), None
                if not entries:
                    entries, bad = self._single_entries()
                self._entries_given += len(entries)
                yield entries
                if bad:
                    raise bad
                follows = self._next_character()
                self._position += follows == ","
        if follows != "]":
            raise self._unexpected(follows, "',' or ']' expected")
        self._position += 1
        follows = self._next_character()
        if follows or self._not_utf8:
            raise self._unexpected(follows, "nothing expected after the list")

    def _whole_block(self) -> list[Any]:
        """All entries up to the last `}` of the window; none where that is not the end of a sound entry."""
        self._next_character()
        end = self._text.rfind("}", self._position) + 1
        if end <= self._position or self._dropped + self._position < self._single_until:
            return []
        block = self._text[self._position : end]
        try:
            # Text that is a whole list once in brackets cannot have been cut within an entry. orjson is ten times as
            # fast as the exact reading and loses repeated keys: the count of colons betrays them.
            entries: list[Any] = orjson.loads(f"[{block}]")
        except (ValueError, RecursionError):
            entries = []
        if self._is_plain(entries, block):
            self._position = end
            return entries
        self._single_until = self._dropped + end
        return []

    def _is_plain(self, entries: list[Any], block: str) -> bool:
        """Whether all are objects of the right number of keys, none of which was there twice."""
        return (
            bool(entries)
            and {dict}.issuperset(map(type, entries))
            and {self._key_count}.issuperset(map(len, entries))
            # A key that was lost to another of its name has left its colon behind.
            and block.count(":") == len(entries) * self._key_count
        )

    def _single_entries(self) -> tuple[list[Any], BadJson | None]:
        """The next entries one by one; with what is wrong where the text stops being JSON."""
        entries: list[Any] = []
        while True:
            self._next_character()
            try:
                entry, end = _EXACT.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                return entries, self._undecodable(error, self._entries_given + len(entries))
            self._position = end
            entries.append(entry)
            if len(entries) == _SINGLE_ENTRIES or self._next_character() != ",":
                return entries, None
            self._position += 1

    def _next_character(self) -> str:
        """Skips white space and fills the window; the character there, empty at the end of the file."""
        while True:
            self._fill()
            space = _WHITESPACE.match(self._text, self._position)
            self._position = space.end() if space else self._position
            enough = len(self._text) - self._position >= ENTRY_LIMIT
            if enough or self._at_end:
                return self._text[self._position : self._position + 1]

    def _fill(self) -> None:
        if self._at_end or len(self._text) - self._position >= ENTRY_LIMIT:
            return
        pieces = [self._text[self._position :]]
        self._dropped += self._position
        self._position = 0
        length = len(pieces[0])
        while length < 2 * ENTRY_LIMIT and not self._at_end:
            data = self._file.read(ENTRY_LIMIT)
            self._at_end = not data
            try:
                pieces.append(self._decoder.decode(data, final=not data))
            except UnicodeDecodeError as error:
                pieces.append(error.object[: error.start].decode())
                self._at_end = True
                self._not_utf8 = f"not UTF-8 ({error.reason})"
            length += len(pieces[-1])
        self._text = "".join(pieces)

    def _undecodable(self, error: ValueError | RecursionError, entry: int) -> BadJson:
        position, reason = self._position, str(error)
        if isinstance(error, json.JSONDecodeError):
            position, reason = error.pos, error.msg
        elif isinstance(error, RecursionError):
            reason = "nested too deeply"
        if self._not_utf8 and position >= len(self._text) - 1:
            reason = self._not_utf8
        elif not self._at_end:
            reason += f" (an entry of more than {ENTRY_LIMIT:,} characters is not read)"
        elif position >= len(self._text):
            reason += "; the file ends here"
        return BadJson(f"entry [{entry}], character {self._dropped + position}: {reason}")

    def _unexpected(self, character: str, wanted: str) -> BadJson:
        found = repr(character) if character else self._not_utf8 or "the file ends"
        where = f"character {self._dropped + self._position}"
        return BadJson(f"after {self._entries_given} entries, {where}: {found}, {wanted}")

"""YAML text as a tree in which every key and every value knows its file, line and column.

Plain scalars follow the core schema of YAML 1.2, not PyYAML's 1.1: `1e-3` is a number, `no` and `1:30` and
dates are text. What the two read differently without any trace, `010`, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from parkdet.runtime.errors import ConfigError

VALUES_MAX = 50_000
"""Values a file may hold once its aliases are written out: far above any settings, far below a bomb."""
DEPTH_MAX = 50
DIGITS_MAX = 300

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_RADIX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = frozenset({".nan", ".NaN", ".NAN"})
_SURROGATE = re.compile(r"[\ud800-\udfff]")

_PLAIN = "plain"
_TEXT_TAG = "tag:yaml.org,2002:str"
_LIST_TAG = "tag:yaml.org,2002:seq"
_MAPPING_TAG = "tag:yaml.org,2002:map"

KeyPath = tuple[str | int, ...]
"""Where a value stands in the settings: keys, and indices of lists."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key or value was written."""

    source: str
    """The file as shown to the user, or `override 'key=value'`."""
    line: int = 0
    """Counted from 1; 0 where there are no lines."""
    column: int = 0
    order: int = 0
    """Rank of the source among those of one load: findings are sorted by it, then by line."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    place: Place
    path: KeyPath
    message: str

    def __str__(self) -> str:
        return f"{self.place} {dotted(self.path)}: {self.message}" if self.path else f"{self.place} {self.message}"


@dataclass(frozen=True, slots=True)
class ScalarValue:
    """A number, a truth value, text or null."""

    place: Place
    value: str | int | float | bool | None
    text: str
    """As written, without quotes."""
    is_quoted: bool


@dataclass(frozen=True, slots=True)
class ListValue:
    """A list."""

    place: Place
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class MappingValue:
    """Keys, each with the place where it was written, and their values."""

    place: Place
    entries: dict[str, tuple[Place, Value]]


Value = ScalarValue | ListValue | MappingValue


def dotted(path: KeyPath) -> str:
    """`train.stages[1].epochs`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def refuse(findings: Iterable[Finding]) -> NoReturn:
    """ConfigError with every finding, one a line, in the order of the sources and their lines."""
    ordered = sorted(findings, key=lambda found: (found.place.order, found.place.line, found.place.column))
    raise ConfigError("\n".join(dict.fromkeys(map(str, ordered))))


def plain_value(value: Value) -> Any:
    """The tree as Python's own dict, list, str, int, float, bool and None."""
    if isinstance(value, MappingValue):
        return {key: plain_value(item) for key, (_, item) in value.entries.items()}
    if isinstance(value, ListValue):
        return [plain_value(item) for item in value.items]
    return value.value


def merge(below: Value, above: Value) -> Value:
    """`above` as a diff over `below`: mappings merge key by key, everything else replaces."""
    if not (isinstance(below, MappingValue) and isinstance(above, MappingValue)):
        return above
    entries = dict(below.entries)
    for key, (place, value) in above.entries.items():
        entries[key] = (place, merge(entries[key][1], value) if key in entries else value)
    return MappingValue(above.place, entries)


def read_plain(text: str) -> str | int | float | bool | None:
    """A plain scalar by YAML 1.2's core schema; an integer with a leading zero is decimal here."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INTEGER.fullmatch(text):
        return int(text[:DIGITS_MAX])
    if _RADIX.fullmatch(text):
        return int(text[:DIGITS_MAX], 0)
    if text in _NAN or _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return float(text) if _FLOAT.fullmatch(text) else text


def scalar_value(text: str, place: Place, path: KeyPath, findings: list[Finding]) -> ScalarValue:
    """A plain scalar; what is ambiguous in it is added to `findings`."""
    if _LEADING_ZERO.fullmatch(text):
        bare = str(int(text[:DIGITS_MAX]))
        findings.append(
            Finding(place, path, f"'{text}' is ambiguous (octal in YAML 1.1): write {bare}, or '{text}' in quotes")
        )
    elif len(text) > DIGITS_MAX and (_INTEGER.fullmatch(text) or _RADIX.fullmatch(text)):
        findings.append(Finding(place, path, f"a number of {len(text)} digits is too long"))
    return ScalarValue(place, read_plain(text), text, is_quoted=False)


def read_tree(text: str, place: Place, path: KeyPath, findings: list[Finding]) -> Value:
    """The one document of `text` as a tree; its places have the source and order of `place`.

    Keys set twice, tags and ambiguous scalars are added to `findings`. Raises ConfigError where there is no
    tree at all: no YAML, nothing in it, too much in it.
    """
    try:
        root, second = _compose(text)
        reader = _TreeReader(place, findings)
        if root is None or (root.tag == _PLAIN and not root.value):
            refuse([Finding(reader.at(0, 0), path, "the file is empty; write {} to keep every default")])
        if second is not None:
            findings.append(Finding(reader.place_of(second), path, "a second document; only one is read"))
        return reader.value(root, path, frozenset())
    except ReaderError as error:
        line, column = line_and_column(text[: error.position])
        what = f"character U+{int(error.character):04X} is not allowed in YAML"
        refuse([*findings, Finding(_moved(place, line, column), path, what)])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        refuse([*findings, Finding(_moved(place, line, column), path, _syntax_problem(error))])
    except RecursionError:
        refuse([*findings, Finding(_moved(place, 1, 1), path, f"nested deeper than {DEPTH_MAX} levels")])


def line_and_column(text_before: str) -> tuple[int, int]:
    """Line and column, from 1, of the character that follows this text."""
    return text_before.count("\n") + 1, len(text_before) - (text_before.rfind("\n") + 1) + 1


def _moved(place: Place, line: int, column: int) -> Place:
    # An override has one line, and nobody counts its columns.
    return Place(place.source, line, column, place.order) if place.line else place


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it cannot be read"
    if "'\\t'" in problem:
        return "not YAML: a tab cannot indent; use spaces"
    context = f" {error.context}" if error.context else ""
    return f"not YAML:{context}{',' if context else ''} {problem}"


class _UnresolvedComposer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's composer, which leaves it to us what a plain scalar means."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:  # noqa: ARG002 - the signature is PyYAML's
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TEXT_TAG
        return _LIST_TAG if kind is yaml.SequenceNode else _MAPPING_TAG


def _compose(text: str) -> tuple[yaml.Node | None, yaml.Node | None]:
    """The first document's node, and the second's where there is one."""
    composer = _UnresolvedComposer(text)
    try:
        nodes = [composer.get_node() if composer.check_node() else None for _ in range(2)]
        return nodes[0], nodes[1]
    finally:
        composer.dispose()


class _TreeReader:
    """Turns PyYAML's nodes into our values, aliases written out, within limits."""

    def __init__(self, place: Place, findings: list[Finding]) -> None:
        self._place = place
        self._findings = findings
        self._count = 0

    def at(self, line: int, column: int) -> Place:
        return _moved(self._place, line + 1, column + 1)

    def place_of(self, node: yaml.Node) -> Place:
        return self.at(node.start_mark.line, node.start_mark.column)

    def value(self, node: yaml.Node, path: KeyPath, within: frozenset[int]) -> Value:
        """`within`: the ids of the nodes that hold this one."""
        place = self.place_of(node)
        self._count += 1
        if self._count > VALUES_MAX:
            refuse([*self._findings, Finding(place, path, f"more than {VALUES_MAX} values, aliases written out")])
        if id(node) in within:
            refuse([*self._findings, Finding(place, path, "an alias to a value that holds it")])
        if len(within) > DEPTH_MAX:
            refuse([*self._findings, Finding(place, path[:1], f"nested deeper than {DEPTH_MAX} levels")])
        if node.tag not in (_PLAIN, _TEXT_TAG, _LIST_TAG, _MAPPING_TAG):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._findings.append(Finding(place, path, f"tag '{tag}' is not read here; remove it"))
        inside = within | {id(node)}
        if isinstance(node, yaml.MappingNode):
            return MappingValue(place, self._entries(node, path, inside))
        if isinstance(node, yaml.SequenceNode):
            items = [self.value(item, (*path, index), inside) for index, item in enumerate(node.value)]
            return ListValue(place, tuple(items))
        text = str(node.value)
        if _SURROGATE.search(text):
            self._findings.append(Finding(place, path, "half of a surrogate pair is not a character"))
            text = _SURROGATE.sub("\ufffd", text)
        if node.tag == _PLAIN:
            return scalar_value(text, place, path, self._findings)
        return ScalarValue(place, text, text, is_quoted=True)

    def _entries(self, node: yaml.MappingNode, path: KeyPath, inside: frozenset[int]) -> dict[str, tuple[Place, Value]]:
        entries: dict[str, tuple[Place, Value]] = {}
        merged: list[MappingValue] = []
        for key_node, value_node in node.value:
            place = self.place_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._findings.append(Finding(place, path, "a key must be a word, not a list or a mapping"))
                continue
            key = str(key_node.value)
            if key == "<<" and key_node.tag == _PLAIN:
                merged += self._merged(value_node, path, inside)
                continue
            value = self.value(value_node, (*path, key), inside)
            if key in entries:
                first = entries[key][0]
                where = f"first in line {first.line}, again in line {place.line}" if place.line else "in one value"
                self._findings.append(Finding(place, (*path, key), f"set twice: {where}"))
            else:
                entries[key] = (place, value)
        for mapping in merged:
            entries = {**mapping.entries, **entries}
        return entries

    def _merged(self, node: yaml.Node, path: KeyPath, inside: frozenset[int]) -> list[MappingValue]:
        """The mappings that a merge key `<<` names, the strongest first."""
        value = self.value(node, path, inside)
        mappings = value.items if isinstance(value, ListValue) else (value,)
        wrong = [item for item in mappings if not isinstance(item, MappingValue)]
        self._findings += [
            Finding(item.place, (*path, "<<"), "expected a mapping, or a list of them") for item in wrong
        ]
        return [item for item in mappings if isinstance(item, MappingValue)]

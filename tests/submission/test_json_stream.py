from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parkdet.submission import json_stream
from parkdet.submission.json_stream import BadJson, NotAList, RepeatedKeys, json_blocks

ENTRY = {"a": 1, "b": [1.5, {"c": '}, {\\"[]'}]}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
two_keys = st.fixed_dictionaries({"a": values, "b": values})


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "file.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[Any]:
    return [entry for block in json_blocks(path, 2) for entry in block]


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of some entries, so that a short file passes through it in many steps."""
    monkeypatch.setattr(json_stream, "ENTRY_LIMIT", 1000)
    monkeypatch.setattr(json_stream, "_SINGLE_ENTRIES", 3)


@pytest.mark.parametrize("text", ["[]", " [ \n ] \n"])
def test_an_empty_list_has_no_entries(tmp_path: Path, text: str) -> None:
    assert read(write(tmp_path, text)) == []


@pytest.mark.usefixtures("small_window")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(two_keys | values, max_size=60),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
)
def test_any_list_reads_as_json_reads_it(
    tmp_path: Path, entries: list[Any], indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(entries, indent=indent, ensure_ascii=ascii_only)
    path = write(tmp_path, text.encode("utf-8", "surrogatepass" if ascii_only else "replace"))
    assert read(path) == json.loads(path.read_bytes())


@pytest.mark.usefixtures("small_window")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), count=st.integers(1, 60))
def test_a_damaged_list_is_found_where_json_finds_it(tmp_path: Path, data: st.DataObject, count: int) -> None:
    text = json.dumps([ENTRY] * count)
    at = data.draw(st.integers(0, len(text) - 1))
    kind = data.draw(st.sampled_from(["cut", "leave out", "replace", "insert"]))
    character = data.draw(st.sampled_from('{}[],:"\\ 1ax'))
    damaged = {
        "cut": text[:at],
        "leave out": text[:at] + text[at + 1 :],
        "replace": text[:at] + character + text[at + 1 :],
        "insert": text[:at] + character + text[at:],
    }[kind]
    path = write(tmp_path, damaged)
    try:
        expected = json.loads(damaged)
    except ValueError:
        with pytest.raises(BadJson):
            read(path)
    else:
        if isinstance(expected, list):
            assert read(path) == expected
        else:
            with pytest.raises(NotAList):
                read(path)


@pytest.mark.usefixtures("small_window")
def test_entries_before_the_damage_are_given_out(tmp_path: Path) -> None:
    text = json.dumps([ENTRY] * 100)
    blocks = json_blocks(write(tmp_path, text[:-1] + ', {"a": '), 2)
    given_out: list[Any] = []
    with pytest.raises(BadJson, match=r"entry \[100\].*the file ends here"):
        given_out.extend(entry for block in blocks for entry in block)
    assert given_out == [ENTRY] * 100


def test_the_window_is_refilled(tmp_path: Path) -> None:
    # Real sizes: several windows of text.
    entries = [{"a": number, "b": "x" * 40} for number in range(60_000)]
    assert read(write(tmp_path, json.dumps(entries))) == entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ("x", "begins with 'x'"),
        ("\ufeff[]", "byte order mark"),
        (gzip.compress(b"[]"), "compressed with gzip"),
        (b"PK\x03\x04", "zip archive"),
        ("[", "entry \\[0\\]"),
        ("[1", "the file ends, ',' or ']' expected"),
        ("[1,]", "entry \\[1\\]"),
        ("[,1]", "entry \\[0\\]"),
        ("[1] 2", "'2', nothing expected after the list"),
        ("[][]", "nothing expected"),
        ("[1 2]", "'2', ',' or ']' expected"),
        (b"[1, \xff]", "not UTF-8"),
        (b"[1] \xff", "not UTF-8"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b'[{"a": "\xc3', "not UTF-8"),
        (json.dumps([1]).encode("utf-16"), "UTF-16 or UTF-32"),
        (codecs.BOM_UTF16_BE + json.dumps([1]).encode("utf-16-be"), "UTF-16"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + '"' + "x" * 3_000_000 + '"]', "more than 1,048,576 characters"),
    ],
)
def test_what_is_not_json_is_said(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(BadJson, match=message):
        read(write(tmp_path, content))


def test_an_integer_of_any_length_is_read(tmp_path: Path) -> None:
    # Python itself refuses more than some thousand digits.
    assert read(write(tmp_path, f"[1, {'9' * 4000}, -{'9' * 10_000}, 2]")) == [1, int("9" * 4000), float("-inf"), 2]


@pytest.mark.parametrize("text", ["{}", '{"a": []}', "1", "-1", '"x"', "null", "true"])
def test_json_that_is_no_list_is_told_apart(tmp_path: Path, text: str) -> None:
    with pytest.raises(NotAList):
        read(write(tmp_path, text))


@pytest.mark.parametrize("text", ['[{"a": 1, "a": 2}]', '[{"a": 1, "\\u0061": 2}]', '[{"a": 1, "a": 1, "b": 1}]'])
def test_a_repeated_key_is_not_lost(tmp_path: Path, text: str) -> None:
    (entry,) = read(write(tmp_path, text))
    assert isinstance(entry, RepeatedKeys)

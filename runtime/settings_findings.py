"""What pydantic has against a tree of settings, said with the place, what was expected and what was found."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from parkdet.runtime.settings_yaml import (
    Finding,
    KeyPath,
    ListValue,
    MappingValue,
    Place,
    ScalarValue,
    Value,
    plain_value,
    read_plain,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "a path",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "string_pattern_mismatch": "text like the pattern {pattern}",
}
"""By pydantic's name of the error. Bounds read `must be ...`, kinds read `expected ...`."""
_BOUNDS = ("greater_than", "less_than", "multiple_of", "string_too_")
_TRUTH_WORDS = frozenset({"yes", "no", "on", "off", "y", "n", "true", "false"})
_SHOWN_MAX = 60
_KEYS_LISTED_MAX = 12


def validated(model: type[M], tree: Value) -> M | list[Finding]:
    """The settings that a tree holds, or everything that is wrong with it."""
    try:
        # In pydantic's words JSON is where a list may fill a tuple and text an enum, yet "3" is no number.
        return model.model_validate_json(json.dumps(plain_value(tree)), strict=True, extra="forbid")
    except ValidationError as error:
        by_path: dict[tuple[KeyPath, bool], list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            path, is_key = _settings_path(tree, detail)
            by_path.setdefault((path, is_key), []).append(detail)
        return [_finding(model, tree, path, details) for (path, _), details in by_path.items()]


def field_key(model: type[BaseModel], name: str) -> str:
    """The key under which a field stands in a file: its alias where it has one."""
    field = model.model_fields[name]
    return field.validation_alias if isinstance(field.validation_alias, str) else field.alias or name


def fields_by_key(model: type[BaseModel]) -> dict[str, Any]:
    """The annotation of every field, under its key."""
    return {field_key(model, name): field.annotation for name, field in model.model_fields.items()}


def model_paths(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """The path of every field of a model and of the models in its fields, not through lists."""
    return list(_paths(model, ()))


def _paths(model: type[BaseModel], above: tuple[type[BaseModel], ...]) -> Iterator[tuple[str, ...]]:
    for key, annotation in fields_by_key(model).items():
        yield (key,)
        for nested in _members(annotation):
            if isinstance(nested, type) and issubclass(nested, BaseModel) and nested not in (*above, model):
                yield from ((key, *path) for path in _paths(nested, (*above, model)))


def _members(annotation: Any) -> list[Any]:
    """The types that a union or Annotated holds, the type itself where it is neither."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _members(arguments[0])
    if origin in (Union, UnionType):
        return [member for argument in arguments if argument is not NoneType for member in _members(argument)]
    return [annotation]


def _models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that the mapping at a path may hold."""
    types: list[Any] = [model]
    for part in path:
        following: list[Any] = []
        for kind in types:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                annotation = fields_by_key(kind).get(str(part))
                following += [] if annotation is None else _members(annotation)
            else:
                # list[X], tuple[X, ...], dict[str, X]: what they hold is what their last types are.
                following += [m for argument in get_args(kind) if argument is not ... for m in _members(argument)]
        types = following
    return [kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _settings_path(tree: Value, detail: ErrorDetails) -> tuple[KeyPath, bool]:
    """Pydantic's location without what is no key: the names of union members and of validators.

    Second: whether the key itself is meant, missing or unknown, and not its value.
    """
    path: list[str | int] = []
    value: Value | None = tree
    for part in detail["loc"]:
        inner = _child(value, part)
        if inner is not None:
            path.append(part)
            value = inner
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path), detail["type"] in ("missing", "extra_forbidden")


def _child(value: Value | None, part: str | int) -> Value | None:
    if isinstance(value, MappingValue) and str(part) in value.entries:
        return value.entries[str(part)][1]
    if isinstance(value, ListValue) and isinstance(part, int) and 0 <= part < len(value.items):
        return value.items[part]
    return None


def value_at(tree: Value, path: KeyPath) -> Value | None:
    """The value at a path, None where there is none."""
    value: Value | None = tree
    for part in path:
        value = _child(value, part)
    return value


def _finding(model: type[BaseModel], tree: Value, path: KeyPath, details: Sequence[ErrorDetails]) -> Finding:
    kind = details[0]["type"]
    if kind == "missing":
        parent = value_at(tree, path[:-1]) or tree
        return Finding(parent.place, path, "missing: it has no default")
    value = value_at(tree, path) or tree
    if kind == "extra_forbidden":
        return Finding(_key_place(tree, path), path, unknown_key(model, path))
    custom = [detail for detail in details if detail["type"] in ("value_error", "assertion_error")]
    if custom:
        reasons = dict.fromkeys(_reason(detail) for detail in custom)
        return Finding(value.place, path, "; ".join(reasons))
    return Finding(value.place, path, _expected_and_found(details, value))


def _key_place(tree: Value, path: KeyPath) -> Place:
    parent = value_at(tree, path[:-1])
    if isinstance(parent, MappingValue):
        return parent.entries[str(path[-1])][0]
    return (value_at(tree, path) or tree).place


def _reason(detail: ErrorDetails) -> str:
    error = detail.get("ctx", {}).get("error")
    return str(error) if error and str(error) else detail["msg"]


def unknown_key(model: type[BaseModel], path: KeyPath) -> str:
    """`unknown key`, and what the user may have meant."""
    key = str(path[-1])
    known = [name for nested in _models_at(model, path[:-1]) for name in fields_by_key(nested)]
    elsewhere = [".".join(other) for other in model_paths(model)]
    candidates = difflib.get_close_matches(key, known, n=1) or _closest_paths(key, elsewhere)
    if candidates:
        meant = " or ".join(f"'{name}'" for name in candidates)
        return f"unknown key (did you mean {meant}?)"
    if known and len(known) <= _KEYS_LISTED_MAX:
        return f"unknown key (known here: {', '.join(known)})"
    return "unknown key"


def _closest_paths(key: str, paths: Sequence[str]) -> list[str]:
    """The dotted paths whose last name is nearest to `key`, at most three."""
    nearest = difflib.get_close_matches(key, {path.rpartition(".")[2] for path in paths}, n=1, cutoff=0.7)
    return [path for path in paths if path.rpartition(".")[2] in nearest][:3]


def _expected_and_found(details: Sequence[ErrorDetails], value: Value) -> str:
    """One sentence for all that a value was refused for: more than one where its type is a union."""
    wanted = list(dict.fromkeys(_wanted(detail) for detail in details))
    all_bounds = all(detail["type"].startswith(_BOUNDS) for detail in details)
    found = describe(value, says_kind=not all_bounds)
    if "a list" in wanted and _is_indices(value):
        return "there is no list here whose items could be changed; set the whole list"
    if details[0]["type"] in ("too_short", "too_long"):
        found = f"{len(value.items) if isinstance(value, ListValue) else 'another number'} items"
    sentence = f"{'must be' if all_bounds else 'expected'} {' or '.join(wanted)}, found {found}"
    return sentence + _remedy(wanted, details, value)


def _is_indices(value: Value) -> bool:
    """Whether overrides of a list's items (`stages.0.epochs=1`) made a mapping where no list was."""
    return isinstance(value, MappingValue) and bool(value.entries) and all(map(str.isdecimal, value.entries))


def _wanted(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("literal_error", "enum"):
        choices = _choices(detail)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    return re.sub(r"^(Input|Value) should (be|have) ", "", detail["msg"])


def _choices(detail: ErrorDetails) -> list[str]:
    """The values of a Literal or Enum as pydantic shows them: `'a', 'b' or 'c'`."""
    listed = str(detail.get("ctx", {}).get("expected", ""))
    choices = re.findall(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"]+""", listed)
    return [choice for choice in choices if choice != "or"] or [listed]


def _remedy(wanted: Sequence[str], details: Sequence[ErrorDetails], value: Value) -> str:
    if not isinstance(value, ScalarValue) or not isinstance(value.value, str):
        return ""
    if "true or false" in wanted and value.value.lower() in _TRUTH_WORDS:
        return ": write true or false" + (", without quotes" if value.is_quoted else "")
    choices = [
        choice.strip("'") for detail in details if "expected" in detail.get("ctx", {}) for choice in _choices(detail)
    ]
    near = difflib.get_close_matches(value.value.lower(), choices, n=1)
    if near:
        return f" (did you mean '{near[0]}'?)"
    is_number = isinstance(read_plain(value.value), int | float)
    if value.is_quoted and is_number and any("number" in want for want in wanted):
        return " (remove the quotes)"
    return ""


def describe(value: Value, says_kind: bool = True) -> str:
    """A value as a message shows it: `the text 'abc'`, `the number 1.5`, `true`, `a list`."""
    if isinstance(value, MappingValue):
        return "a mapping"
    if isinstance(value, ListValue):
        return "a list"
    if value.value is None:
        return "nothing (null)"
    shown = value.text if len(value.text) <= _SHOWN_MAX else f"{value.text[:_SHOWN_MAX]}..."
    if isinstance(value.value, str):
        return f"the text '{shown}'".replace("\n", "\\n") if says_kind else f"'{shown}'"
    if isinstance(value.value, bool) or not says_kind:
        return shown
    return f"the number {shown}"

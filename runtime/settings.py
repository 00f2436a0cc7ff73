"""Settings files, read strictly: every key is known, every value of its type, every error told at once.

`contest.yaml:14:3 train.optimzer: unknown key (did you mean 'optimizer'?)`

A settings file is YAML, its model pydantic's. A file may start from another one (`base: other.yaml`), and
`key=value` overrides come last. What YAML means here is said in settings_yaml.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from parkdet.runtime.errors import ConfigError
from parkdet.runtime.settings_findings import M, describe, model_paths, unknown_key, validated
from parkdet.runtime.settings_yaml import (
    Finding,
    ListValue,
    MappingValue,
    Place,
    Value,
    line_and_column,
    merge,
    plain_value,
    read_plain,
    read_tree,
    refuse,
    scalar_value,
)

BASE_KEY = "base"
"""Top-level key that names the file over which this one is a diff. No model may have a field of this name."""
_OVERRIDES_ORDER = 1_000
_FLOW_STARTS = ("[", "{", '"', "'")


class Settings(BaseModel):
    """Base of every settings model: nothing unknown, nothing converted, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True, slots=True)
class Override:
    """One `key=value` of the command line."""

    path: tuple[str, ...]
    """Keys, and indices of lists as digits."""
    value: Any
    """Python's own dict, list, str, int, float, bool or None."""
    text: str
    """As the user wrote it."""

    @property
    def dotted(self) -> str:
        """`train.epochs`."""
        return ".".join(self.path)


def load_settings(model: type[M], path: Path | str, overrides: Sequence[str] = ()) -> M:
    """The settings in a file, with `key=value` overrides. ConfigError names everything that is wrong."""
    findings: list[Finding] = []
    tree = _read_file(Path(path), (), findings)
    return _settings(model, tree, overrides, findings)


def settings_from_yaml(model: type[M], text: str, name: str, overrides: Sequence[str] = ()) -> M:
    """As `load_settings`, from text. Messages call it `name`; a `base` is sought in the folder of `name`."""
    findings: list[Finding] = []
    tree = _with_base(read_tree(text, Place(name, 1, 1), (), findings), Path(name), (), findings)
    return _settings(model, tree, overrides, findings)


def parse_overrides(overrides: Sequence[str], model: type[BaseModel] | None = None) -> list[Override]:
    """The overrides, in order. With a model a bare last name (`epochs=3`) becomes its full path.

    ConfigError names every one that cannot be read.
    """
    findings: list[Finding] = []
    parsed = [override for override, _ in _read_overrides(overrides, model, findings)]
    if findings:
        refuse(findings)
    return parsed


def dump_settings(settings: BaseModel) -> str:
    """YAML that `load_settings` reads back to an equal object, and that YAML 1.1 readers read alike."""
    values = settings.model_dump(mode="json", by_alias=True, round_trip=True)
    return yaml.dump(
        values,
        Dumper=_SettingsDumper,
        allow_unicode=True,
        sort_keys=False,
        default_flow_style=False,
        width=float("inf"),
    )


def _settings(model: type[M], tree: Value, overrides: Sequence[str], findings: list[Finding]) -> M:
    if not isinstance(tree, MappingValue):
        refuse([*findings, Finding(tree.place, (), f"expected keys and values, found {describe(tree)}")])
    whole: Value = tree
    for override, value in _read_overrides(overrides, model, findings):
        whole = _replaced(whole, override.path, value, (), findings)
    result = validated(model, whole)
    if isinstance(result, list):
        # A value that could not be read has been told; what the model has against it says nothing more.
        told = {(finding.place, finding.path) for finding in findings}
        refuse([*findings, *(found for found in result if (found.place, found.path) not in told)])
    if findings:
        refuse(findings)
    return result


def _shown(path: Path) -> str:
    """The path as the user gave it, from the current folder where it is under it."""
    try:
        return str(path.relative_to(Path.cwd()) if path.is_absolute() else path)
    except ValueError:
        return str(path)


def _read_file(path: Path, above: tuple[Path, ...], findings: list[Finding]) -> Value:
    """The tree of a file merged over its base's. `above`: the files that led here through their `base`."""
    place = Place(_shown(path), 1, 1, len(above))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        names = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f" (did you mean '{_shown(path.parent / near[0])}'?)" if near else ""
        raise ConfigError(f"{place.source}: no such settings file{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{place.source}: a folder, not a settings file; name a .yaml file in it") from None
    except OSError as error:
        raise ConfigError(f"{place.source}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = line_and_column(content[: error.start].decode("utf-8-sig"))
        where = Place(place.source, line, column, place.order)
        refuse([*findings, Finding(where, (), "not UTF-8 text; save the file as UTF-8")])
    return _with_base(read_tree(text, place, (), findings), path, above, findings)


def _with_base(tree: Value, path: Path, above: tuple[Path, ...], findings: list[Finding]) -> Value:
    if not isinstance(tree, MappingValue) or BASE_KEY not in tree.entries:
        return tree
    base = tree.entries[BASE_KEY][1]
    rest = MappingValue(tree.place, {key: entry for key, entry in tree.entries.items() if key != BASE_KEY})
    name = plain_value(base)
    if not isinstance(name, str) or not name:
        findings.append(Finding(base.place, (BASE_KEY,), f"expected a file's name, found {describe(base)}"))
        return rest
    base_path = _base_path(path.parent, name)
    if base_path is None:
        findings.append(Finding(base.place, (BASE_KEY,), f"no settings file '{name}' in {path.parent.resolve()}"))
        return rest
    chain = (*above, path)
    if base_path.resolve() in {other.resolve() for other in chain}:
        circle = " -> ".join(_shown(other) for other in (*chain, base_path))
        findings.append(Finding(base.place, (BASE_KEY,), f"goes round in a circle: {circle}"))
        return rest
    below = _read_file(base_path, chain, findings)
    if not isinstance(below, MappingValue):
        findings.append(Finding(below.place, (), f"expected keys and values, found {describe(below)}"))
        return rest
    return merge(below, rest)


def _base_path(folder: Path, name: str) -> Path | None:
    """The file that a `base` names: beside the file that says so, else among those shipped with parkdet."""
    names = [name] if Path(name).suffix in (".yaml", ".yml") else [name, f"{name}.yaml"]
    shipped = [] if Path(name).name != name else [Path(str(files("parkdet.configs")))]
    places = [place / candidate for place in (folder, *shipped) for candidate in names]
    return next((place for place in places if place.is_file()), None)


def _read_overrides(
    overrides: Sequence[str], model: type[BaseModel] | None, findings: list[Finding]
) -> list[tuple[Override, Value]]:
    """What can be read of them; what cannot is added to `findings`."""
    known = model_paths(model) if model else []
    parsed: list[tuple[Override, Value]] = []
    for index, text in enumerate(overrides):
        place = Place(f"override '{text}'", order=_OVERRIDES_ORDER + index)
        key, equals, value_text = text.partition("=")
        # `stages[0].epochs`, as messages write it, is `stages.0.epochs`.
        path = tuple(re.sub(r"\[(\d+)\]", r".\1", key.strip()).split("."))
        if not equals:
            findings.append(Finding(place, (), "expected key=value, found no '='"))
            continue
        if not all(path):
            findings.append(Finding(place, (), "expected key=value, found no key before the '='"))
            continue
        if model and path[0] not in {other[0] for other in known}:
            matches = [other for other in known if other[-len(path) :] == path]
            if len(matches) != 1:
                listed = ", ".join(".".join(other) for other in matches)
                problem = f"ambiguous, write it in full: {listed}" if matches else unknown_key(model, path)
                findings.append(Finding(place, path, problem))
                continue
            path = matches[0]
        value = _override_value(value_text.strip(), place, path, findings)
        if value is not None:
            parsed.append((Override(path, plain_value(value), text), value))
    return parsed


def _override_value(text: str, place: Place, path: tuple[str, ...], findings: list[Finding]) -> Value | None:
    """Quoted text, [lists] and {mappings} are YAML; anything else is one plain scalar, `a: b # c` too."""
    if not text.startswith(_FLOW_STARTS):
        return scalar_value(text, place, path, findings)
    found: list[Finding] = []
    try:
        value = read_tree(text, place, path, found)
    except ConfigError:
        findings.append(Finding(place, path, f"{text} is not a complete list, mapping or quoted text"))
        return None
    findings += found
    return value


def _replaced(tree: Value, path: tuple[str, ...], value: Value, above: tuple[str | int, ...],
              findings: list[Finding]) -> Value:  # fmt: skip
    """The tree with the value at `path` replaced, mappings made on the way; `above` leads to this tree."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if isinstance(tree, ListValue):
        if not part.isdecimal() or int(part) >= len(tree.items):
            item_path = (*above, int(part) if part.isdecimal() else part)
            findings.append(
                Finding(value.place, item_path, f"no such item: the list has {len(tree.items)}, counted from 0")
            )
            return tree
        index = int(part)
        item = _replaced(tree.items[index], rest, value, (*above, index), findings)
        return ListValue(tree.place, (*tree.items[:index], item, *tree.items[index + 1 :]))
    entries = tree.entries if isinstance(tree, MappingValue) else {}
    place, inner = entries.get(part, (value.place, MappingValue(value.place, {})))
    inside = _replaced(inner, rest, value, (*above, part), findings)
    mapping_place = tree.place if isinstance(tree, MappingValue) else value.place
    return MappingValue(mapping_place, {**entries, part: (place, inside)})


class _SettingsDumper(yaml.SafeDumper):
    """Block mappings, flow lists of scalars, and quotes wherever a reader of either YAML would need them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature is PyYAML's
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what is no text to YAML 1.1, but for y and n, which it does not take as truth values.
    needs_quotes = not isinstance(read_plain(text), str) or text in ("y", "Y", "n", "N")
    style = '"' if not text.isprintable() or text != text.strip() else "'" if needs_quotes else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    is_flat = not any(isinstance(inner, dict) for item in items for inner in (item, *_inner(item)))
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_flat)


def _inner(item: Any) -> list[Any]:
    return [item, *(deep for inner in item for deep in _inner(inner))] if isinstance(item, list) else [item]


_SettingsDumper.add_representer(str, _represent_text)
_SettingsDumper.add_representer(list, _represent_list)

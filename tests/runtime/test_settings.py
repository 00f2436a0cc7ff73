"""Strict settings: every error at once, each with its place; YAML 1.2's scalars; bases; overrides; dumps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, model_validator

from parkdet.runtime.errors import EXIT_USAGE, ConfigError
from parkdet.runtime.settings import (
    Settings,
    load_settings,
    settings_from_yaml,
)


class Train(Settings):
    epochs: int = Field(default=3, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    cosine: bool = False
    name: str = "run"
    decay: float | None = None
    imgsz: Annotated[int, Field(multiple_of=32)] | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _lr_fits_optimizer(self) -> Train:
        if self.optimizer == "adamw" and self.lr > 0.1:
            raise ValueError("lr is too high for adamw")
        return self


class Stage(Settings):
    epochs: int
    lr: float = 1.0


class Contest(Settings):
    seed: int = 100
    train: Train = Train()
    stages: tuple[Stage, ...] = ()
    pair: tuple[int, int] = (1, 2)
    weights: dict[str, float] = Field(default_factory=dict)
    image_folder: Path = Path("images")


def read(text: str, *overrides: str) -> Contest:
    return settings_from_yaml(Contest, text, "contest.yaml", overrides)


def findings(text: str, *overrides: str, model: type[BaseModel] = Contest) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings_from_yaml(model, text, "contest.yaml", overrides)
    return str(caught.value).splitlines()


def test_an_empty_mapping_keeps_every_default() -> None:
    assert read("{}") == Contest()


@pytest.mark.parametrize("text", ["", "# a comment\n", "---\n...\n"])
def test_an_empty_file_is_refused_because_nobody_writes_one_on_purpose(text: str) -> None:
    assert findings(text) == ["contest.yaml:1:1 the file is empty; write {} to keep every default"]


def test_values_of_every_kind_are_read() -> None:
    text = "seed: 7\ntrain: {lr: 0, optimizer: adamw, decay: null, imgsz: 640, cosine: true}\n"
    assert read(text) == Contest(seed=7, train=Train(lr=0.0, optimizer="adamw", decay=None, imgsz=640, cosine=True))
    found = read("pair: [3, 4]\nstages:\n  - epochs: 1\n  - {epochs: 2, lr: 1e-3}\nimage_folder: a b/c\n")
    assert found.pair == (3, 4)
    assert found.stages == (Stage(epochs=1), Stage(epochs=2, lr=0.001))
    assert found.image_folder == Path("a b/c")
    assert isinstance(read("train: {lr: 1}").train.lr, float)


def test_every_error_is_told_at_once_by_line() -> None:
    text = """\
train:
  optimzer: sgd
  epochs: -1
  lr: "3"
  cosine: no
  optimizer: sdg
  decay: .inf
  imgsz: 1.5
  name: [a]
stages:
  - epochs: 1
  - epochs: x
    foo: 1
  - {}
  - 3
pair: [1]
seeds: 1
weights: {a: yes}
"""
    assert findings(text) == [
        "contest.yaml:2:3 train.optimzer: unknown key (did you mean 'optimizer'?)",
        "contest.yaml:3:11 train.epochs: must be greater than 0, found -1",
        "contest.yaml:4:7 train.lr: expected a number, found the text '3' (remove the quotes)",
        "contest.yaml:5:11 train.cosine: expected true or false, found the text 'no': write true or false",
        "contest.yaml:6:14 train.optimizer: expected one of 'sgd', 'adamw', found the text 'sdg' (did you mean 'sgd'?)",
        "contest.yaml:7:10 train.decay: expected a finite number, found the number .inf",
        "contest.yaml:8:10 train.imgsz: expected a whole number or 'auto', found the number 1.5",
        "contest.yaml:9:9 train.name: expected text, found a list",
        "contest.yaml:12:13 stages[1].epochs: expected a whole number, found the text 'x'",
        "contest.yaml:13:5 stages[1].foo: unknown key (known here: epochs, lr)",
        "contest.yaml:14:5 stages[2].epochs: missing: it has no default",
        "contest.yaml:15:5 stages[3]: expected a mapping, found the number 3",
        "contest.yaml:16:7 pair[1]: missing: it has no default",
        "contest.yaml:17:1 seeds: unknown key (did you mean 'seed'?)",
        "contest.yaml:18:14 weights.a: expected a number, found the text 'yes'",
    ]


def test_a_key_of_another_mapping_is_shown_the_way() -> None:
    assert findings("optimiser: sgd") == ["contest.yaml:1:1 optimiser: unknown key (did you mean 'train.optimizer'?)"]


def test_unknown_keys_are_refused_even_by_models_that_would_drop_them() -> None:
    class Loose(BaseModel):
        seed: int = 1

    assert findings("sed: 1", model=Loose) == ["contest.yaml:1:1 sed: unknown key (did you mean 'seed'?)"]


def test_a_rule_across_fields_is_told_at_their_mapping() -> None:
    text = "seed: 1\ntrain:\n  optimizer: adamw\n  lr: 0.5\n"
    assert findings(text) == ["contest.yaml:3:3 train: lr is too high for adamw"]


def test_a_failed_check_exits_as_usage_error() -> None:
    with pytest.raises(ConfigError) as caught:
        read("seed: x")
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", value) for value in ("1.0", "1e3", "true", "'1'", "null", "1_000", "1:30", ".nan", "0b1")),
        *(("train.lr", value) for value in ("true", "'1'", "1_000", "1:30", "yes", "x", "[1]", "1e400", "nan")),
        *(("train.cosine", value) for value in ("yes", "no", "on", "off", "y", "n", "1", "0", "'true'", "tRue")),
        *(("train.name", value) for value in ("1", "1e3", "true", "null", "~", "", "0x1F", ".5", "-.inf")),
        *(("train.imgsz", value) for value in ("33", "Auto", "640.0")),
    ],
)
def test_nothing_is_converted_silently(key: str, value: str) -> None:
    parent, _, last = key.rpartition(".")
    text = f"{parent}:\n  {last}: {value}\n" if parent else f"{last}: {value}\n"
    place = f"contest.yaml:{2 if parent else 1}:"
    (finding,) = findings(text)
    assert finding.startswith(place)
    assert f" {key}: " in finding
    (finding,) = findings("{}", f"{key}={value}")
    assert finding.startswith(f"override '{key}={value}' {key}: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("-1.5e+2", -150.0), (".5", 0.5), ("5.", 5.0), ("+3", 3.0),
        ("0x1F", 31.0), ("0o17", 15.0), ("0", 0.0), ("-0", 0.0), ("007.5", 7.5),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    assert read(f"train: {{lr: {text}}}").train.lr == value


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "2020-01-01", "1:30", "1_000", "0b1", "=", "nan"])
def test_what_yaml_1_1_would_convert_is_text(text: str) -> None:
    assert read(f"train: {{name: {text}}}").train.name == text


@pytest.mark.parametrize("text", ["010", "-010", "00", "08"])
@pytest.mark.parametrize("key", ["seed", "train.name", "train.lr"])
def test_a_leading_zero_is_ambiguous_whatever_is_expected(text: str, key: str) -> None:
    (finding,) = findings("{}", f"{key}={text}")
    assert f"'{text}' is ambiguous" in finding
    assert read(f"train: {{name: '{text}'}}").train.name == text


def test_infinities_are_read_where_a_model_allows_them() -> None:
    class Free(BaseModel):
        low: float
        high: float
        gap: float

    free = settings_from_yaml(Free, "{low: -.inf, high: .Inf, gap: .NaN}", "free.yaml")
    assert (free.low, free.high) == (-math.inf, math.inf)
    assert math.isnan(free.gap)


def test_a_key_set_twice_names_both_lines() -> None:
    assert findings("seed: 1\ntrain: {}\nseed: 2\n") == [
        "contest.yaml:3:1 seed: set twice: first in line 1, again in line 3"
    ]


def test_aliases_and_merge_keys_are_read() -> None:
    text = """\
stages:
  - &first {epochs: 1, lr: 2}
  - *first
  - {<<: *first, lr: 3}
  - {<<: [*first], epochs: 9}
"""
    assert [(stage.epochs, stage.lr) for stage in read(text).stages] == [
        (1, 2.0),
        (1, 2.0),
        (1, 3.0),
        (9, 2.0),
    ]
    assert findings("train: {<<: 3}") == ["contest.yaml:1:13 train.<<: expected a mapping, or a list of them"]


def test_bombs_and_loops_of_aliases_end_at_once() -> None:
    level = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(20))
    assert "more than 50000 values" in findings(f"a: &a [1, 1]\n{level}")[0]
    assert "alias to a value that holds it" in findings("weights: &a {b: *a}")[0]
    assert "nested deeper than" in findings("weights: " + "[" * 60 + "]" * 60)[0]
    assert "nested deeper than" in findings("weights: " + "[" * 5000)[0]
    assert "too long" in findings("seed: " + "9" * 5000)[0]


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("train:\n\tlr: 1\n", "contest.yaml:2:1 not YAML: a tab cannot indent; use spaces"),
        ("seed: 1\n  lr: 1\n", "contest.yaml:2:5 not YAML: "),
        ("pair: [1, 2", "contest.yaml:1:12 not YAML: "),
        ("name: @x", "contest.yaml:1:7 not YAML: "),
        ("seed: *nowhere", "contest.yaml:1:7 not YAML: "),
        ("seed: 1\nname: \x00", "contest.yaml:2:7 character U+0000 is not allowed in YAML"),
        ("seed: 1\n---\nseed: 2\n", "contest.yaml:3:1 a second document; only one is read"),
        ("- 1", "contest.yaml:1:1 expected keys and values, found a list"),
        ("hello", "contest.yaml:1:1 expected keys and values, found the text 'hello'"),
        ("? [a]\n: 1", "contest.yaml:1:3 a key must be a word"),
        (
            "seed: !!python/name:os.system x",
            "contest.yaml:1:7 seed: tag '!!python/name:os.system' is not read",
        ),
        ('train: {name: "\\ud800"}', "contest.yaml:1:15 train.name: half of a surrogate pair"),
    ],
)
def test_what_is_no_settings_file_is_refused_with_its_place(text: str, beginning: str) -> None:
    assert findings(text)[0].startswith(beginning)


def test_unusable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_settings(Contest, path)
        return str(caught.value)

    (tmp_path / "contest.yaml").write_text("seed: x")
    (tmp_path / "latin.yaml").write_bytes("seed: 1\nname: é\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    assert message(Path("contst.yaml")) == "contst.yaml: no such settings file (did you mean 'contest.yaml'?)"
    assert message(Path("nowhere/a.yaml")) == "nowhere/a.yaml: no such settings file"
    assert message(tmp_path).startswith(".: a folder, not a settings file")
    assert message(Path("latin.yaml")) == "latin.yaml:2:7 not UTF-8 text; save the file as UTF-8"
    # Under the current folder a path is shown from there, however it was given.
    assert message(tmp_path / "contest.yaml").startswith("contest.yaml:1:7 seed: ")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 5\n")
    assert load_settings(Contest, path).seed == 5


def test_a_file_is_a_diff_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text("seed: 1\ntrain: {epochs: 5, lr: 0.5}\npair: [5, 6]\nweights: {a: 1, b: 2}\n")
    (tmp_path / "sub/middle.yaml").write_text("base: ../root.yaml\ntrain: {lr: 0.25}\nweights: {b: 3}\n")
    (tmp_path / "top.yaml").write_text("base: sub/middle\npair: [7, 8]\ntrain: {name: top}\n")
    found = load_settings(Contest, tmp_path / "top.yaml", ["train.epochs=9"])
    assert found == Contest(
        seed=1, train=Train(epochs=9, lr=0.25, name="top"), pair=(7, 8), weights={"a": 1.0, "b": 3.0}
    )


def test_a_base_that_is_not_beside_the_file_is_one_of_parkdets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "small.yaml").write_text("seed: 5\npair: [5, 6]\n")
    (tmp_path / "mine.yaml").write_text("base: small\nseed: 7\n")
    monkeypatch.setattr("parkdet.runtime.settings.files", {"parkdet.configs": shipped}.__getitem__)
    assert load_settings(Contest, tmp_path / "mine.yaml") == Contest(seed=7, pair=(5, 6))
    (tmp_path / "small.yaml").write_text("seed: 6\n")
    assert load_settings(Contest, tmp_path / "mine.yaml") == Contest(seed=7)


def test_errors_of_a_base_name_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("root.yaml").write_text("train:\n  epochs: 0\n  lr: x\n")
    Path("top.yaml").write_text("base: root.yaml\nsede: 1\ntrain: {lr: y}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(Contest, Path("top.yaml"))
    assert str(caught.value).splitlines() == [
        "top.yaml:2:1 sede: unknown key (did you mean 'seed'?)",
        "top.yaml:3:13 train.lr: expected a number, found the text 'y'",
        "root.yaml:2:11 train.epochs: must be greater than 0, found 0",
    ]


def test_bases_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: ./a.yaml\n")
    Path("lost.yaml").write_text("seed: 1\nbase: nowhere.yaml\n")
    Path("list.yaml").write_text("base: [a.yaml]\n")

    def message(name: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_settings(Contest, Path(name))
        return str(caught.value)

    assert message("a.yaml") == "b.yaml:1:7 base: goes round in a circle: a.yaml -> b.yaml -> a.yaml"
    assert message("lost.yaml").startswith("lost.yaml:2:7 base: no settings file 'nowhere.yaml' in ")
    assert message("list.yaml") == "list.yaml:1:7 base: expected a file's name, found a list"

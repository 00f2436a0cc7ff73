"""`key=value` overrides, and settings written so that they are read back."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from parkdet.runtime.errors import ConfigError
from parkdet.runtime.settings import Override, Settings, dump_settings, parse_overrides, settings_from_yaml


class Train(Settings):
    epochs: int = 3
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    cosine: bool = False
    name: str = "run"


class Stage(Settings):
    epochs: int
    lr: float = 1.0


class Contest(Settings):
    seed: int = 100
    train: Train = Train()
    stages: tuple[Stage, ...] = ()
    pair: tuple[int, int] = (1, 2)
    weights: dict[str, float] = Field(default_factory=dict)


def read(text: str, *overrides: str) -> Contest:
    return settings_from_yaml(Contest, text, "contest.yaml", overrides)


def findings(text: str, *overrides: str, model: type[BaseModel] = Contest) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings_from_yaml(model, text, "contest.yaml", overrides)
    return str(caught.value).splitlines()


def test_overrides_come_last_and_the_last_one_wins() -> None:
    text = "seed: 1\nstages: [{epochs: 1}, {epochs: 2}]\nweights: {a: 1}\n"
    found = read(text, "seed=2", "seed=3", "stages.0.epochs=8", "stages[1].lr=1e-3", "weights.b=2", "lr=0.5")
    assert found == Contest(
        seed=3,
        stages=(Stage(epochs=8), Stage(epochs=2, lr=0.001)),
        weights={"a": 1.0, "b": 2.0},
        train=Train(lr=0.5),
    )
    assert read("{}", "stages=[{epochs: 4}]", "stages.0.epochs=5").stages == (Stage(epochs=5),)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a: b # c", "a: b # c"), ("'no'", "no"), ('"a\\tb"', "a\tb"), ("C:\\x", "C:\\x"),
     ("a=b", "a=b"), ("*x", "*x"), ("세단", "세단"), ("''", "")],
)  # fmt: skip
def test_text_on_the_command_line_needs_no_second_quoting(value: str, expected: str) -> None:
    assert read("{}", f"train.name={value}").train.name == expected


def test_wrong_overrides_are_told_with_the_files_errors() -> None:
    text = "seed: x\nstages: [{epochs: 1}]\n"
    overrides = (
        "train.optimzer=1", "epochs", "=3", "optimzer=sgd", "stages.3.epochs=1", "pair=[1", "train.lr=yes",
        "weights={a: 1, a: 2}", "pair.0=1",
    )  # fmt: skip
    assert findings(text, *overrides) == [
        "contest.yaml:1:7 seed: expected a whole number, found the text 'x'",
        "override 'train.optimzer=1' train.optimzer: unknown key (did you mean 'optimizer'?)",
        "override 'epochs' expected key=value, found no '='",
        "override '=3' expected key=value, found no key before the '='",
        "override 'optimzer=sgd' optimzer: unknown key (did you mean 'train.optimizer'?)",
        "override 'stages.3.epochs=1' stages[3]: no such item: the list has 1, counted from 0",
        "override 'pair=[1' pair: [1 is not a complete list, mapping or quoted text",
        "override 'train.lr=yes' train.lr: expected a number, found the text 'yes'",
        "override 'weights={a: 1, a: 2}' weights.a: set twice: in one value",
        "override 'pair.0=1' pair: there is no list here whose items could be changed; set the whole list",
    ]


def test_a_last_name_that_ends_several_paths_is_ambiguous() -> None:
    class Both(Settings):
        train: Train = Train()
        tuned: Train | None = None

    assert findings("{}", "epochs=3", model=Both) == [
        "override 'epochs=3' epochs: ambiguous, write it in full: train.epochs, tuned.epochs"
    ]
    assert settings_from_yaml(Both, "{}", "x", ["tuned.epochs=3"]).tuned == Train(epochs=3)


def test_parsed_overrides_say_what_was_set() -> None:
    assert parse_overrides([]) == []
    assert parse_overrides(["epochs=3", "stages[0].lr=1e-3", "pair=[1, 2]"], Contest) == [
        Override(path=("train", "epochs"), value=3, text="epochs=3"),
        Override(path=("stages", "0", "lr"), value=0.001, text="stages[0].lr=1e-3"),
        Override(path=("pair",), value=[1, 2], text="pair=[1, 2]"),
    ]
    assert parse_overrides(["epochs=3"])[0].dotted == "epochs"
    with pytest.raises(ConfigError, match="no '='"):
        parse_overrides(["epochs"])


def test_a_dump_is_read_back_and_is_plain_to_see() -> None:
    contest = Contest(
        train=Train(name="no", lr=1e-05),
        stages=(Stage(epochs=1),),
        weights={"010": 1e16, "y": 0.1},
        pair=(3, 4),
    )
    text = dump_settings(contest)
    assert read(text) == contest
    assert "  name: 'no'\n" in text
    assert "  'y': 0.1\n" in text
    assert "pair: [3, 4]\n" in text
    assert "stages:\n- epochs: 1\n" in text


_TRAPS = """
no|1e-3|010|1:30|~||y|2020-01-01|.inf|0o7|0x1F|<<|=|a: b|# x|1_0| a|a |null|- a|'|"|!x|&x|*x|?|{|a\\b|%a|@|---
...|TRUE|08|base|세단|\t|\u2028|\ufeff|\x85|a\r
"""
_TEXTS = st.text(st.characters(codec="utf-8")) | st.sampled_from(
    [*_TRAPS.strip().replace("\n", "|").split("|"), "\n", "a\n b\n"]
)


@settings(max_examples=300, deadline=None)
@given(
    name=_TEXTS,
    lr=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(-(10**20), 10**20),
    weights=st.dictionaries(_TEXTS, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
def test_any_dump_is_read_back_by_us_and_by_yaml_1_1(
    name: str, lr: float, seed: int, weights: dict[str, float]
) -> None:
    contest = Contest(seed=seed, train=Train(name=name, lr=lr), weights=weights)
    text = dump_settings(contest)
    assert read(text.encode().decode()) == contest
    as_1_1: dict[str, Any] = yaml.safe_load(text)
    assert as_1_1["train"]["name"] == name
    assert as_1_1["train"]["lr"] == lr
    assert as_1_1["weights"] == weights

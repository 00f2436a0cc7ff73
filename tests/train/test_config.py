"""Recipes: the shipped ones hold the contest's numbers; stages, overrides, what is written down, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.errors import ConfigError, UsageError
from parkdet.runtime.settings import dump_settings, load_settings
from parkdet.train.config import (
    CONTEST_METRIC,
    Recipe,
    TrainSettings,
    hyp_overrides,
    load_recipe,
    shipped_recipes,
)
from parkdet.train.model.network import load_architecture
from parkdet.train.run import RunSettings

# Of the contest's description, baseline / fine-tune.
HYPER_PARAMETERS: dict[str, tuple[float, float]] = {
    "lr0": (0.01, 0.0032), "lrf": (0.01, 0.12), "momentum": (0.937, 0.843), "weight_decay": (0.0005, 0.00036),
    "warmup_epochs": (3, 2), "warmup_momentum": (0.8, 0.5), "warmup_bias_lr": (0.1, 0.05),
    "box": (0.05, 0.0296), "cls": (0.5, 0.243), "cls_pw": (1, 0.631), "obj": (1, 0.301), "obj_pw": (1, 0.911),
    "anchor_t": (4, 2.91), "fl_gamma": (0, 0), "hsv_h": (0.015, 0), "hsv_s": (0.7, 0), "hsv_v": (0.4, 0.4),
    "degrees": (0, 0), "translate": (0.1, 0.1), "scale": (0.5, 0.9), "shear": (0, 0), "perspective": (0, 0),
    "flipud": (0, 0), "fliplr": (0.5, 0.5), "mosaic": (1, 1), "mixup": (0, 0),
}  # fmt: skip
STEPS: dict[str, tuple[Any, Any]] = {
    "epochs": (50, 15), "imgsz": (1280, 1280), "batch_size": (2, 2), "nominal_batch": (64, 64),
    "optimizer": ("SGD", "SGD"), "epoch_parts": (15, 15), "image_weights": (True, False), "val_period": (0, 0),
    "cos_lr": (False, False), "label_smoothing": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HYPER_PARAMETERS | STEPS))
def test_the_contests_recipe_holds_its_number(name: str) -> None:
    stages = load_recipe("contest").stage_settings()
    assert [stage for stage, _ in stages] == ["baseline", "finetune"]
    assert tuple(getattr(settings, name) for _, settings in stages) == (HYPER_PARAMETERS | STEPS)[name]


def test_the_contests_network_split_and_post_processing() -> None:
    recipe = load_recipe("contest")
    assert recipe.model == "yolov5x6"
    assert (recipe.split.seed, recipe.split.count) == (100, None)
    assert (recipe.val.conf, recipe.val.iou, recipe.val.max_det) == (0.01, 0.7, 50)
    assert recipe.val.metric == CONTEST_METRIC == {"map50": 0.1, "map75": 0.9}


def test_every_shipped_recipe_loads_and_names_a_network() -> None:
    assert {"contest", "small", "demo"} <= set(shipped_recipes())
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        load_architecture(recipe.model)
        assert load_recipe(str(path)) == recipe
        assert all(isinstance(settings, TrainSettings) for _, settings in recipe.stage_settings())


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_stage_replaces_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    name = written(
        tmp_path / "two.yaml",
        "train: {epochs: 7, lr0: 0.02, image_weights: true}\n"
        "stages:\n- name: a\n- {name: b, lr0: 0.001, image_weights: false, mosaic: 0.0}\n",
    )
    (first, a), (second, b) = load_recipe(name).stage_settings()
    assert (first, second) == ("a", "b")
    assert a == TrainSettings(epochs=7, lr0=0.02, image_weights=True)
    # False and 0 are values too, not the absence of one.
    assert b == TrainSettings(epochs=7, lr0=0.001, image_weights=False, mosaic=0.0)
    assert load_recipe("small").stage_settings() == (("", load_recipe("small").train),)


@pytest.mark.parametrize("override", ["epochs=3", "train.epochs=3", "train={epochs: 3}"])
def test_the_command_line_has_the_last_word_over_stages(override: str) -> None:
    plain, changed = load_recipe("contest"), load_recipe("contest", [override, "lr0=0.5"])
    for (_, before), (_, after) in zip(plain.stage_settings(), changed.stage_settings(), strict=True):
        assert (after.epochs, after.lr0) == (3, 0.5)
        assert after.warmup_epochs == before.warmup_epochs
        assert after.scale == before.scale


def test_an_override_can_mean_one_stage() -> None:
    (_, baseline), (_, finetune) = load_recipe("contest", ["stages.1.epochs=30"]).stage_settings()
    assert (baseline.epochs, finetune.epochs) == (50, 30)


@pytest.mark.parametrize("overrides", [[], ["epochs=2", "image_weights=false", "weights='1e3'"]])
@pytest.mark.parametrize("name", ["contest", "small", "demo"])
def test_what_args_yaml_holds_trains_the_same(name: str, overrides: list[str], tmp_path: Path) -> None:
    recipe = load_recipe(name, overrides)
    settings = RunSettings(data="/자료/no: 1", device="0", workers=2, recipe=recipe)
    path = tmp_path / "args.yaml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    found = load_settings(RunSettings, path)
    assert found == settings
    assert found.recipe.stage_settings() == recipe.stage_settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: 3\n  optimzer: SGD\n", r"bad\.yaml:3:3 train\.optimzer: unknown key.*'optimizer'"),
        ("train: {epochs: 0}\n", r"bad\.yaml:1:\d+ train\.epochs"),
        ("train: {lr0: 1e-3, lrf: -1}\n", r"bad\.yaml:1:\d+ train\.lrf"),
        ("train: {imgsz: 640.5}\n", r"bad\.yaml:1:\d+ train\.imgsz"),
        ("train: {precision: fp8}\n", r"bad\.yaml:1:\d+ train\.precision"),
        ("train: {mosaic: 1.5}\n", r"bad\.yaml:1:\d+ train\.mosaic"),
        ("stages:\n- name: a\n  lr00: 1\n", r"bad\.yaml:3:3 stages\[0\]\.lr00: unknown key.*'lr0'"),
        ("stages:\n- name: a\n- name: b\n  epochs: -3\n", r"bad\.yaml:4:\d+ stages\[1\]\.epochs"),
        ("stages:\n- name: a\n  momentum: 1.0\n", r"bad\.yaml:3:\d+ stages\[0\]\.momentum"),
        ("stages:\n- name: a\n  optimizer: Adam\n", r"bad\.yaml:3:\d+ stages\[0\]\.optimizer"),
        ("stages:\n- epochs: 3\n", r"bad\.yaml:2:\d+ stages\[0\]\.name"),
        ("stages:\n- name: ../a\n", r"bad\.yaml:2:\d+ stages\[0\]\.name"),
        ("stages:\n- name: a\n- name: a\n", r"bad\.yaml:.*different names"),
        ("val: {metric: {map60: 1.0}}\n", r"bad\.yaml:1:\d+ val\.metric\S*map60"),
        ("val: {metric: {}}\n", r"bad\.yaml:1:\d+ val\.metric"),
        ("split: {count: 0}\n", r"bad\.yaml:1:\d+ split\.count"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(tmp_path / "bad.yaml", text)).stage_settings()


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = "modle: yolov5n\ntrain: {epochs: 0}\nstages:\n- {name: a, lr0: 0}\n"
    with pytest.raises(ConfigError) as caught:
        load_recipe(written(tmp_path / "bad.yaml", text), ["batch_size=0"])
    for part in ("bad.yaml:1:1 modle", "train.epochs", "stages[0].lr0", "override 'batch_size=0'"):
        assert part in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe 'contset'.*contest, demo, small"):
        load_recipe("contset")
    with pytest.raises(UsageError):
        load_recipe(str(tmp_path))


def test_a_file_may_be_a_diff_of_a_shipped_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path / "mine.yaml", "base: contest.yaml\ntrain: {imgsz: 640}\n"))
    contest = load_recipe("contest")
    assert recipe == contest.model_copy(update={"train": contest.train.model_copy(update={"imgsz": 640})})
    assert isinstance(recipe, Recipe)


HYP = """
# Hyperparameters for low-augmentation COCO training from scratch
lr0: 0.00334 # initial learning rate (SGD=1E-2, Adam=1E-3)
lrf: 0.15135
momentum: 0.74832
weight_decay: 0.00025
warmup_epochs: 3.3835
warmup_momentum: 0.59462
warmup_bias_lr: 0.18657
box: 0.02
cls: 0.21638
cls_pw: 0.5
obj: 0.51728
obj_pw: 0.67198
iou_t: 0.2
anchor_t: 3.3744
# anchors: 3.63
fl_gamma: 0.0
hsv_h: 0.01041
hsv_s: 0.54703
hsv_v: 0.27739
degrees: 0.0
translate: 0.04591
scale: 0.75544
shear: 1e-05
perspective: 0.0
flipud: 0
fliplr: 0.5
mosaic: 0.85834
mixup: 0.04266
copy_paste: 0.0
"""


def test_a_hyper_parameter_file_of_yolov5s_goes_over_all_stages(tmp_path: Path) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_text(HYP)
    overrides = hyp_overrides(path)
    assert len(overrides) == 28
    for _, settings in load_recipe("contest", overrides).stage_settings():
        assert (settings.lr0, settings.shear, settings.iou_t, settings.flipud) == (0.00334, 1e-05, 0.2, 0)
        assert (settings.imgsz, settings.epoch_parts) == (1280, 15)
    path.write_text("lr0: 0.1\nmosiac: 1.0\n")
    with pytest.raises(ConfigError, match=r"hyp\.yaml:2:1 mosiac: unknown key.*'mosaic'"):
        hyp_overrides(path)


def test_a_hyper_parameter_file_may_say_how_many_anchors_a_level_has(tmp_path: Path) -> None:
    """As two of the files that come with YOLOv5 do, which rounds the number."""
    path = tmp_path / "hyp.yaml"
    for anchors in ("3", "3.412", "0"):
        path.write_text(f"lr0: 0.00334\nanchors: {anchors}  # anchors per output layer\n")
        assert hyp_overrides(path) == ("train.lr0=0.00334",)
    path.write_text("lr0: 0.00334\nanchors: 4\n")
    with pytest.raises(ConfigError, match=r"hyp\.yaml:2:\d+ anchors: the networks have 3 anchors a level"):
        hyp_overrides(path)
